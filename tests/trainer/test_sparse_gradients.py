"""`loss.max_gradient_error`: from the config to gradients, metrics, plan and page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.test_plan import parsed
from tests.trainer.test_train import STATEFUL, cut, fingerprint
from xopd.advantage import Baseline
from xopd.config import Config, ConfigError, load_config
from xopd.loss import TokenStats, policy_loss, step_sizes
from xopd.metrics import read_jsonl
from xopd.models import SpeechLM
from xopd.optimizer import build_optimizer
from xopd.plan import Head, UpdateBatch, model_shape, plan_text, planned_cpu_step, step_time
from xopd.plan.activations import Precision
from xopd.plan.cli import job_of
from xopd.plan.losses import HeadWork, loss_bytes, scoring_bytes
from xopd.ranks import ALONE, World
from xopd.report.inputs import read_run
from xopd.report.plots import learning_charts
from xopd.run import RunError, prepare
from xopd.sections import LossConfig
from xopd.step import run_step
from xopd.token_metrics import token_metrics
from xopd.train import train
from xopd.types import Modality, Prompt, Rollout
from xopd_kernels import Backend, Operator, Workload, memory_plan

MakeConfig = Callable[..., Config]
MakeRollouts = Callable[[list[Modality]], list[Rollout]]
TEXT, SPEECH = Modality.TEXT, Modality.SPEECH
REQUIRED = ["model.student=s", "model.teacher=t", "data.path=p"]
NAMES = ("gradient_error", "dropped_mass_text", "dropped_mass_speech")


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan"])
def test_a_bound_is_a_share(value: str) -> None:
    with pytest.raises(ConfigError, match=r"max_gradient_error: expected float in \[0, 1\] or nu"):
        load_config(None, [*REQUIRED, f"loss.max_gradient_error={value}"])
    assert load_config(None, REQUIRED).loss.max_gradient_error is None
    given = ("loss.max_gradient_error=0.3", "loss.max_gradient_error=null")
    assert load_config(None, [*REQUIRED, *given]).loss.max_gradient_error is None


def test_a_vocabulary_parallel_head_is_refused() -> None:
    parallel = "sharding.vocab_parallel_head=true"
    with pytest.raises(ConfigError, match=r"no rank sees all classes .* null or the second to fal"):
        load_config(None, [*REQUIRED, parallel, "loss.max_gradient_error=0"])
    load_config(None, [*REQUIRED, parallel])


def scored(student: SpeechLM, rows: Sequence[Rollout]) -> list[Rollout]:
    rng = torch.Generator().manual_seed(7)
    return [
        replace(row, teacher_logprob=-3.0 * torch.rand(len(row.response_ids), generator=rng))
        for row in rows
    ]


def gradients(
    student: SpeechLM, rows: Sequence[Rollout], bound: float | None, backend: Backend
) -> tuple[float, dict[str, Tensor], list[TokenStats]]:
    config = LossConfig(max_gradient_error=bound)
    sizes = step_sizes(rows)
    loss, stats = policy_loss(student, rows, sizes, config, temperature=1.0, backend=backend)
    student.model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.trainable().items() if p.grad is not None}
    return float(loss.detach()), found, stats


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.NATIVE])
def test_gradients_of_the_student(
    new_student: SpeechLM, rollouts: MakeRollouts, backend: Backend
) -> None:
    """A bound of 0 is exact; another one holds, and says which tokens have lists."""
    rows = scored(new_student, rollouts([TEXT, SPEECH, TEXT, SPEECH]))
    loss, exact, stats = gradients(new_student, rows, None, backend)
    assert all(one.dropped_mass is None and one.gradient_error is None for one in stats)
    same_loss, same, stats = gradients(new_student, rows, 0.0, backend)
    assert same_loss == pytest.approx(loss, rel=1e-6)
    assert {one.gradient_error for one in stats} == {0.0}
    for name, gradient in same.items():
        assert (gradient - exact[name]).norm() <= 1e-5 * exact[name].norm() + 1e-9, name
    sparse_loss, sparse, stats = gradients(new_student, rows, 0.3, backend)
    assert sparse_loss == pytest.approx(loss, rel=1e-6)
    (bound,) = {one.gradient_error for one in stats}
    assert bound is not None and 0 < bound <= 0.3
    for one, row in zip(stats, rows, strict=True):
        assert one.dropped_mass is not None
        assert one.dropped_mass.shape == (len(row.response_ids),)
    assert any(bool((x.dropped_mass > 0).any()) for x in stats if x.dropped_mass is not None)
    head = sparse["lm_head.weight"] - exact["lm_head.weight"]
    assert 0 < head.norm() < 0.3 * exact["lm_head.weight"].norm()


def test_metrics_of_a_step(make_config: MakeConfig, tmp_path: Path) -> None:
    records = {}
    for bound in ("null", "0.2"):
        config = make_config(tmp_path / bound, f"loss.max_gradient_error={bound}")
        run = prepare(config, ALONE)
        optimizer = build_optimizer(run.student.trainable().values(), config.optim)
        result = run_step(run, optimizer, Baseline(), step=0, rate=1e-3, check=lambda: None)
        records[bound] = result.record
    assert not set(NAMES) & set(records["null"])
    assert 0 < records["0.2"]["gradient_error"] <= 0.2
    for name in NAMES[1:]:
        assert 0 < records["0.2"][name] < 1
    assert records["0.2"]["loss"] == pytest.approx(records["null"]["loss"], rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Twice(World):
    """Two ranks, of which the other one says the same, but for a bound of its own."""

    def gather(self, value):  # type: ignore[no-untyped-def]
        is_bounds = isinstance(value, list) and len(value) < 5
        return [value, [0.25] if is_bounds else value]


def stats_of(modality: Modality, mass: Sequence[float], bound: float | None) -> TokenStats:
    zeros = torch.zeros(len(mass))
    prompt = Prompt("", "", (1,), (1,), torch.zeros(0, 0), "", "")
    row = Rollout(prompt, modality, (5,) * len(mass), is_finished=True, teacher_logprob=zeros)
    dropped = None if bound is None else torch.tensor(mass)
    return TokenStats(row, zeros, zeros, zeros.bool(), dropped, bound)


def test_metrics_are_means_over_tokens_and_the_largest_bound() -> None:
    stats = [
        stats_of(TEXT, [0.1, 0.3], 0.01),
        stats_of(TEXT, [0.2, 0.6, 0.8], 0.02),
        stats_of(SPEECH, [0.5], 0.02),
    ]
    found = token_metrics(ALONE, stats, 2.0)
    assert found["dropped_mass_text"] == pytest.approx(0.4)
    assert found["dropped_mass_speech"] == pytest.approx(0.5)
    assert found["gradient_error"] == 0.02
    found = token_metrics(Twice(), stats, 2.0)
    assert found["dropped_mass_text"] == pytest.approx(0.4)
    assert found["gradient_error"] == 0.25
    exact = token_metrics(ALONE, [stats_of(TEXT, [0.0], None)], 2.0)
    assert not set(NAMES) & set(exact)


def test_the_report_draws_them(tmp_path: Path) -> None:
    lines = [
        f'{{"step": {step}, "gradient_error": 0.01, "dropped_mass_text": 0.2}}' for step in (0, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    assert [chart.name for chart in learning_charts(read_run(tmp_path))] == [
        "gradient_error",
        "dropped_mass",
    ]


def test_the_plan_counts_lists_and_one_product() -> None:
    shape = ("qwen3_omni_30b_a3b_thinker", "--nodes", "2")
    exact, sparse = job_of(parsed(*shape)), job_of(parsed(*shape, "--sparse-gradient"))
    assert sparse == replace(exact, has_sparse_gradient=True)
    for precision, dtype in ((Precision.SHARDED, torch.bfloat16), (Precision.FP32, torch.float32)):
        work = HeadWork(8192, 1024, 152_064, 2048, precision, is_sparse=True)
        load = Workload(Operator.POLICY_LOSS, 8192, 152_064, 2048, dtype, is_sparse=True)
        planned = memory_plan(load, Backend.TRITON)
        assert planned.list_bytes > 0
        assert loss_bytes(Head.OURS, work, Backend.TRITON) == planned.peak_bytes
        plain = work._replace(is_sparse=False)
        for head in (Head.NAIVE, Head.LIGER):
            both = {loss_bytes(head, one, Backend.TRITON) for one in (work, plain)}
            assert len(both) == 1
        scorings = {scoring_bytes(Head.OURS, one, Backend.TRITON) for one in (work, plain)}
        assert len(scorings) == 1  # scoring has no gradient
    name = "update: forward and backward passes"
    (before,), (after,) = (
        [one for one in step_time(job).stages if one.name == name] for job in (exact, sparse)
    )
    assert after.of(Head.OURS) <= before.of(Head.OURS)
    assert after.of(Head.NAIVE) == before.of(Head.NAIVE)
    assert "sparse gradients of lm_head" in plan_text(sparse)
    assert "sparse" not in plan_text(exact, explains=True)


def test_the_plan_of_one_process_counts_the_lists(student: SpeechLM, tmp_path: Path) -> None:
    student.model.config.save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path)).with_vocabulary(50_000)
    plans = [
        planned_cpu_step(shape, UpdateBatch(8, 64, 1, has_sparse_gradient=is_sparse), backend)
        for backend in (Backend.REFERENCE, Backend.NATIVE)
        for is_sparse in (False, True)
    ]
    assert plans[0].at_head_bytes != plans[1].at_head_bytes
    assert plans[2].at_head_bytes != plans[3].at_head_bytes


def test_a_run_resumes_to_the_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    """And another bound is another run."""
    sparse = (*STATEFUL, "loss.max_gradient_error=0.2")
    whole = train(make_config(tmp_path / "whole", *sparse))
    assert all(0 < line["gradient_error"] <= 0.2 for line in read_jsonl(whole / "metrics.jsonl"))
    config = make_config(tmp_path / "cut", *sparse)
    cut(whole, config, done=2)
    assert fingerprint(train(config)) == fingerprint(whole)
    with pytest.raises(RunError, match=r"loss\.max_gradient_error"):
        train(make_config(whole, *STATEFUL, "loss.max_gradient_error=0.1"))
