"""Which releases of vLLM the code was written for, and what it says about others."""

from __future__ import annotations

import logging
import re
from typing import Final

from xopd.vllm.options import VllmError

MINIMUM: Final = (0, 29)  # the weight-transfer and version routes took their present form here
TESTED: Final = (0, 32)

_log = logging.getLogger(__name__)


def check_version(version: str, where: str) -> None:
    """Refuse a release before `MINIMUM`; warn of one that nobody has tested.

    where: whose version it is, for the message.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise VllmError(f"{where} reports vLLM version {version[:40]!r}: expected one like 0.32.0.")
    found = (int(match[1]), int(match[2]))
    if found < MINIMUM:
        raise VllmError(
            f"{where} is vLLM {version}; {_text(MINIMUM)} or later is needed, because weights are "
            f"sent and named in another way before it. Install vllm=={_text(TESTED)}.*."
        )
    if found != TESTED:
        _log.warning(
            "%s is vLLM %s; this code is tested with %s. Each sync compares weights and log-probs, "
            "so a difference stops the run rather than spoil it",
            where,
            version,
            _text(TESTED),
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
