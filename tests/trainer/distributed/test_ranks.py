"""Two and four ranks on gloo against one process: the same numbers, the same files after a cut.

Each of the ranks holds a shard of every weight, of student and teacher alike (FSDP2).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from xopd.config import Config, dump_config
from xopd.metrics import read_jsonl
from xopd.models import load_student

pytestmark = pytest.mark.distributed

MakeConfig = Callable[..., Config]
Launch = Callable[[int, list[dict[str, str]]], None]
STEPS = 5
# 16 rollouts a step. micro_batch of 2 or 4 ranks for one pass, and for four of them.
PASSES = {2: {1: 8, 4: 2}, 4: {1: 4, 4: 1}}
BATCH = ("rollout.prompts_per_step=4", "rollout.rollouts_per_prompt=2", f"train.steps={STEPS}")
# Adam divides by |g| + eps: an element whose gradient is nothing but rounding moves by the whole
# learning rate in a direction that the order of a sum decides. Not with this eps. And nothing is
# clipped: that would hide a wrong factor.
SMOOTH = (*BATCH, "optim.eps=1e-3", "optim.max_grad_norm=1000000")
RELATIVE_ERROR = 1e-6  # of the L2 norm of a tensor, fp32
TIMINGS = (
    *("sync_s", "rollout_s", "teacher_s", "update_s"),
    *("tokens_per_s", "tflop_s", "peak_memory_gb"),
)


def written(folder: Path, config: Config) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config_of_job.yaml"
    path.write_text(dump_config(config))
    return str(path)


def traced(out: Path) -> list[dict[str, Tensor]]:
    return [load_file(out / f"step_{step}.safetensors") for step in range(STEPS)]


class Case(NamedTuple):
    """How the ranks share a step."""

    passes: int
    is_balanced: bool = True
    recomputes: bool = False
    rate: str = "1e-3"
    is_served: bool = False  # the teacher: by a server, or by the ranks
    has_local_head: bool = False  # lm_head: each rank with its own classes, or gathered
    is_lossy: bool = False  # the served teacher leaves some rows without a score
    minibatches: int = 1

    @property
    def name(self) -> str:
        return "_".join(map(str, self))

    def overrides(self, ranks: int) -> list[str]:
        return [
            *SMOOTH,
            f"train.micro_batch={PASSES[ranks][self.passes]}",
            f"sharding.balance_tokens={str(self.is_balanced).lower()}",
            f"sharding.checkpoint_activations={str(self.recomputes).lower()}",
            f"optim.learning_rate={self.rate}",
            f"sharding.vocab_parallel_head={str(self.has_local_head).lower()}",
            f"loss.minibatches={self.minibatches}",
        ]


# At rate 0 all gradients are at the same weights: what differs is the order of sums alone.
# What the steps of one process depend on: learning rate, teacher, its losses, minibatches.
Kind = tuple[str, bool, bool, int]
KINDS: list[Kind] = [
    (rate, is_served, False, 1) for rate in ("1e-3", "0.0") for is_served in (False, True)
]
KINDS += [("1e-3", True, True, 1), ("1e-3", True, True, 2)]
CASES = [Case(passes, balanced, rate="0.0") for passes in (1, 4) for balanced in (True, False)]
CASES += [Case(1), Case(4, is_balanced=False), Case(1, recomputes=True)]
CASES += [Case(1, rate="0.0", is_served=True), Case(4, is_served=True)]
CASES += [Case(1, rate="0.0", has_local_head=True), Case(4, has_local_head=True)]
CASES += [Case(4, is_served=True, is_lossy=True)]
CASES += [Case(1, is_served=True, is_lossy=True, has_local_head=True, minibatches=2)]


@pytest.fixture(scope="module")
def single(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: MakeConfig,
    launch: Launch,
    served: tuple[str, ...],
    lossy: tuple[str, ...],
) -> dict[Kind, list[dict[str, Tensor]]]:
    """The steps of one process in one pass of each minibatch."""
    root, jobs = tmp_path_factory.mktemp("single"), []
    for kind in KINDS:
        rate, is_served, is_lossy, minibatches = kind
        out = root / "_".join(map(str, kind))
        overrides = [*SMOOTH, "train.micro_batch=16", f"optim.learning_rate={rate}"]
        overrides += [f"loss.minibatches={minibatches}"]
        overrides += [*(served if is_served else ()), *(lossy if is_lossy else ())]
        config = make_config(out / "run", *overrides)
        jobs.append({"kind": "trace", "config": written(out, config), "out": str(out)})
    launch(0, jobs)
    return {kind: traced(root / "_".join(map(str, kind))) for kind in KINDS}


@pytest.fixture(scope="module", params=[2, 4], ids=["ranks2", "ranks4"])
def on_ranks(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_config: MakeConfig,
    launch: Launch,
    served: tuple[str, ...],
    lossy: tuple[str, ...],
) -> Path:
    """Every case on that many ranks, one launch for all."""
    ranks = request.param
    root, jobs = tmp_path_factory.mktemp(f"ranks{ranks}"), []
    for case in CASES:
        out = root / case.name
        overrides = [*case.overrides(ranks), *(served if case.is_served else ())]
        overrides += lossy if case.is_lossy else ()
        config = written(out, make_config(out / "run", *overrides))
        jobs.append({"kind": "trace", "config": config, "out": str(out)})
    launch(ranks, jobs)
    return root


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ranks_equal_one_process(
    single: dict[Kind, list[dict[str, Tensor]]], on_ranks: Path, case: Case
) -> None:
    """Loss and parameters of all steps; at rate 0 every gradient tensor as well."""
    worst: dict[str, float] = {}
    expected_steps = single[case.rate, case.is_served, case.is_lossy, case.minibatches]
    for one, many in zip(expected_steps, traced(on_ranks / case.name), strict=True):
        assert one.keys() == many.keys()
        for name, expected in one.items():
            kind = name.partition(".")[0]
            error = (many[name].double() - expected.double()).norm() / expected.double().norm()
            worst[kind] = max(worst.get(kind, 0.0), float(error))
    print(f"{case.name}: largest relative L2 error over {STEPS} steps: {worst}")
    if float(case.rate) > 0:
        # Gradients at weights that differ by 1e-8: those that cancel, of k_norm, differ by more.
        del worst["gradient"]
    assert max(worst.values()) <= RELATIVE_ERROR, worst


def test_a_served_teacher_teaches_as_a_local_one(
    single: dict[Kind, list[dict[str, Tensor]]],
) -> None:
    near, far = single["1e-3", False, False, 1], single["1e-3", True, False, 1]
    for one, two in zip(near, far, strict=True):
        for name, expected in one.items():
            if name.startswith("parameter."):
                assert (two[name] - expected).norm() <= 1e-5 * expected.norm(), name
    # And rows were lost where they should be, or the lossy cases would say nothing.
    (loss, less) = (single["1e-3", True, lossy, 1][0]["loss"] for lossy in (False, True))
    assert abs(float(loss - less)) > 1e-3 * abs(float(loss))


def test_rollouts_ahead_on_ranks_are_those_of_one_process(
    make_config: MakeConfig, launch: Launch, tmp_path: Path
) -> None:
    """An engine beside the trainer, whose backend is on the first rank alone."""
    settings = (*BATCH, "rollout.engine=vllm", "rollout.max_staleness=1", "data.eval_limit=1")
    runs = []
    for ranks in (0, 2):
        run = tmp_path / f"on_{ranks}"
        config = written(tmp_path / f"c{ranks}", make_config(run, *settings, "optim.eps=1e-3"))
        launch(ranks, [{"kind": "engine", "config": config, "out": str(tmp_path / "sampled")}])
        runs.append(read_jsonl(run / "metrics.jsonl"))
    for one, two in zip(*runs, strict=True):
        assert one["staleness"] == two["staleness"] == min(one["step"], 1)
        assert one["tokens"] == two["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def fingerprint(run: Path) -> dict[str, object]:
    metrics = [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_jsonl(run / "metrics.jsonl")
    ]
    return {
        "student": hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": metrics,
        "samples": (run / "samples.jsonl").read_text(),
        "after": json.loads((run / "eval" / "after.json").read_text()),
    }


def cut(run: Path, copy: Path, step: int) -> None:
    """A copy of a finished run, as if it had been killed after the checkpoint of that step."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    shutil.rmtree(copy / "student")
    (copy / "eval" / "after.json").unlink()


