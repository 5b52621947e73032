"""compat.trl against TRL's kernels (their torch path on a CPU) and the dense formulas."""

import math

import pytest
import torch
from torch.nn import functional

from xopd_kernels.compat.trl import ChunkedDivergenceFunction, ChunkedLogProbFunction
from xopd_kernels.testing import Distribution, dense_logprob, make_head, make_inputs

DTYPES = [torch.float32, torch.bfloat16]
SHAPE = (24, 53, 16)
TEMPERATURE, SOFTCAP, SCALE = 0.7, 4.0, 0.8
CHUNK_SIZE = 20


@pytest.fixture
def trl_class(request):
    """A class of trl.kernels; None: the plain formula alone."""
    if request.param is None:
        return None
    module = pytest.importorskip(
        f"trl.kernels.{request.param[0]}",
        reason="TRL is not installed; pip install trl",
        exc_type=ImportError,
    )
    return getattr(module, request.param[1])


def peers(module, name):
    return pytest.mark.parametrize(
        "trl_class", [(module, name), None], ids=["trl", "formula"], indirect=True
    )


@peers("chunked_logprob", "ChunkedLogProbFunction")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [(), ("entropy",)], ids=["logprob", "entropy"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, SOFTCAP])
def test_log_probs(check_face, trl_class, dtype, outputs, has_bias, softcap):
    inputs = make_inputs(*SHAPE, dtype, Distribution.PEAKED)
    target = inputs.target.clamp(min=0)

    def call(function):
        def rows(hidden, weight, bias=None):
            return function.apply(
                hidden, weight, bias, target, TEMPERATURE, CHUNK_SIZE, softcap, SCALE, outputs
            )

        return rows

    def dense(hidden, weight, bias=None):
        head = make_head(inputs, False, TEMPERATURE, softcap, SCALE)
        row = dense_logprob(hidden, head._replace(weight=weight, bias=bias), target)
        return row.logprob, row.entropy if outputs else None

    check_face(
        call(ChunkedLogProbFunction),
        None if trl_class is None else call(trl_class),
        dense,
        inputs[: 2 + has_bias],
    )
    assert len(call(ChunkedLogProbFunction)(*inputs[:2])) == 5


def divergence_leaves(dtype):
    """Student hidden, weight, bias (leaves) and a constant teacher of another width."""
    student = make_inputs(*SHAPE, dtype, seed=1)
    teacher = make_inputs(SHAPE[0], SHAPE[1], 24, dtype, Distribution.PEAKED, seed=2)
    return (*student[:3], *(x.detach() for x in teacher[:3]))


def dense_divergence(beta):
    def log_p(hidden, weight, bias, scale, softcap):
        logits = functional.linear(hidden, weight, bias)
        logits = scale * (logits if logits.dtype == torch.float64 else logits.float())
        return (softcap * (logits / softcap).tanh() / TEMPERATURE).log_softmax(-1)

    def rows(*leaves):
        student = log_p(*leaves[:3], SCALE, SOFTCAP)
        teacher = log_p(*leaves[3:], 1.1, 6.0)
        if beta == 0:
            divergence = teacher.exp() * (teacher - student)
        elif beta == 1:
            divergence = student.exp() * (student - teacher)
        else:
            mixture = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
            divergence = beta * teacher.exp() * (teacher - mixture)
            divergence = divergence + (1 - beta) * student.exp() * (student - mixture)
        entropy = -(student.exp() * student).sum(-1)
        return divergence.sum(-1), entropy.detach()

    return rows


@peers("chunked_divergence", "ChunkedDivergenceFunction")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_divergence(check_face, trl_class, dtype, beta):
    def call(function):
        def rows(*leaves):
            return function.apply(*leaves, beta, TEMPERATURE, SCALE, SOFTCAP, 1.1, 6.0)

        return rows

    check_face(
        call(ChunkedDivergenceFunction),
        None if trl_class is None else call(trl_class),
        dense_divergence(beta),
        divergence_leaves(dtype),
    )


def test_the_statistics_that_are_missing_are_refused_by_name():
    inputs = make_inputs(*SHAPE, torch.float32)
    arguments = (inputs.hidden, inputs.weight, None, inputs.target, 1.0, CHUNK_SIZE)
    with pytest.raises(NotImplementedError, match=r"^outputs = .*log_sum_sq_probs.*is_top1"):
        ChunkedLogProbFunction.apply(*arguments)
    with pytest.raises(NotImplementedError, match=r"^outputs = \('is_top1',\)"):
        ChunkedLogProbFunction.apply(*arguments, None, 1.0, ("entropy", "is_top1"))


def test_an_ignored_target_gives_zero_and_no_gradient():
    inputs = make_inputs(*SHAPE, torch.float32)
    is_ignored = inputs.target == -100
    assert is_ignored.any()
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.target, 1.0, CHUNK_SIZE, outputs=("entropy",)
    )
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), inputs[:1])
    assert not logprob[is_ignored].any()
    assert not gradient[is_ignored].any()
    assert logprob[~is_ignored].all()


def test_heads_of_two_sizes_are_refused():
    student = make_inputs(*SHAPE, torch.float32)
    with pytest.raises(ValueError, match="must have one V, got 53 and 50"):
        ChunkedDivergenceFunction.apply(
            *student[:2], None, student.hidden, student.weight[:50], None, 0.5
        )
