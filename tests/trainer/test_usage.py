"""FLOPs of an update against torch's own counter, and the peaks of data sheets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xopd.config import Config
from xopd.models import SpeechLM
from xopd.plan import shape_of
from xopd.ranks import ALONE
from xopd.rollout import Request, Sampled
from xopd.types import Modality, Prompt, Rollout
from xopd.usage import Usage, peak_flops, update_flops


def rows_of(lengths: list[tuple[int, int]]) -> list[Sampled]:
    request = Request(0, Modality.TEXT, 0)
    return [Sampled(request, prompt, (20,) * n, is_finished=False) for prompt, n in lengths]


def test_flops_are_those_that_torch_counts(new_student: SpeechLM) -> None:
    """Every token is a response here, so that lm_head's products can be counted by torch too."""
    tokens, rows = 48, 5
    ids = torch.randint(12, 60, (rows, tokens))
    with FlopCounterMode(display=False) as counter:
        new_student.model(input_ids=ids, use_cache=False).logits.sum().backward()
    planned = update_flops(shape_of(new_student.model, "student"), rows_of([(0, tokens)] * rows))
    # Attention is counted over all of the square, of which a causal model needs half.
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_prompt_tokens_do_not_meet_the_head(student: SpeechLM) -> None:
    shape = shape_of(student.model, "student")
    more = update_flops(shape, rows_of([(10, 6)])) - update_flops(shape, rows_of([(10, 5)]))
    less = update_flops(shape, rows_of([(11, 5)])) - update_flops(shape, rows_of([(10, 5)]))
    assert more - less == pytest.approx(6.0 * shape.vocabulary * shape.hidden)


def test_the_record_of_an_update(
    student: SpeechLM, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    usage = Usage(student, ALONE, make_config(tmp_path))
    rows = rows_of([(10, 5), (20, 7)])
    slow, fast = usage.of_update(rows, 2.0), usage.of_update(rows, 1.0)
    assert fast["tflop_s"] == pytest.approx(2 * slow["tflop_s"])
    assert "mfu" not in fast  # this processor is on no data sheet
    assert 0.05 < fast["peak_memory_gb"] < 100
    rollout = Rollout(
        Prompt("", "", (1,) * 9, (1,), torch.zeros(0, 128), "", ""),
        Modality.TEXT,
        (20,) * 11,
        is_finished=True,
    )
    few, many = (usage.planned([[[rollout] * n]])["planned_memory_gb"] for n in (8, 16))
    weights = 16e-9 * shape_of(student.model, "student").trained_parameters
    assert weights < few < many < 0.1


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, None),
    ],
)
def test_peaks_of_known_gpus(name: str, dtype: torch.dtype, expected: float | None) -> None:
    assert peak_flops(name, dtype) == expected
