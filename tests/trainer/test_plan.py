"""`xopd plan`: counts by hand, a cluster, and that the document shows what is printed."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

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
from xopd.plan.activations import Precision, forward_bytes
from xopd.plan.cli import add_plan_parser, job_of
from xopd.plan.losses import HeadWork, scoring_bytes
from xopd.plan.memory import Line
from xopd.plan.table import LEFT_OUT
from xopd.plan.timing import layer_flops
from xopd_kernels import Backend

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


def line(lines: Iterable[Line], name: str) -> float:
    """The value of a line whose columns do not differ."""
    (found,) = (one for one in lines if one.name == name)
    assert len(set(found.values)) == 1
    return found.values[0]


def stays(job: Job) -> float:
    return sum(one.values[0] for one in rank_memory(job).resident)


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


def test_another_vocabulary(thinker: ModelShape) -> None:
    larger = thinker.with_vocabulary(200_064)
    assert larger.trained_parameters - thinker.trained_parameters == 2 * 48_000 * 2048
    assert larger.decoder_parameters == thinker.decoder_parameters
    assert larger.with_vocabulary(152_064) == thinker


def test_more_tokens_touch_more_experts(thinker: ModelShape) -> None:
    one, many = thinker.touched_parameters(1), thinker.touched_parameters(4096)
    assert one == pytest.approx(thinker.active_parameters)
    assert many == pytest.approx(thinker.trained_parameters)


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


def test_what_stays_is_twelve_bytes_a_parameter_and_an_update_adds_four(job: Job) -> None:
    memory = rank_memory(job)
    resident = [one.values[0] for one in memory.resident]
    trained = job.student.trained_parameters
    assert sum(resident[:2]) == 12 * trained / 8
    assert resident[2] == 4 * job.student.frozen_parameters / 8
    assert resident[3] == 2 * trained / 8
    assert resident[4] == 4096 * 420 * 2048 * 4
    assert line(memory.parts, "gradients, fp32") == 4 * trained / 8


def test_gradients_are_there_in_the_update_alone(job: Job) -> None:
    """They are let go behind each update: sampling and scoring do not have them beside them."""
    base, gradients = stays(job), 4 * job.student.trained_parameters / 8
    server = replace(job, rollout_place=RolloutPlace.SERVER)
    assert line(rank_memory(server).stages, "rollouts") == base
    for fused, roots in ((True, 0.0), (False, gradients)):
        planned = rank_memory(replace(job, is_adam_fused=fused)).stages
        assert line(planned, "AdamW") == pytest.approx(base + gradients + roots)
    one_pass = replace(job, micro_batch=job.rank_rows)
    at_head = "update, at lm_head"
    for candidate, earlier in ((job, gradients), (one_pass, 0.0)):
        memory = rank_memory(candidate)
        (peak,) = (one for one in memory.stages if one.name == at_head)
        kept = line(memory.parts, "activations kept")
        (loss,) = (one for one in memory.parts if one.name == "loss at lm_head")
        shape = job.student
        gathered = shape.layer_parameters + shape.frozen_root_parameters + shape.head_parameters
        for head in Head:
            expected = base + earlier + kept + 2 * gathered + loss.of(head)
            assert peak.of(head) == pytest.approx(expected)


def test_lm_head_is_gathered_for_itself_alone(job: Job) -> None:
    """From its forward to its backward pass: a larger one changes nothing of a layer's pass."""
    shape = job.student
    larger = shape.with_vocabulary(200_064)
    assert larger.head_parameters < shape.layer_parameters
    beside = []
    for student in (shape, larger):
        changed = replace(job, student=student)
        memory = rank_memory(changed)
        parts = memory.parts
        assert line(parts, "lm_head, bf16") == 2 * student.head_parameters
        assert line(parts, "root: towers, bf16") == 2 * student.frozen_root_parameters
        # 2 P_l, and the fp32 buffer of the unit before: never one of lm_head and a layer.
        unreduced = line(parts, "gradients before they are reduced")
        assert unreduced == 6 * student.layer_parameters
        peak = line(memory.stages, "update, backward pass of a layer")
        beside.append(peak - stays(changed) - line(parts, "gradients, fp32"))
    assert beside[0] == pytest.approx(beside[1])


