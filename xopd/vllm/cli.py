"""``xopd serve`` and ``xopd export``: servers of a run's models, and a student that vLLM loads."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from xopd.config import Config, Dtype, load_config
from xopd.errors import UserError
from xopd.vllm.version import check_version

if TYPE_CHECKING:
    from xopd.models import SpeechLM

_DESCRIPTION = """\
Writes what the server loads, and becomes the server (vLLM must be installed in this environment).
Sections server, vllm and http of the config say where it listens and with which key; `xopd train`
with the same config finds it there. It listens on a loopback address unless told otherwise, and
must stay there: vLLM's routes that replace weights take no key."""
_EPILOG = """\
examples:
  xopd serve student my.yaml                      then: xopd train my.yaml rollout.engine=server
  xopd serve teacher my.yaml --replica 1          the second address in teacher.urls
  xopd serve student my.yaml --print              only the command line
"""


def add_serve_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``xopd serve``."""
    parser = commands.add_parser(
        "serve",
        help="start a vLLM server of the student or the teacher of a config",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("student", "teacher"))
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, last one wins")
    parser.add_argument(
        "--replica", type=int, default=0, metavar="N", help="which of teacher.urls; default: 0"
    )
    parser.add_argument("--print", action="store_true", help="print the command, start nothing")
    parser.set_defaults(run=run_serve)


def add_export_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``xopd export``."""
    parser = commands.add_parser(
        "export",
        help="write a student's language model as a folder that vLLM loads",
        description="A run's student/ is the whole speech LLM, as transformers loads it. This "
        "writes its language model alone, a plain Qwen3 (dense or MoE) with tokenizer, which vLLM "
        "and AutoModelForCausalLM load; spoken prompts reach it as embeddings.",
    )
    parser.add_argument("student", help="folder or hub id of the speech LLM")
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--dtype",
        choices=[str(dtype) for dtype in Dtype],
        default=str(Dtype.BF16),
        help="of the weights; default: %(default)s",
    )
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Write the folder of a parsed command line."""
    from xopd.models import load_student

    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"{args.out} is not an empty folder: name a new one.")
    _write(load_student(args.student), args.out, Dtype(args.dtype))
    print(args.out)
    return 0


def run_serve(args: argparse.Namespace) -> int:
    """Become the server of a parsed command line."""
    config = load_config(args.config, args.overrides)
    if not args.print:
        from xopd.vllm.local import installed_version

        check_version(installed_version(), "the installed package")
        path = config.model.student if args.what == "student" else config.model.teacher
        section = "vllm" if args.what == "student" else "teacher"
        _check_positions(path, section, getattr(config, section).max_model_len)
    if args.what == "student":
        command, environment = _student(config, writes=not args.print)
    else:
        command, environment = _teacher(config, args.replica), {}
    print(shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command]))
    if args.print:
        return 0
    key = config.http.api_key()
    secret = {} if key is None else {"VLLM_API_KEY": key}
    os.execve(command[0], command, os.environ | environment | secret)


def _student(config: Config, *, writes: bool) -> tuple[list[str], dict[str, str]]:
    from xopd.models import load_student
    from xopd.vllm.server import serve_command

    folder = Path(config.server.folder)
    if writes:
        model = config.model
        student = load_student(
            model.student, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        _write(student, folder, config.vllm.dtype)
    remote = config.http.allow_remote
    return serve_command(str(folder), config.server, config.vllm, allow_remote=remote)


def _check_positions(path: str, section: str, max_model_len: int) -> None:
    """Refuse a length that the model has no positions for; vLLM would, minutes later."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(path).get_text_config()
    if max_model_len > text.max_position_embeddings:
        raise UserError(
            f"{section}.max_model_len is {max_model_len}, and {path!r} has "
            f"{text.max_position_embeddings} positions: lower the first"
        )


def _write(student: SpeechLM, folder: Path, dtype: Dtype) -> None:
    from xopd.vllm.engine import DTYPES
    from xopd.vllm.folder import write_folder, write_weights
    from xopd.vllm.sync import LanguageModel

    write_folder(student, folder, dtype)
    write_weights(LanguageModel(student, DTYPES[dtype]), folder)


def _teacher(config: Config, replica: int) -> list[str]:
    from xopd.vllm.server import teacher_command

    urls = config.teacher.addresses()
    if not 0 <= replica < len(urls):
        raise UserError(
            f"--replica is {replica}, but teacher.urls names {len(urls)} servers: "
            + ("set teacher.urls" if not urls else f"give 0 to {len(urls) - 1}")
        )
    return teacher_command(
        config.model.teacher,
        urls[replica],
        config.teacher,
        config.model.dtype,
        allow_remote=config.http.allow_remote,
    )
