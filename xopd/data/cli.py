"""The ``xopd data`` command: makes the spoken-instruction corpus."""

import argparse
from pathlib import Path
from typing import Final, get_args

from xopd.data.synth import DEFAULT_SIZES, SplitName, synthesize

_DESCRIPTION: Final = """\
Make a corpus of spoken instructions with known answers: each prompt as words and as speech, for
measuring what a speech model loses against its text teacher.

The same arguments give the same bytes. A run that was stopped continues; a finished one returns at
once. The folder holds the splits align (to pre-train a base student), train, dev, test, and
test_heldout_voice (test prompts in voices that training never hears).
"""
_EXAMPLES: Final = """\
examples:
  xopd data synth --out data/spoken
      the default corpus: 5,400 clips, about 2.6 hours of speech
  xopd data synth --out data/tiny --align 40 --train 20 --dev 10 --test 10 --test-heldout-voice 10
      a tiny one, in a few seconds
  python -c 'import datasets; print(datasets.load_dataset("parquet", data_files={
      "train": "data/spoken/train-*.parquet"}))'
      look at a split with Hugging Face datasets (name the files: by itself it would merge both
      test splits)
"""


def add_data_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """Adds ``data`` with its sub-command ``synth`` to a command line and returns the parser."""
    parser = subparsers.add_parser("data", help="make a corpus of spoken instructions")
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    synth = commands.add_parser(
        "synth",
        help="synthesise speech with espeak-ng, no model weights needed",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    synth.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    synth.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    synth.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s"
    )
    synth.add_argument("--quiet", action="store_true", help="no progress bar")
    for split in _SPLITS:
        synth.add_argument(
            f"--{split.replace('_', '-')}",
            type=int,
            default=DEFAULT_SIZES[split],
            metavar="N",
            help=f"clips of split {split}; default: %(default)s",
        )
    return parser


def run_data(args: argparse.Namespace) -> int:
    """Runs a parsed ``xopd data`` command and returns the exit status."""
    summary = synthesize(
        args.out,
        sizes={split: getattr(args, split) for split in _SPLITS},
        seed=args.seed,
        workers=args.workers,
        progress=not args.quiet,
    )
    print(
        f"{args.out}: {summary.rows} clips, {summary.audio_s / 3600:.2f} h of speech; "
        f"{summary.made_shards} shards made, {summary.reused_shards} found finished"
    )
    return 0


_SPLITS: Final[tuple[SplitName, ...]] = get_args(SplitName)
