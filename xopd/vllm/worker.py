"""What runs inside vLLM's workers: fingerprints of the weights that a model computes with.

vLLM mixes this class into its worker (``--worker-extension-cls xopd.vllm.worker.Fingerprints``), so
a server needs this package on its path. The module imports torch alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

WATCH_S = 1.0
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def bit_sum(tensor: Tensor) -> int:
    """The sum of the elements' bit patterns read as integers, modulo 2**64.

    Exact, so it depends neither on the order of summation nor on how the tensor is cut into shards,
    and rows of zeros that only pad it count nothing.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _has_ended(process: int) -> bool:
    """Whether there is no such process, or one that only waits to be noticed."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return text.rpartition(")")[2].split()[0] in "ZX"


class Fingerprints:
    """Mixed into vLLM's worker, whose `model_runner` it reads."""

    model_runner: Any

    def xopd_watch(self, process: str) -> None:
        """End this engine when the process of that number has ended, however that came.

        A killed trainer cannot tell its children, which would keep the memory of its GPUs.
        """
        parent = os.getppid()  # the engine, or the trainer itself where the worker is the engine

        def watch() -> None:
            while not _has_ended(int(process)):
                time.sleep(WATCH_S)
            if parent != int(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(parent, signal.SIGKILL)
            os._exit(1)

        Thread(target=watch, name="watch", daemon=True).start()

    def xopd_fingerprint(self, names: str) -> dict[str, list[str]]:
        """Elements and bit sum of each named parameter that this worker holds.

        names: a JSON list, because control routes pass text only. Numbers come as text, because
        not every JSON reader keeps 63 bits.
        """
        held = dict(self.model_runner.get_model().named_parameters())
        return {
            name: [str(held[name].numel()), str(bit_sum(held[name]))]
            for name in json.loads(names)
            if name in held
        }