def test_a_head_larger_than_a_layer_waits_in_the_buffer(job: Job) -> None:
    huge = job.student.with_vocabulary(500_000)
    parts = rank_memory(replace(job, student=huge)).parts
    expected = 2 * huge.layer_parameters + 4 * huge.head_parameters
    assert line(parts, "gradients before they are reduced") == expected


def test_a_tied_head_is_the_embedding_and_stays_for_the_pass(job: Job) -> None:
    shape = replace(job.student, is_tied=True)
    parts = rank_memory(replace(job, student=shape)).parts
    root = 2 * (shape.frozen_root_parameters + shape.head_parameters)
    assert line(parts, "lm_head, bf16") == 0
    assert line(parts, "root: towers, bf16") == root
    unreduced = 6 * shape.layer_parameters + 2 * shape.head_parameters
    assert line(parts, "gradients before they are reduced") == unreduced


def test_scoring_has_lm_head_behind_its_first_pass(job: Job) -> None:
    """Without a backward pass it stays gathered, so the layers of later passes have it beside."""
    shape = job.student
    for micro_batch, is_later in ((8, True), (job.rank_rows, False)):
        changed = replace(job, micro_batch=micro_batch)
        tokens = changed.pass_tokens
        work = HeadWork(tokens, job.width_tokens, shape.vocabulary, 2048, Precision.SHARDED)
        fixed = stays(job) + 2 * (2 * shape.layer_parameters + shape.frozen_root_parameters)
        fixed += 2 * tokens * 2048
        head_bytes = 2 * shape.head_parameters
        layer = forward_bytes(shape, Precision.SHARDED, tokens) + head_bytes * is_later
        (peak,) = (one for one in rank_memory(changed).stages if one.name == "old log-probs")
        for head in Head:
            at_head = head_bytes + scoring_bytes(head, work, Backend.TRITON)
            assert peak.of(head) == pytest.approx(fixed + max(layer, at_head))
    # Small passes wait for the weights: all of them each time, of lm_head only the first.
    gather = job.cluster.gather_s
    expected = 32 * gather(2 * shape.trained_parameters) - 31 * gather(2 * shape.head_parameters)
    assert line(step_time(job).stages, "old log-probs") == pytest.approx(expected)


def test_offloading_moves_it_to_the_host(job: Job) -> None:
    offloaded = replace(job, offloads=True)
    kept, moved = rank_memory(job), rank_memory(offloaded)
    assert [one.values[0] for one in moved.resident[:4]] == [0.0] * 4
    assert line(moved.parts, "gradients, fp32") == 0.0
    assert moved.resident[4] == kept.resident[4]
    shards = sum(one.values[0] for one in kept.resident[:4])
    shards += line(kept.parts, "gradients, fp32")
    assert moved.host.values[0] - kept.host.values[0] == pytest.approx(8 * shards)
    for head in Head:
        assert moved.peak_bytes(head) < kept.peak_bytes(head)


def test_the_host_holds_a_checkpoint_and_the_engines_folder(job: Job) -> None:
    trained = job.student.trained_parameters
    four = replace(job, cluster=replace(job.cluster, nodes=4))
    server = replace(job, rollout_place=RolloutPlace.SERVER)
    assert rank_memory(job).host.values == (14 * trained,) * 3
    assert rank_memory(four).host.values == (12 * trained / 4 + 2 * trained,) * 3
    assert rank_memory(server).host.values == (12 * trained,) * 3
    assert "| host memory of a node | 427.46 | 427.46 | 427.46 |" in plan_text(job)


def test_a_checkpoint_is_copied_wherever_it_comes_from(job: Job) -> None:
    """Over the link of each rank, or, offloaded, read and written in host memory."""
    bytes_ = 12 * job.student.trained_parameters
    name = "checkpoint: copy to the host"
    assert line(step_time(job).background, name) == pytest.approx(bytes_ / 8 / (0.7 * 64e9))
    offloaded = step_time(replace(job, offloads=True)).background
    assert line(offloaded, name) == pytest.approx(2 * bytes_ / 300e9)
    two = replace(job, offloads=True, cluster=replace(job.cluster, nodes=2))
    assert line(step_time(two).background, name) == pytest.approx(bytes_ / 300e9)


