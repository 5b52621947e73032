"""`xopd plan`: counts by hand, a cluster, and that the document shows what is printed."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xopd.doctor import eager_logit_bytes
from xopd.models import SpeechLM
from xopd.plan import (
    GPUS,
    Cluster,
    Head,
    Job,
    ModelShape,
    PlanError,
    RolloutPlace,
    TeacherPlace,
    fits,
    largest_micro_batch,
    model_shape,
    plan_text,
    rank_memory,
    shape_of,
    step_time,
)
from xopd.plan.activations import Precision
from xopd.plan.cli import add_plan_parser, job_of
from xopd.plan.losses import HeadWork, loss_bytes, scoring_bytes
from xopd.plan.table import LEFT_OUT
from xopd_kernels import Backend, Operator, Workload, memory_plan

PRESET = "qwen3_omni_30b_a3b_thinker"


@pytest.fixture(scope="module")
def thinker() -> ModelShape:
    return model_shape(PRESET)


@pytest.fixture(scope="module")
def job(thinker: ModelShape) -> Job:
    return Job(thinker, thinker.text_only(), Cluster(GPUS["h100"]), recomputes_old=True)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_plan_parser(parser.add_subparsers())
    return parser.parse_args(["plan", *arguments])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    args = parsed(*arguments)
    assert args.run(args) == 0
    return capsys.readouterr().out


# Counts


def test_the_preset_has_the_published_sizes(thinker: ModelShape) -> None:
    """30.5 B parameters of which 3.3 B are active: summed by hand from the architecture."""
    attention = 2048 * 4096 * 2 + 2048 * 512 * 2 + 2 * 128
    expert = 3 * 2048 * 768
    layer = attention + 2 * 2048 + 128 * 2048 + 128 * expert
    ends = 2 * 152_064 * 2048
    assert thinker.layer_parameters == layer
    assert thinker.trained_parameters == 48 * layer + 2048 + ends
    assert thinker.active_parameters == 48 * (layer - 120 * expert) + 2048 + ends
    assert thinker.parameters == thinker.trained_parameters + thinker.frozen_parameters
    assert round(thinker.trained_parameters / 1e9, 1) == 30.5
    assert thinker.cache_elements_per_token == 2 * 48 * 4 * 128
    # 32 layers of 1280 and 27 of 1152 in the towers.
    assert 1.0e9 < thinker.frozen_parameters < 1.5e9
    assert thinker.frozen_root_parameters < thinker.frozen_parameters


def test_a_student_is_counted_as_it_is(student: SpeechLM) -> None:
    shape = shape_of(student.model, "student")
    trained = sum(p.numel() for p in student.trainable().values())
    assert shape.trained_parameters == trained
    assert shape.parameters == sum(p.numel() for p in student.model.parameters())
    assert shape.experts == 0
    assert shape.active_parameters == trained
    assert shape.touched_parameters(1) == trained


def test_a_folder_gives_what_the_model_gives(student: SpeechLM, tmp_path: Path) -> None:
    student.model.config.save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)) == shape_of(student.model, str(tmp_path))


def test_another_vocabulary(thinker: ModelShape) -> None:
    larger = thinker.with_vocabulary(200_064)
    assert larger.trained_parameters - thinker.trained_parameters == 2 * 48_000 * 2048
    assert larger.decoder_parameters == thinker.decoder_parameters
    assert larger.with_vocabulary(152_064) == thinker


def test_more_tokens_touch_more_experts(thinker: ModelShape) -> None:
    one, many = thinker.touched_parameters(1), thinker.touched_parameters(4096)
    assert one == pytest.approx(thinker.active_parameters)
    assert many == pytest.approx(thinker.trained_parameters)


# lm_head


def head_work(precision: Precision = Precision.SHARDED) -> HeadWork:
    return HeadWork(8192, 1024, 152_064, 2048, precision)


def test_naive_logits_are_those_of_the_doctor() -> None:
    work = head_work()
    expected = eager_logit_bytes(8192, 152_064) + work.gradient_bytes
    assert loss_bytes(Head.NAIVE, work, Backend.TRITON) == expected


@pytest.mark.parametrize(
    ("precision", "dtype"), [(Precision.SHARDED, torch.bfloat16), (Precision.FP32, torch.float32)]
)
def test_ours_is_the_plan_of_the_kernels(precision: Precision, dtype: torch.dtype) -> None:
    work = head_work(precision)
    planned = memory_plan(
        Workload(Operator.POLICY_LOSS, 8192, 152_064, 2048, dtype), Backend.TRITON
    )
    assert loss_bytes(Head.OURS, work, Backend.TRITON) == planned.peak_bytes
    assert scoring_bytes(Head.OURS, work, Backend.TRITON) < planned.peak_bytes


def test_chunks_need_less_than_logits_and_do_not_grow_with_the_tokens() -> None:
    work = head_work()
    double = work._replace(tokens=2 * work.tokens)
    grown = {
        head: loss_bytes(head, double, Backend.TRITON) - loss_bytes(head, work, Backend.TRITON)
        for head in Head
    }
    sizes = [loss_bytes(head, work, Backend.TRITON) for head in Head]
    assert sizes[0] > sizes[1] > sizes[2]
    # What grows: d_hidden and some floats a token.
    assert grown[Head.OURS] < 8192 * (2 * 2048 + 200)
    assert grown[Head.LIGER] == 8192 * 2 * 2 * 2048
    assert grown[Head.NAIVE] == 8192 * (16 * 152_064 + 2 * 2048)


# A cluster


def test_a_ring_gathers_what_a_rank_lacks() -> None:
    node = Cluster(GPUS["h100"], link_share=1.0)
    assert node.gather_s(8e9) == pytest.approx(7e9 / 450e9)
    nodes = Cluster(GPUS["h100"], nodes=4, link_share=1.0)
    assert nodes.bus_bytes_per_s == 8 * 50e9
    assert nodes.gather_s(32e9) == pytest.approx(31e9 / 400e9)
    assert Cluster(GPUS["h100"], gpus_per_node=1).gather_s(1e9) == 0.0


def test_every_gpu_names_its_source() -> None:
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert "data sheet" in gpu.source
        assert gpu.bf16_flops > gpu.fp32_flops
        assert gpu.link_bytes_per_s >= gpu.network_bytes_per_s


def test_what_stays_is_sixteen_bytes_a_parameter(job: Job) -> None:
    stays = [line.values[0] for line in rank_memory(job).resident]
    trained = job.student.trained_parameters
    assert sum(stays[:3]) == 16 * trained / 8
    assert stays[3] == 4 * job.student.frozen_parameters / 8
    assert stays[4] == 2 * trained / 8
    assert stays[5] == 4096 * 420 * 2048 * 4


def test_offloading_moves_it_to_the_host(job: Job) -> None:
    offloaded = replace(job, offloads=True)
    kept, moved = rank_memory(job), rank_memory(offloaded)
    assert [line.values[0] for line in moved.resident[:5]] == [0.0] * 5
    assert moved.resident[5] == kept.resident[5]
    assert moved.host_node_bytes == 8 * sum(line.values[0] for line in kept.resident[:5])
    for head in Head:
        assert moved.peak_bytes(head) < kept.peak_bytes(head)


def test_a_server_takes_the_teacher_away(job: Job) -> None:
    elsewhere = replace(job, teacher_place=TeacherPlace.SERVER)
    names = [line.name for line in rank_memory(elsewhere).stages]
    assert "teacher's log-probs" not in names
    assert rank_memory(elsewhere).resident[4].values == (0.0, 0.0, 0.0)


def test_more_ranks_need_less_each(job: Job) -> None:
    more = replace(job, cluster=replace(job.cluster, nodes=4))
    for head in Head:
        assert rank_memory(more).peak_bytes(head) < rank_memory(job).peak_bytes(head)
        assert step_time(more).step_s(head) < step_time(job).step_s(head)


def test_the_largest_micro_batch_is_the_largest(job: Job) -> None:
    offloaded = replace(job, offloads=True)
    for head in Head:
        most = largest_micro_batch(offloaded, head)
        assert 0 < most < offloaded.rank_rows
        assert fits(replace(offloaded, micro_batch=most), head)
        assert not fits(replace(offloaded, micro_batch=most + 1), head)
    assert largest_micro_batch(offloaded, Head.OURS) > largest_micro_batch(offloaded, Head.NAIVE)


def test_generate_gathers_the_student_for_every_token(job: Job) -> None:
    slow = step_time(replace(job, rollout_place=RolloutPlace.GENERATE)).stages[0]
    fast = step_time(job).stages[0]
    gathered = job.cluster.gather_s(2 * job.student.trained_parameters)
    assert slow.values[0] > job.response_tokens * gathered
    assert fast.values[0] < slow.values[0] / 10


def test_one_rank_shards_nothing(student: SpeechLM) -> None:
    shape = shape_of(student.model, "student")
    alone = Job(shape, shape.text_only(), Cluster(GPUS["l40s"], gpus_per_node=1), engine_gpus=1)
    parts = {line.name: line.values[0] for line in rank_memory(alone).parts}
    assert parts["gathered layers, bf16"] == 0
    assert parts["gradients before they are reduced"] == 0
    assert step_time(alone).step_s(Head.OURS) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"mean_response_tokens": 2000}, "mean_response_tokens 2000 is above response_tokens"),
        ({"engine_gpus": 3}, "engine_gpus 3 does not divide the 8 GPUs that sample"),
    ],
)
def test_a_job_that_cannot_be_is_named(job: Job, change: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        replace(job, **change)


def test_a_cluster_that_cannot_be_is_named(job: Job) -> None:
    with pytest.raises(PlanError, match="nodes must be at least 1"):
        Cluster(GPUS["h100"], nodes=0)
    with pytest.raises(PlanError, match="compute_share is a share"):
        Cluster(GPUS["h100"], compute_share=1.5)
    with pytest.raises(PlanError, match="more than one rank"):
        replace(job, cluster=Cluster(GPUS["h100"], gpus_per_node=1), engine_gpus=1, offloads=True)


# The command


def test_a_model_that_is_none_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"presets?: {PRESET}"):
        model_shape(str(tmp_path / "absent"))


def test_every_figure_of_a_gpu_can_be_overridden() -> None:
    args = parsed(PRESET, "--gpu", "l40s", "--gpu-memory-gb", "96", "--link-gbs", "100")
    gpu = job_of(args).cluster.gpu
    assert (gpu.memory_bytes, gpu.link_bytes_per_s) == (96e9, 100e9)
    assert gpu.memory_bytes_per_s == GPUS["l40s"].memory_bytes_per_s
    assert gpu.source.endswith("changed by --gpu-memory-gb, --link-gbs")


def test_the_plan_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, PRESET)
    assert text.startswith("**Arithmetic, not a measurement.**")
    assert LEFT_OUT in text
    assert "Symbols" not in text
    for head in Head:
        assert head.value in text


def test_explain_has_a_formula_for_every_line(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, PRESET, "--explain")
    memory, time = rank_memory(job), step_time(job)
    lines = (*memory.resident, *memory.parts, *memory.stages, *time.stages, *time.background)
    for line in lines:
        assert f"\n- {line.name}: {line.formula}\n" in text
        assert f"{line.name} |" in text
    assert plan_text(job, explains=True) == text


def commands(text: str) -> Iterator[tuple[list[str], str]]:
    """Each `xopd plan` of a document, and the text behind it."""
    for match in re.finditer(r"^```sh\nxopd plan (.*)\n```\n", text, flags=re.M):
        yield shlex.split(match[1]), text[match.end() :]


def test_the_tables_of_the_document_are_printed_by_the_command(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list(commands((repository / "docs/scale.md").read_text(encoding="utf-8")))
    assert len(found) == 2
    for arguments, behind in found:
        assert behind.strip().startswith(printed(capsys, *arguments).strip()), arguments
