"""The faces take the arguments of their peers: same names, order and defaults."""

import inspect

import pytest
from torch.nn import functional

from xopd_kernels.compat import liger, torch_nn, trl, verl

LIGER_CLASSES = {
    "LigerFusedLinearCrossEntropyLoss": "liger_kernel.transformers.fused_linear_cross_entropy",
    "LigerFusedLinearJSD": "liger_kernel.transformers.fused_linear_jsd",
    "LigerFusedLinearJSDLoss": "liger_kernel.chunked_loss",
    "LigerFusedLinearGRPOLoss": "liger_kernel.chunked_loss",
}
TRL_CLASSES = {
    "ChunkedLogProbFunction": "trl.kernels.chunked_logprob",
    "ChunkedDivergenceFunction": "trl.kernels.chunked_divergence",
}


def parameters(function, dropped=("self", "ctx")):
    """(name, kind, default) of each parameter."""
    every = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in every if p.name not in dropped]


def test_torch():
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy came with torch 2.13")
    ours = parameters(torch_nn.linear_cross_entropy)
    assert ours == parameters(functional.linear_cross_entropy)


@pytest.mark.parametrize(("name", "module"), LIGER_CLASSES.items(), ids=LIGER_CLASSES)
def test_liger(name, module):
    reason = "Liger-Kernel is not installed; pip install liger-kernel"
    peer = getattr(pytest.importorskip(module, reason=reason, exc_type=ImportError), name)
    ours = getattr(liger, name)
    assert parameters(ours.__init__) == parameters(peer.__init__)
    assert parameters(ours.forward) == parameters(peer.forward)


@pytest.mark.parametrize(("name", "module"), TRL_CLASSES.items(), ids=TRL_CLASSES)
def test_trl(name, module):
    reason = "TRL is not installed; pip install trl"
    peer = getattr(pytest.importorskip(module, reason=reason, exc_type=ImportError), name)
    assert parameters(getattr(trl, name).apply) == parameters(peer.forward)


def test_verl(verl_module):
    peer = verl_module("utils/experimental/torch_functional.py").FusedLinearForPPO
    assert parameters(verl.FusedLinearForPPO.__init__) == parameters(peer.__init__)
    assert parameters(verl.FusedLinearForPPO.forward) == parameters(peer.forward)
    function = verl_module("utils/kernel/linear_cross_entropy.py").LinearCrossEntropy.forward
    assert parameters(verl.linear_cross_entropy) == parameters(function)