@pytest.mark.parametrize(("gpus", "parts"), [(1, 1), (2, 2), (8, 4)])
def test_one_engine_decodes_every_row(job: Job, gpus: int, parts: int) -> None:
    """2048 rows, 256 at a time, 512 tokens each: 4096 steps of one engine, however many ranks."""
    shape = job.student
    given = replace(job, engine_gpus=gpus)
    layers = layer_flops(shape, 260) / gpus / (0.4 * 989.5e12)
    cache = 256 * (260 + 256) * 2 * shape.cache_elements_per_token / parts  # 4 heads with keys
    step_s = (2 * shape.touched_parameters(256) / gpus + cache) / (0.7 * 3350e9)
    expected = 256 * (420 + 100) * layers + 4096 * step_s
    for nodes in (1, 4):
        changed = replace(given, cluster=replace(job.cluster, nodes=nodes))
        assert line(step_time(changed).stages, "rollouts") == pytest.approx(expected)
        peak = line(rank_memory(changed).stages, "rollouts") - stays(changed)
        rows = 256 * 1444 * 2 * shape.cache_elements_per_token
        assert peak == pytest.approx(2 * shape.trained_parameters / gpus + rows / parts)
    server = replace(given, rollout_place=RolloutPlace.SERVER, server_gpus=gpus, engine_gpus=3)
    assert line(step_time(server).stages, "rollouts") == pytest.approx(expected)


def test_the_engine_reads_its_weights_from_memory(job: Job) -> None:
    """Gathered in fp32, sent to the host in bf16, written to a folder there and read again."""
    trained = job.student.trained_parameters
    ring = job.cluster.gather_s(4 * trained)
    folder = 2 * 2 * trained / 300e9
    planned = line(step_time(job).stages, "weight sync")
    assert planned == pytest.approx(ring + 2 * trained / (0.7 * 64e9) + folder)
    # In host memory all 8 ranks of the node gather their own copy of each tensor.
    planned = line(step_time(replace(job, offloads=True)).stages, "weight sync")
    assert planned == pytest.approx(8 * 4 * trained / 300e9 + folder)
    server = replace(job, rollout_place=RolloutPlace.SERVER)
    planned = line(step_time(server).stages, "weight sync")
    assert planned == pytest.approx(2 * trained / (0.7 * 50e9))


def test_a_server_takes_the_teacher_away(job: Job) -> None:
    elsewhere = replace(job, teacher_place=TeacherPlace.SERVER)
    names = [one.name for one in rank_memory(elsewhere).stages]
    assert "teacher's log-probs" not in names
    assert rank_memory(elsewhere).resident[3].values == (0.0, 0.0, 0.0)


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
    fast = step_time(replace(job, engine_gpus=8)).stages[0]  # generate samples on all 8 too
    gathered = job.cluster.gather_s(2 * job.student.trained_parameters)
    assert slow.values[0] > job.response_tokens * gathered
    assert fast.values[0] < slow.values[0] / 10


def test_one_rank_shards_nothing(student: SpeechLM) -> None:
    shape = shape_of(student.model, "student")
    alone = Job(shape, shape.text_only(), Cluster(GPUS["l40s"], gpus_per_node=1), engine_gpus=1)
    parts = {one.name: one.values[0] for one in rank_memory(alone).parts}
    assert parts["gathered layers, bf16"] == 0
    assert parts["lm_head, bf16"] == 0
    assert parts["gradients before they are reduced"] == 0
    assert step_time(alone).step_s(Head.OURS) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"mean_response_tokens": 2000}, "mean_response_tokens 2000 is above response_tokens"),
        ({"engine_gpus": 9}, "engine_gpus 9 is above the 8 GPUs of a node"),
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
    assert "rollouts by one engine on 2 GPUs of the first machine" in text
    assert text.startswith("**Arithmetic, not a measurement.**")
    assert LEFT_OUT in text
    assert "Symbols" not in text
    for head in Head:
        assert head.value in text


def test_explain_has_a_formula_for_every_line(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, PRESET, "--explain")
    memory, time = rank_memory(job), step_time(job)
    lines = (*memory.resident, *memory.parts, *memory.stages, *time.stages, *time.background)
    for one in (*lines, memory.host):
        assert f"\n- {one.name}: {one.formula}\n" in text
        assert f"{one.name} |" in text
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