LONG = (
    *("rollout.prompts_per_step=3", "rollout.rollouts_per_prompt=2", "train.steps=10"),
    *("loss.minibatches=2", "loss.center_advantage=true", "train.micro_batch=2"),
    *("train.checkpoint_every=1", "train.keep_checkpoints=99", "data.eval_limit=1"),
    *("rollout.max_new_tokens=6", "optim.eps=1e-3"),
)


def test_resume_at_every_cut_equals_the_uninterrupted_run(
    make_config: MakeConfig, launch: Launch, tmp_path: Path
) -> None:
    whole_run = tmp_path / "whole"
    job = {"kind": "train", "out": str(tmp_path / "sampled")}
    launch(2, [job | {"config": written(tmp_path / "c", make_config(whole_run, *LONG))}])
    jobs = []
    for step in range(10):
        run = tmp_path / f"cut{step}"
        cut(whole_run, run, step)
        config = make_config(run, *LONG)
        (run / "config.yaml").write_text(dump_config(config))
        jobs.append(job | {"config": written(tmp_path / f"c{step}", config)})
    launch(2, jobs)
    expected = fingerprint(whole_run)
    for step in range(10):
        assert fingerprint(tmp_path / f"cut{step}") == expected, f"cut after step {step}"


@pytest.mark.parametrize(
    ("before", "after"), [(2, 4), (4, 2), (2, 0), (0, 4)], ids=lambda ranks: f"ranks{ranks}"
)
def test_resume_with_another_number_of_ranks_keeps_the_samples(
    make_config: MakeConfig, launch: Launch, tmp_path: Path, before: int, after: int
) -> None:
    """Six steps on `before` ranks, cut after the third, the rest on `after`; 0: no torchrun."""

    def samples(name: str) -> Counter[str]:
        return Counter((tmp_path / name).read_text().splitlines())

    settings = (*LONG, "train.steps=6")
    first, second = tmp_path / "first", tmp_path / "second"
    config = written(tmp_path / "a", make_config(first, *settings))
    launch(before, [{"kind": "train", "config": config, "out": str(tmp_path / "all")}])
    cut(first, second, 3)
    resumed = make_config(second, *settings)
    (second / "config.yaml").write_text(dump_config(resumed))
    config = written(tmp_path / "b", resumed)
    launch(after, [{"kind": "train", "config": config, "out": str(tmp_path / "rest")}])
    everything, rest = samples("all"), samples("rest")
    assert everything.total() == 6 * 12
    assert rest.total() == 3 * 12
    assert rest <= everything
    steps = [line["step"] for line in read_jsonl(second / "metrics.jsonl")]
    assert steps == list(range(6))
    # The exported students agree as closely as fp32 sums in another order let them.
    one, two = (load_student(str(run / "student")).model.state_dict() for run in (first, second))
    for name, parameter in one.items():
        assert (parameter - two[name]).norm() <= RELATIVE_ERROR * parameter.norm(), name


def test_shards_are_shards(make_config: MakeConfig, launch: Launch, tmp_path: Path) -> None:
    """Each of 2 ranks writes its half of every trained weight and both moments."""
    config = make_config(tmp_path / "run", *BATCH, "train.steps=1")
    job = {"kind": "train", "config": written(tmp_path, config), "out": str(tmp_path / "s")}
    launch(2, [job])
    files = sorted((tmp_path / "run" / "checkpoints" / "step_000001").glob("*.safetensors"))
    assert len(files) == 2
    sizes = [sum(t.numel() for t in load_file(file).values()) for file in files]
    student = load_student(str(tmp_path / "run" / "student"))
    student.freeze_all_but_language_model()
    total = 3 * sum(p.numel() for p in student.trainable().values())
    assert sum(sizes) == total
    assert max(sizes) <= 0.51 * total
    assert all(torch.isfinite(p).all() for p in student.trainable().values())


def test_bf16_on_ranks_trains(make_config: MakeConfig, launch: Launch, tmp_path: Path) -> None:
    """Layers are gathered in bf16 (also the audio tower), master weights stay fp32 shards."""
    overrides = (*BATCH, "train.steps=2", "model.dtype=bf16", "data.eval_limit=1")
    config = make_config(tmp_path / "run", *overrides)
    launch(2, [{"kind": "train", "config": written(tmp_path, config), "out": str(tmp_path / "s")}])
    before = load_student(config.model.student)
    after = load_student(str(tmp_path / "run" / "student"))
    for lm in before, after:
        lm.freeze_all_but_language_model()
    trained = after.trainable()
    for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert line["skipped_updates"] == 0
        assert line["grad_norm"] > 0
    for name, parameter in before.model.named_parameters():
        moved = not torch.equal(parameter, dict(after.model.named_parameters())[name])
        # A row of lm_head or of the embedding that no token touched stays; no tensor does.
        assert moved == (name in trained), name
        assert dict(after.model.named_parameters())[name].dtype is torch.float32


def test_a_rank_without_rows_makes_the_passes_of_the_others(
    make_config: MakeConfig, launch: Launch, tmp_path: Path
) -> None:
    """One spoken trajectory for two ranks, and none in writing."""
    overrides = (
        *("rollout.prompts_per_step=1", "rollout.rollouts_per_prompt=1", "train.steps=1"),
        *("data.eval_limit=1", "train.micro_batch=1", "loss.text_weight=0"),
    )
    losses = []
    for ranks in (0, 2):
        out = tmp_path / f"on_{ranks}"
        config = written(out, make_config(out / "run", *overrides))
        launch(ranks, [{"kind": "train", "config": config, "out": str(out / "sampled")}])
        losses.append(read_jsonl(out / "run" / "metrics.jsonl")[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=RELATIVE_ERROR)
