"""compat.liger's cross-entropy and JSD against Liger-Kernel and the dense formulas.

Liger's chunked losses run anywhere; its Triton ones on a CUDA device, or in Triton's interpreter
(TRITON_INTERPRET=1), which has neither their tanh nor a faithful bf16.
"""

import math

import pytest
import torch
from torch.nn import functional

from xopd_kernels.compat.liger import (
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearJSD,
    LigerFusedLinearJSDLoss,
)
from xopd_kernels.testing import Distribution, make_inputs

pytestmark = [  # of Triton's interpreter: classes beyond the last one, and Triton 3.6 under numpy 2
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DTYPES = [torch.float32, torch.bfloat16]
SHAPE = (37, 53, 16)
NO_LIGER = "Liger-Kernel is not installed; pip install liger-kernel"
TRITON_MARKS = [pytest.mark.interpret, pytest.mark.gpu]
HAS_TRITON_PEER = pytest.mark.parametrize(
    "has_peer", [pytest.param(True, marks=TRITON_MARKS), False], ids=["liger", "formula"]
)
HAS_PEER = pytest.mark.parametrize("has_peer", [True, False], ids=["liger", "formula"])


def liger(folder, name):
    module = pytest.importorskip(f"liger_kernel.{folder}", reason=NO_LIGER, exc_type=ImportError)
    return getattr(module, name)


def triton_liger(name, dtype, softcap=None):
    """A class of Liger's that is a Triton kernel; skips where it cannot run."""
    if not torch.cuda.is_available():
        triton = pytest.importorskip("triton", exc_type=ImportError)
        if not triton.knobs.runtime.interpret:
            pytest.skip(f"Liger's {name} is Triton: it needs a CUDA device or TRITON_INTERPRET=1")
        if dtype != torch.float32 or softcap is not None:
            pytest.skip(f"Liger's {name} in Triton's interpreter: fp32 without softcap only")
    return liger("transformers", name)


def dense_cross_entropy(target, reduction="mean", softcap=None):
    def loss(weight, hidden, bias=None):
        logits = functional.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        total = functional.cross_entropy(logits, target, reduction="none")
        if reduction == "none":
            return total
        count = (target != -100).sum().clamp(min=1) if reduction == "mean" else 1
        return total.sum() / count

    return loss


def peer_device(has_peer):
    return "cuda" if has_peer and torch.cuda.is_available() else "cpu"


@HAS_TRITON_PEER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_cross_entropy(check_face, has_peer, dtype, reduction, options, has_bias):
    name = "LigerFusedLinearCrossEntropyLoss"
    peer = triton_liger(name, dtype, **options) if has_peer else None
    inputs = make_inputs(*SHAPE, dtype, device=peer_device(has_peer))
    target = inputs.target
    assert (target == -100).any()

    def call(module):
        return lambda weight, hidden, bias=None: module(weight, hidden, target, bias)

    check_face(
        call(LigerFusedLinearCrossEntropyLoss(reduction=reduction, **options)),
        None if peer is None else call(peer(reduction=reduction, **options)),
        dense_cross_entropy(target, reduction, **options),
        (inputs.weight, inputs.hidden, inputs.bias)[: 2 + has_bias],
    )


def test_cross_entropy_over_zero_tokens_is_zero():
    inputs = make_inputs(*SHAPE, torch.float32)
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=3)(
        inputs.weight, inputs.hidden, torch.full((37,), 3)
    )
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, inputs[:2]))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"ce_weight": torch.ones(53)}, "ce_weight"),
        ({"lse_square_scale": 1e-4}, "lse_square_scale"),
        ({"return_z_loss": True}, "return_z_loss"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"use_token_scaling": True}, "use_token_scaling"),
        ({"return_token_accuracy": True}, "return_token_accuracy"),
        ({"return_predicted_tokens": True}, "return_predicted_tokens"),
        ({"accum_dtype": torch.bfloat16}, "accum_dtype"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, name):
    with pytest.raises(NotImplementedError, match=rf"^{name} = .* is not supported; "):
        LigerFusedLinearCrossEntropyLoss(**options)
    if name == "accum_dtype":
        with pytest.raises(NotImplementedError, match=r"^accum_dtype"):
            LigerFusedLinearJSD(**options)
        LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be"):
        LigerFusedLinearCrossEntropyLoss(reduction="average")


