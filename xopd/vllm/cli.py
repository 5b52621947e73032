"""``xopd serve``: start a vLLM server of a run's student or teacher, as the run's config has it."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from xopd.config import Config, load_config
from xopd.errors import UserError

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


def run_serve(args: argparse.Namespace) -> int:
    """Become the server of a parsed command line."""
    config = load_config(args.config, args.overrides)
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
    from xopd.vllm.engine import DTYPES
    from xopd.vllm.folder import write_folder, write_weights
    from xopd.vllm.options import Transport
    from xopd.vllm.server import serve_command
    from xopd.vllm.sync import LanguageModel

    folder = Path(config.server.folder)
    if writes:
        model = config.model
        student = load_student(
            model.student, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        write_folder(student, folder, config.vllm.dtype)
        if config.server.transport is Transport.DISK:
            write_weights(LanguageModel(student, DTYPES[config.vllm.dtype]), folder)
    return serve_command(str(folder), config.server, config.vllm)


def _teacher(config: Config, replica: int) -> list[str]:
    from xopd.vllm.server import teacher_command

    urls = config.teacher.addresses()
    if not 0 <= replica < len(urls):
        raise UserError(
            f"--replica is {replica}, but teacher.urls names {len(urls)} servers: "
            + ("set teacher.urls" if not urls else f"give 0 to {len(urls) - 1}")
        )
    return teacher_command(config.model.teacher, urls[replica], config.teacher, config.model.dtype)
