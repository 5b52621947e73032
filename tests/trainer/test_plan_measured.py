"""The plan's memory against the kernels' own, and what is measured: activations, a whole step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from xopd.doctor import eager_logit_bytes
from xopd.head import Head as LmHead
from xopd.head import fused_head
from xopd.loss import policy_loss, step_sizes
from xopd.models import SpeechLM
from xopd.plan import UpdateBatch, model_shape, planned_cpu_step, shape_of
from xopd.plan.activations import Precision, kept_bytes
from xopd.plan.losses import Head, HeadWork, loss_bytes, scoring_bytes
from xopd.sections import LossConfig
from xopd.types import Modality, Prompt, Rollout
from xopd_kernels import (
    Backend,
    Operator,
    PolicyLoss,
    Workload,
    linear_policy_loss,
    memory_plan,
)

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


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


def dense_model() -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        rope_parameters=ROPE,
    )
    return Qwen3ForCausalLM(config)


def expert_model() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=320,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        rope_parameters=ROPE,
    )
    return Qwen3MoeForCausalLM(config)


def saved_bytes(model: PreTrainedModel, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that a forward pass saves; neither weights nor casts of them.

    A cast of a weight has the weight's number of elements, which no activation of the test has.
    """
    weights = {parameter.numel() for parameter in model.parameters() if parameter.numel() > 2048}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        if not isinstance(tensor, torch.nn.Parameter) and elements not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("build", [dense_model, expert_model])
@pytest.mark.parametrize("precision", list(Precision))
def test_activations_are_those_that_autograd_saves(
    build: Callable[[], PreTrainedModel], precision: Precision
) -> None:
    model = build()
    rows, width = 3, 77
    embedded = torch.randn(rows, width, 128)
    if precision is Precision.SHARDED:  # FSDP2 hands the layers bf16 weights and inputs
        model, embedded = model.to(torch.bfloat16), embedded.to(torch.bfloat16)
    embedded.requires_grad_()
    is_cast = precision is Precision.AUTOCAST
    context = torch.autocast("cpu", torch.bfloat16) if is_cast else nullcontext()
    with context:
        measured = saved_bytes(model, lambda: model(inputs_embeds=embedded, use_cache=False).logits)
    shape = shape_of(model, "model")
    planned = kept_bytes(shape, precision, rows * width, checkpoints_activations=False)
    assert planned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("build", [dense_model, expert_model])
def test_a_step_needs_what_was_planned(
    build: Callable[[], PreTrainedModel], passes: int, checkpoints: bool
) -> None:
    """An update of a small model: the profiler's peak beside weights and moments, within 10 %."""
    torch.manual_seed(0)
    rows, width = 8, 160
    model = build().train()
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(2048, (rows, width))

    def update() -> None:
        for _ in range(passes):
            one_pass(model, ids)
        optimizer.step()

    update()  # makes the moments
    optimizer.zero_grad(set_to_none=True)
    measured = peak_bytes(update)
    batch = UpdateBatch(rows, width, passes, checkpoints_activations=checkpoints)
    planned = planned_cpu_step(shape_of(model, "model"), batch, Backend.REFERENCE)
    assert planned.transient_bytes == pytest.approx(measured, rel=0.1)


def test_the_trainers_own_update_needs_what_was_planned(new_student: SpeechLM) -> None:
    """As above through `policy_loss`: the demo's student, two micro-batches, default kernels."""
    rows, prompt, response = 32, 30, 25
    ids = tuple(range(12, 12 + prompt))
    batch = [
        Rollout(
            Prompt("", "", ids, ids, torch.zeros(0, 128), "", ""),
            Modality.TEXT,
            ids[:response],
            is_finished=True,
            teacher_logprob=torch.full((response,), -4.0),
        )
        for _ in range(rows)
    ]
    parameters = list(new_student.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def update() -> None:
        for _ in range(2):
            loss, _ = policy_loss(
                new_student,
                batch,
                step_sizes(batch),
                LossConfig(),
                temperature=1.0,
                backend="auto",
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    new_student.model.train()
    update()
    optimizer.zero_grad(set_to_none=True)
    shape = shape_of(new_student.model, "student")
    planned = planned_cpu_step(shape, UpdateBatch(rows, prompt + response, 2), Backend.NATIVE)
    assert planned.transient_bytes == pytest.approx(peak_bytes(update), rel=0.1)


ROWS, WIDTH, CLASSES, DIM = 3, 300, 12_000, 64


@pytest.mark.parametrize("precision", [Precision.SHARDED, Precision.FP32])
def test_the_other_columns_are_counted_as_they_run(precision: Precision) -> None:
    """Naive logits, and Liger's loss where it is installed: the profiler's peak, within 10 %."""
    dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
    hidden = torch.randn(ROWS, WIDTH, DIM).to(dtype).requires_grad_()
    weight = torch.randn(CLASSES, DIM).to(dtype).requires_grad_()
    target = torch.randint(CLASSES, (ROWS, WIDTH))
    work = HeadWork(ROWS * WIDTH, WIDTH, CLASSES, DIM, precision)

    def logprob() -> Tensor:
        logits = (hidden @ weight.t()).float()
        logprob: Tensor = logits.log_softmax(-1).gather(-1, target[..., None])
        if logprob.requires_grad:
            torch.autograd.grad(logprob.mean(), (hidden, weight))
        return logprob

    planned = loss_bytes(Head.NAIVE, work, Backend.REFERENCE)
    assert planned == pytest.approx(peak_bytes(logprob), rel=0.1)
    with torch.no_grad():
        measured = peak_bytes(logprob)
    assert scoring_bytes(Head.NAIVE, work, Backend.REFERENCE) == pytest.approx(measured, rel=0.1)

    liger = pytest.importorskip("liger_kernel.chunked_loss")
    loss = liger.LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)

    def run() -> None:
        value, _ = loss(hidden, weight, target, torch.ones(ROWS, WIDTH), torch.ones(ROWS))
        torch.autograd.grad(value, (hidden, weight))

    planned = loss_bytes(Head.LIGER, work, Backend.REFERENCE)
    assert planned == pytest.approx(peak_bytes(run), rel=0.1)


def one_pass(model: PreTrainedModel, ids: Tensor) -> None:
    """Forward and backward of the fused loss, as the trainer runs it."""
    embedded = model.get_input_embeddings()(ids)
    weights = torch.full(ids.shape, 1.0 / ids.numel())

    def op(hidden: Tensor, head: LmHead, values: Sequence[Tensor]) -> PolicyLoss:
        return linear_policy_loss(
            hidden,
            head.weight,
            ids,
            teacher_logprob=torch.full(ids.shape, -4.0),
            token_weight=weights,
            backend=Backend.REFERENCE,
        )

    with fused_head(model, op):
        model(inputs_embeds=embedded, use_cache=False).logits.loss.backward()


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` has allocated at a time, as torch's profiler sees it."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest
