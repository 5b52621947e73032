"""compat.liger's GRPO loss against Liger-Kernel's chunked loss and the dense formula."""

import pytest
import torch

from xopd_kernels.compat.liger import LigerFusedLinearGRPOLoss
from xopd_kernels.testing import make_inputs

DTYPES = [torch.float32, torch.bfloat16]
BATCH, TIME, VOCAB, DIM = 4, 9, 53, 16
TEMPERATURE = 0.7

CASES = {
    "surrogate": {"beta": 0.0},
    "clip": {"beta": 0.0, "epsilon_low": 0.05, "epsilon_high": 0.3},
    "grpo": {"beta": 0.0, "loss_type": "grpo"},
    "bnpo": {"beta": 0.0, "loss_type": "bnpo"},
    "dr_grpo": {"beta": 0.0, "loss_type": "dr_grpo", "max_completion_length": 11},
    "kl": {},
    "kl_grpo": {"beta": 0.3, "loss_type": "grpo"},
    "kl_corrected": {"beta": 0.3, "use_bias_correction_kl": True},
    "delta": {"beta": 0.0, "delta": 1.1},
    "sequence": {"beta": 0.0, "importance_sampling_level": "sequence", "epsilon_low": 0.02},
    "sequence_kl": {"beta": 0.1, "importance_sampling_level": "sequence", "loss_type": "grpo"},
}


def make_case(dtype):
    """Leaves hidden [B, T, D], weight, bias; the call's other tensors by name."""
    inputs = make_inputs(BATCH * TIME, VOCAB, DIM, dtype)
    rng = torch.Generator().manual_seed(3)
    target = inputs.target.clamp(min=0).view(BATCH, TIME)
    hidden = inputs.hidden.detach().view(BATCH, TIME, DIM).requires_grad_()
    mask = (torch.rand(BATCH, TIME, generator=rng) < 0.8).long()
    mask[2] = 0  # a sequence without a token
    with torch.no_grad():
        now = logprob(hidden.double(), inputs.weight.double(), None, target)
    old, ref = (now + 0.3 * torch.randn(now.shape, generator=rng).double() for _ in range(2))
    return (hidden, inputs.weight, inputs.bias), {
        "selected_token_ids": target,
        "attention_mask": mask,
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.3]),
        "old_per_token_logps": old.float(),
        "ref_per_token_logps": ref.float(),
    }


def logprob(hidden, weight, bias, target):
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    return log_p.gather(-1, target[..., None]).squeeze(-1)


def call(module, tensors):
    def loss(hidden, weight, bias=None):
        return module(hidden, weight, bias=bias, **tensors)

    return loss


def dense(options, tensors):
    """The formula of the loss, one line for each term."""
    beta, level = options.get("beta", 0.04), options.get("importance_sampling_level", "token")
    low, high = 1 - options.get("epsilon_low", 0.2), 1 + options.get("epsilon_high", 0.2)

    def loss(hidden, weight, bias=None):
        now = logprob(hidden, weight, bias, tensors["selected_token_ids"])
        mask = tensors["attention_mask"].to(now)
        advantage = tensors["advantages"].to(now)[:, None]
        old = tensors.get("old_per_token_logps")
        log_ratio = now - (now.detach() if old is None else old.to(now))
        if level == "sequence":
            count = mask.sum(-1, keepdim=True).clamp(min=1)
            log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / count
        ratio = log_ratio.exp()
        capped = ratio.clamp(max=options.get("delta") or torch.inf)
        per_token = -torch.minimum(capped * advantage, ratio.clamp(low, high) * advantage)
        clipped = torch.where(advantage > 0, ratio > high, ratio < low).to(now)
        per_token = per_token * tensors.get("vllm_is_ratio", torch.tensor(1.0)).to(now)
        metrics = [(clipped * mask).sum() / mask.sum().clamp(min=1)]
        if beta:
            delta = tensors["ref_per_token_logps"].to(now) - now
            kl = delta.exp() - delta - 1
            kl = kl * ratio if options.get("use_bias_correction_kl") else kl
            per_token = per_token + beta * kl
            metrics = [(kl * mask).sum().detach() / mask.sum().clamp(min=1), *metrics]
        kind = options.get("loss_type", "dapo")
        if kind == "grpo":
            rows = (per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)
            return rows.mean(), metrics
        norm = {
            "bnpo": mask.sum().clamp(min=1),
            "dr_grpo": len(mask) * options.get("max_completion_length", 0),
            "dapo": tensors.get("num_items_in_batch", mask.sum().clamp(min=1)),
        }[kind]
        return (per_token * mask).sum() / norm, metrics

    return loss


@pytest.fixture(params=["liger", "formula"])
def peer(request):
    """Liger's class; None: the plain formula alone."""
    if request.param == "formula":
        return None
    return pytest.importorskip(
        "liger_kernel.chunked_loss",
        reason="Liger-Kernel is not installed; pip install liger-kernel",
        exc_type=ImportError,
    ).LigerFusedLinearGRPOLoss


def check_case(check_face, peer, options, tensors, leaves):
    options = options | {"temperature": TEMPERATURE}
    check_face(
        call(LigerFusedLinearGRPOLoss(**options), tensors),
        None if peer is None else call(peer(compiled=False, **options), tensors),
        dense(options, tensors),
        leaves,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_liger(check_face, peer, dtype, options, has_bias):
    leaves, tensors = make_case(dtype)
    check_case(check_face, peer, options, tensors, leaves[: 2 + has_bias])


@pytest.mark.parametrize("options", [{"beta": 0.0}, {}], ids=["surrogate", "kl"])
@pytest.mark.parametrize("columns", [None, 1, TIME])
def test_rollout_ratio_and_normaliser(check_face, peer, options, columns):
    leaves, tensors = make_case(torch.float32)
    shape = (BATCH,) if columns is None else (BATCH, columns)
    ratio = torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.5
    extra = {"vllm_is_ratio": ratio, "num_items_in_batch": 40}
    expanded = ratio[:, None] if columns is None else ratio
    options = options | {"temperature": TEMPERATURE}
    check_face(
        call(LigerFusedLinearGRPOLoss(**options), tensors | extra),
        None if peer is None else call(peer(compiled=False, **options), tensors | extra),
        dense(options, tensors | extra | {"vllm_is_ratio": expanded}),
        leaves[:2],
    )


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"use_ref_model": False}])
def test_on_policy(check_face, peer, options):
    """No old log-probs: the ratio is 1 and the gradient that of REINFORCE; no reference: no KL."""
    leaves, tensors = make_case(torch.float32)
    del tensors["old_per_token_logps"]
    options = options | {"temperature": TEMPERATURE}
    ours = LigerFusedLinearGRPOLoss(**options)
    theirs = None if peer is None else call(peer(compiled=False, **options), tensors)

    def formula(*leaves):
        loss, metrics = dense(options | {"beta": 0.0}, tensors)(*leaves)
        zero = [torch.zeros_like(loss.detach())] if "beta" not in options else []
        return loss, [*zero, *metrics]

    check_face(call(ours, tensors), theirs, formula, leaves[:2])


def test_reference_model_in_place_of_its_log_probs():
    leaves, tensors = make_case(torch.float32)
    reference, _ = make_case(torch.float32)
    hidden, weight = reference[0].detach() * 1.1, reference[1].detach()
    ref = logprob(hidden, weight, None, tensors["selected_token_ids"])
    module = LigerFusedLinearGRPOLoss(temperature=TEMPERATURE)
    expected, _ = call(module, tensors | {"ref_per_token_logps": ref})(*leaves[:2])
    model = {"ref_per_token_logps": None, "ref_input": hidden, "ref_weight": weight}
    actual, _ = call(module, tensors | model)(*leaves[:2])
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="needs ref_per_token_logps"):
        call(module, tensors | {"ref_per_token_logps": None})(*leaves[:2])


@pytest.mark.parametrize("options", [{"beta": 0.0}, {}], ids=["surrogate", "kl"])
def test_padding_may_hold_anything(options):
    """Ids and log-probs under a mask of 0 are never read, not even infinite ones."""
    leaves, tensors = make_case(torch.float32)
    module = LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, **options)
    expected, _ = call(module, tensors)(*leaves[:2])
    is_padding = tensors["attention_mask"] == 0
    for name, fill in (
        ("selected_token_ids", -100),
        ("old_per_token_logps", -torch.inf),
        ("ref_per_token_logps", torch.nan),
    ):
        tensors[name] = tensors[name].masked_fill(is_padding, fill)
    actual, _ = call(module, tensors)(*leaves[:2])
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual, leaves[:1])
    assert gradient.isfinite().all()
    assert not gradient[is_padding].any()


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_what_is_not_supported_is_refused_by_name(loss_type):
    with pytest.raises(NotImplementedError, match=rf"^loss_type = '{loss_type}' is not supported"):
        LigerFusedLinearGRPOLoss(loss_type=loss_type)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level must be"),
        ({"delta": 0.0}, "delta must be"),
        ({"loss_type": "dr_grpo"}, "max_completion_length must be"),
    ],
)
def test_wrong_options_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_mask", (BATCH, 1)),
        ("advantages", (BATCH, TIME)),
        ("old_per_token_logps", (1, TIME)),
        ("ref_per_token_logps", (BATCH, 1)),
        ("vllm_is_ratio", (1, TIME)),
        ("selected_token_ids", (BATCH, TIME, 1)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(name, shape):
    leaves, tensors = make_case(torch.float32)
    wrong = torch.ones(shape, dtype=tensors.get(name, torch.ones(())).dtype)
    with pytest.raises(ValueError, match=rf"^{name} must"):
        call(LigerFusedLinearGRPOLoss(), tensors | {name: wrong})(*leaves[:2])
