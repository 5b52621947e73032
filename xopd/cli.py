"""The ``xopd`` command: one sub-command per thing a person wants to do."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from xopd.errors import Terminated, UserError
from xopd_kernels import BackendUnavailableError, __version__

EPILOG = """\
examples:
  xopd demo                                     close a real speech/text gap on this CPU
  xopd data synth --out data/spoken             make a spoken corpus
  xopd config > my.yaml                         every field with its meaning and default
  xopd train my.yaml optim.learning_rate=1e-4   train; the same command resumes
  xopd eval runs/demo/seed_0/student --teacher TEACHER --data runs/demo/data
  xopd doctor                                   what this machine can run, and why not the rest
  xopd plan qwen3_omni_30b_a3b_thinker          what fits on a cluster, and how long a step takes
  xopd serve student my.yaml                    a vLLM server for rollouts of that run
  xopd export runs/xopd/student EMPTY_FOLDER    the trained language model alone, for vLLM
  xopd bench --smoke                            our operators beside every other library's
"""

Parsers = argparse._SubParsersAction  # the type has no public name


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status.

    Errors that a person can mend (a config key, a missing folder, a model that does not fit) are
    one line on stderr and status 2; anything else is a fault and shows its traceback.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return int(args.run(args))
    except (UserError, BackendUnavailableError) as error:
        print(f"xopd: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OWN:
            raise  # a fault of ours
        print(f"xopd: error: {_missing(error, _COMMANDS[args.command][1])}", file=sys.stderr)
        return 2
    except Terminated as error:
        print(f"xopd: {error}; the same command resumes", file=sys.stderr)
        return 143  # 128 + SIGTERM, as a shell reports it
    except KeyboardInterrupt:
        print("xopd: interrupted; the same command resumes", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xopd",
        description="Cross-modal on-policy distillation of speech LLMs through fused kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xopd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, extra) in _COMMANDS.items():
        try:
            add(commands)
        except ModuleNotFoundError as error:
            _add_missing(commands, name, _missing(error, extra))
    return parser


def _missing(error: ModuleNotFoundError, extra: str) -> str:
    return f"this command needs {error.name}: pip install '.[{extra}]' in the clone"


def _add_missing(commands: Parsers[argparse.ArgumentParser], name: str, reason: str) -> None:
    """A command whose packages are not installed: it is listed, and says what to install."""
    parser = commands.add_parser(name, help=reason, add_help=False)
    parser.add_argument("rest", nargs=argparse.REMAINDER)

    def run(args: argparse.Namespace) -> int:
        raise UserError(reason)

    parser.set_defaults(run=run)


def _add_bench(commands: Parsers[argparse.ArgumentParser]) -> None:
    from xopd_bench.cli import add_bench_parser

    add_bench_parser(commands)


def _add_plan(commands: Parsers[argparse.ArgumentParser]) -> None:
    from xopd.plan.cli import add_plan_parser

    add_plan_parser(commands)


def _add_serve(commands: Parsers[argparse.ArgumentParser]) -> None:
    from xopd.vllm.cli import add_serve_parser

    add_serve_parser(commands)


def _add_export(commands: Parsers[argparse.ArgumentParser]) -> None:
    from xopd.vllm.cli import add_export_parser

    add_export_parser(commands)


def _add_demo(commands: Parsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train the bundled small speech LLM and show what changed",
        description="Synthesize speech, close the speech/text gap of a small Qwen3-Omni thinker by "
        "X-OPD against its text teacher, and write a report. Cached and resumable.",
    )
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="training seeds, one run each (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder (default: %(default)s)",
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="also train teacher and base student from nothing (about 20 minutes more)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that synthesize speech (default: 2)"
    )

    def run(args: argparse.Namespace) -> int:
        from xopd.recipes.demo import run_demo

        run_demo(args.out, seeds=args.seed, from_scratch=args.from_scratch, workers=args.workers)
        return 0

    parser.set_defaults(run=run)


def _add_data(commands: Parsers[argparse.ArgumentParser]) -> None:
    from xopd.data.cli import add_data_parser, run_data

    add_data_parser(commands).set_defaults(run=run_data)


def _add_config(commands: Parsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "config",
        help="print the resolved config, or a commented template",
        description="Without arguments: a template of every field. With a file: the tree that a "
        "run would use, defaults filled in and overrides applied.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, last one wins")

    def run(args: argparse.Namespace) -> int:
        from xopd.config import config_template, dump_config, load_config

        if args.config is None:
            print(config_template(), end="")
        else:
            print(dump_config(load_config(args.config, args.overrides)), end="")
        return 0

    parser.set_defaults(run=run)


def _add_train(commands: Parsers[argparse.ArgumentParser]) -> None:
    from xopd.config import field_docs, load_config

    fields = "\n".join(f"  {doc.name} ({doc.takes})\n      {doc.doc}" for doc in field_docs())
    parser = commands.add_parser(
        "train",
        help="train from a config; the same command resumes",
        description="Rollouts on speech and text, teacher scores on text, clipped-ratio loss "
        "through the fused kernels. Writes config, metrics, checkpoints, evaluations, the trained "
        "student and report.html to train.out_dir.",
        epilog=f"fields:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file (see: xopd config)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, last one wins")

    def run(args: argparse.Namespace) -> int:
        config = load_config(args.config, args.overrides)
        from xopd.ranks import is_first_process
        from xopd.report import write_report
        from xopd.train import train

        directory = train(config)
        if is_first_process():
            print(f"report: {write_report(directory)}")
        return 0

    parser.set_defaults(run=run)


def _add_eval(commands: Parsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eval",
        help="accuracy from speech and text, average drop, probes",
        description="Greedy answers of a student folder on one split, as JSON: accuracy from "
        "speech and from text by task, average drop against the teacher's text accuracy, "
        "held-out voices, and the forgetting probes.",
    )
    parser.add_argument("student", help="folder or hub id of the speech LLM")
    parser.add_argument("--teacher", required=True, help="folder or hub id of the text LLM")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--limit", type=int, default=400, help="prompts (default: 400)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="default: 40")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")

    def run(args: argparse.Namespace) -> int:
        from xopd.config import Config, DataConfig, ModelConfig, RolloutConfig
        from xopd.files import write_atomically
        from xopd.run import evaluate_folder

        config = Config(
            model=ModelConfig(student=args.student, teacher=args.teacher),
            data=DataConfig(path=args.data, eval_split=args.split, eval_limit=args.limit),
            rollout=RolloutConfig(max_new_tokens=args.max_new_tokens),
        )
        text = json.dumps(evaluate_folder(config), indent=1) + "\n"
        if args.out is not None:
            write_atomically(args.out, text.encode())
        print(text, end="")
        return 0

    parser.set_defaults(run=run)


def _add_report(commands: Parsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("report", help="write report.html and PNGs of a run folder")
    parser.add_argument("run_dir", type=Path, help="folder of a run (train.out_dir)")

    def run(args: argparse.Namespace) -> int:
        from xopd.report import write_report

        print(write_report(args.run_dir))
        return 0

    parser.set_defaults(run=run)


def _add_doctor(commands: Parsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="versions, backends and why each is or is not available, memory estimate",
        description="What this machine can run, and arithmetic (no measurement) for the memory of "
        "one loss call of N tokens and of training the model.",
    )
    parser.add_argument(
        "--model", help="folder or hub id: takes D, V and the parameters from its config"
    )
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="default: 8192")
    parser.add_argument("--hidden", type=int, default=2048, metavar="D", help="default: 2048")
    parser.add_argument(
        "--vocabulary", type=int, default=152064, metavar="V", help="default: 152064"
    )

    def run(args: argparse.Namespace) -> int:
        from xopd.doctor import HeadShape, print_doctor, shape_of_model

        shape = HeadShape(args.hidden, args.vocabulary, parameters=None)
        if args.model is not None:
            shape = shape_of_model(args.model)
        print_doctor(args.tokens, shape)
        return 0

    parser.set_defaults(run=run)


# Each command, and the extra of the package that it needs.
_COMMANDS: dict[str, tuple[Callable[[Parsers[argparse.ArgumentParser]], None], str]] = {
    "demo": (_add_demo, "train"),
    "data": (_add_data, "train"),
    "config": (_add_config, "train"),
    "train": (_add_train, "train"),
    "eval": (_add_eval, "train"),
    "report": (_add_report, "train"),
    "plan": (_add_plan, "train"),
    "serve": (_add_serve, "train"),
    "export": (_add_export, "train"),
    "bench": (_add_bench, "bench"),
    "doctor": (_add_doctor, "train"),
}
_OWN = ("xopd", "xopd_bench", "xopd_kernels")