def jsd_leaves(dtype, device="cpu"):
    """Student hidden, weight, bias (leaves) and a constant teacher of another width; labels."""
    student = make_inputs(*SHAPE, dtype, seed=1, device=device)
    teacher = make_inputs(SHAPE[0], SHAPE[1], 24, dtype, Distribution.PEAKED, seed=2, device=device)
    return student[:3], tuple(x.detach() for x in teacher[:3]), student.target


def dense_jsd(student, teacher, beta, labels):
    """Mean over the labels that count of the divergence of two rows of logits."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        divergence = teacher.exp() * (teacher - student)
    elif beta == 1:
        divergence = student.exp() * (student - teacher)
    else:
        mixture = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
        divergence = beta * teacher.exp() * (teacher - mixture)
        divergence = divergence + (1 - beta) * student.exp() * (student - mixture)
    is_live = torch.ones_like(student[:, 0]) if labels is None else labels != -100
    return (divergence.sum(-1) * is_live).sum() / is_live.sum()


def wide(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


@HAS_TRITON_PEER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("has_labels", [False, True])
def test_jsd(check_face, has_peer, dtype, beta, has_labels):
    peer = triton_liger("LigerFusedLinearJSD", dtype)(beta, -100, 0.7) if has_peer else None
    student, teacher, target = jsd_leaves(dtype, peer_device(has_peer))
    labels = target if has_labels else None

    def call(module):
        return lambda *leaves: module(*leaves, labels)

    def dense(hidden, weight, teacher_hidden, teacher_weight):
        return dense_jsd(
            wide(hidden @ weight.t()) / 0.7,
            wide(teacher_hidden @ teacher_weight.t()) / 0.7,
            beta,
            labels,
        )

    check_face(
        call(LigerFusedLinearJSD(beta, -100, 0.7)),
        None if peer is None else call(peer),
        dense,
        (*student[:2], *teacher[:2]),
    )


@HAS_PEER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("weights", [(0.3, 0.7, False), (0.0, 1.0, False), (0.0, 1.0, True)])
def test_jsd_loss(check_face, has_peer, dtype, beta, has_bias, weights):
    hard_weight, soft_weight, is_split = weights
    options = {
        "weight_hard_loss": hard_weight,
        "weight_soft_loss": soft_weight,
        "beta": beta,
        "temperature": 0.7,
        "compiled": False,
        "chunk_size": 10,
        "return_soft_hard_loss": is_split,
    }
    peer = liger("chunked_loss", "LigerFusedLinearJSDLoss")(**options) if has_peer else None
    student, teacher, labels = jsd_leaves(dtype)

    def call(module):
        def loss(*leaves):
            hidden, weight, t_hidden, t_weight, *biases = leaves
            return module(hidden, weight, t_hidden, t_weight, labels, *biases)

        return loss

    def dense(hidden, weight, t_hidden, t_weight, bias=None, t_bias=None):
        logits = wide(functional.linear(hidden, weight, bias))
        t_logits = wide(functional.linear(t_hidden, t_weight, t_bias))
        soft = dense_jsd(logits / 0.7, t_logits / 0.7, beta, labels)
        hard = functional.cross_entropy(logits, labels)
        loss = hard_weight * hard + soft_weight * soft
        return (loss, soft.detach(), hard.detach()) if is_split else loss

    leaves = (*student[:2], *teacher[:2])
    if has_bias:
        leaves = (*leaves, student[2], teacher[2])
    check_face(
        call(LigerFusedLinearJSDLoss(**options)),
        None if peer is None else call(peer),
        dense,
        leaves,
    )


@pytest.mark.parametrize("loss", [LigerFusedLinearJSD(), LigerFusedLinearJSDLoss()])
def test_jsd_edges(loss):
    student, teacher, _ = jsd_leaves(torch.float32)
    nothing = torch.full((37,), -100)
    value = loss(*student[:2], *teacher[:2], nothing)
    assert value.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(value, student[:2]))
    with pytest.raises(ValueError, match="must have one V, got 53 and 50"):
        loss(*student[:2], teacher[0], teacher[1][:50], nothing)
