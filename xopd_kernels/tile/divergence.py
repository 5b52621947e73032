"""The row kernels of the divergences: two rows of logits in, the divergence and its gradient out.

p is the student, q the teacher, m the mixture (1 - beta) p + beta q. Log-probs are taken as
(z - maximum) - log(total): z - lse would lose the digits that lse loses by rounding where it is
far from 0. One program a row; sums run over blocks of classes in a fixed order.
"""

import triton
import triton.language as tl

from xopd_kernels import records
from xopd_kernels.tile.dot import narrow, one_minus_exp, tanh, tanh_slope
from xopd_kernels.tile.online_softmax import fold_tile

TAIL_FLOOR = tl.constexpr(records.TAIL_FLOOR)
FORWARD = tl.constexpr(0)  # KL(q || p), beta = 0
REVERSE = tl.constexpr(1)  # KL(p || q), beta = 1
MIXED = tl.constexpr(2)  # beta KL(q || m) + (1 - beta) KL(p || m)


def kind_of(beta: float) -> int:
    """FORWARD, REVERSE or MIXED: the constant that a kernel is compiled for."""
    if beta == 0.0:
        return int(FORWARD.value)
    return int(REVERSE.value if beta == 1.0 else MIXED.value)


@triton.jit
def capped(x, cap):
    """The logit of x, the stored output of the head times its scale."""
    if cap is not None:
        x = tanh(x) * cap
    return x


@triton.jit
def softmax_of(z, maximum, total):
    """(p, log p) of the logits z under softmax statistics."""
    shifted = z - maximum
    return tl.exp(shifted) * (1.0 / total), shifted - tl.log(total)


@triton.jit
def log1p_of_minus(y, one_minus_y):
    """log(1 - y) for y in [0, 1]; 2 atanh(y / (2 - y)) as a series near 0, where it cancels."""
    t = y / (2.0 - y)
    s = t * t
    series = -2.0 * t * (1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9)))))
    return tl.where(y < 0.3, series, tl.log(one_minus_y))


@triton.jit
def mixture(p, q, log_p, log_q, beta, KIND: tl.constexpr):
    """(log(m / p), log(m / q), m); m is p for FORWARD, q for REVERSE.

    From the log-ratio of p and q: the difference of log m and log p loses small ratios.
    """
    # NaN where neither has mass: whatever reads it asks first whether p or q is 0.
    ratio = log_q - log_p
    if KIND == FORWARD:
        return tl.zeros_like(ratio), -ratio, p
    elif KIND == REVERSE:
        return ratio, tl.zeros_like(ratio), q
    else:
        # m is the larger of p and q times 1 - y, with y <= the share of the smaller one.
        p_is_larger = ratio <= 0
        share = tl.where(p_is_larger, beta, 1.0 - beta)
        rest = tl.where(p_is_larger, 1.0 - beta, beta)
        gap = -tl.abs(ratio)
        log_m = log1p_of_minus(share * one_minus_exp(gap), rest + share * tl.exp(gap))
        over_p = tl.where(p_is_larger, log_m, log_m + ratio)
        over_q = tl.where(p_is_larger, log_m - ratio, log_m)
        return over_p, over_q, (1.0 - beta) * p + beta * q


@triton.jit
def kl_term(a, r, b, IS_OPEN: tl.constexpr):
    """A class's part of KL(a || b), with r = log(b / a).

    a (e^r - 1 - r) >= 0: the sum of -a r cancels where b is close to a, and this one differs from
    it by sum b - sum a = 0. IS_OPEN: -a r, for classes that do not sum to 1.
    """
    if IS_OPEN:
        return tl.where(a == 0, 0.0, -a * r)
    else:
        # e^r - 1 - r = r^2 (1/2! + r/3! + r^2/4! + ...); 12 terms for |r| < 1.
        tail = 1 + r / 9 * (1 + r / 10 * (1 + r / 11 * (1 + r / 12 * (1 + r / 13))))
        tail = 1 + r / 5 * (1 + r / 6 * (1 + r / 7 * (1 + r / 8 * tail)))
        near = a * (r * r) * 0.5 * (1 + r / 3 * (1 + r / 4 * tail))
        far = b - a - a * r
        # 0 * inf would be NaN where a class has no mass in a.
        return tl.where(a == 0, b, tl.where(tl.abs(r) < 1, near, far))


@triton.jit
def kl_terms(p, q, log_p, log_q, beta, KIND: tl.constexpr, IS_OPEN: tl.constexpr):
    """(part of KL(p || m), part of KL(q || m), log(m / p)) of each class."""
    over_p, over_q, m = mixture(p, q, log_p, log_q, beta, KIND)
    of_p = tl.zeros_like(p)
    of_q = tl.zeros_like(p)
    if KIND != FORWARD:
        of_p = kl_term(p, over_p, m, IS_OPEN)
    if KIND != REVERSE:
        of_q = kl_term(q, over_q, m, IS_OPEN)
    return of_p, of_q, over_p


@triton.jit
def weighted(of_p, of_q, beta, KIND: tl.constexpr):
    """The divergence from KL(p || m) and KL(q || m)."""
    if KIND == FORWARD:
        return of_q
    elif KIND == REVERSE:
        return of_p
    else:
        return beta * of_q + (1.0 - beta) * of_p


@triton.jit
def load_logits(logits_ptr, row, col, V, cap):
    """(x, logit) of a block of a row's classes; the logit is -inf beyond V."""
    x = tl.load(logits_ptr + row * V + col, mask=col < V, other=0.0)
    return x, tl.where(col < V, capped(x, cap), float("-inf"))


@triton.jit
def store_gradient(gradient_ptr, row, stride, col, is_col, d_logit, x, slope, cap):
    """Write d(loss)/d(linear output) from d(loss)/d(logit) and x, in the dtype of the GEMM."""
    chain = slope
    if cap is not None:
        chain = slope * tanh_slope(x)
    gradient = narrow(d_logit * chain, gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + row * stride + col, gradient, mask=is_col)


@triton.jit
def divergence_kernel(
    logits_ptr,
    teacher_logits_ptr,
    gradient_ptr,
    live_ptr,
    weight_ptr,
    maximum_ptr,
    total_ptr,
    teacher_maximum_ptr,
    teacher_total_ptr,
    divergence_ptr,
    V,
    stride_g,
    slope,
    cap,
    teacher_cap,
    beta,
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """divergence [rows] = weight * D of the two rows of logits [rows, V]; their gradient in place.

    gradient_ptr is the memory of the student's logits, in the dtype of the GEMM, or None. A
    narrower gradient ends before the logits that are still to be read; the barriers keep a
    block's store behind its loads. The gradient of the forward KL is w (p - q) and needs one
    pass, that of the others, w (1 - beta) p (log(p / m) - KL(p || m)), a second one.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    if row >= tl.load(live_ptr):
        return
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    total = tl.load(total_ptr + row)
    teacher_maximum = tl.load(teacher_maximum_ptr + row)
    teacher_total = tl.load(teacher_total_ptr + row)
    of_p = tl.zeros((BLOCK_V,), tl.float32)
    of_q = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, V, BLOCK_V):
        col = first + tl.arange(0, BLOCK_V)
        x, z = load_logits(logits_ptr, row, col, V, cap)
        _, z_teacher = load_logits(teacher_logits_ptr, row, col, V, teacher_cap)
        p, log_p = softmax_of(z, maximum, total)
        q, log_q = softmax_of(z_teacher, teacher_maximum, teacher_total)
        term_p, term_q, _ = kl_terms(p, q, log_p, log_q, beta, KIND, False)
        of_p += term_p
        of_q += term_q
        if gradient_ptr is not None and KIND == FORWARD:
            tl.debug_barrier()
            d_logit = weight * (p - q)
            store_gradient(gradient_ptr, row, stride_g, col, col < V, d_logit, x, slope, cap)
    kl_p = tl.sum(of_p, 0)
    kl_q = tl.sum(of_q, 0)
    tl.store(divergence_ptr + row, weight * weighted(kl_p, kl_q, beta, KIND))
    if gradient_ptr is not None and KIND != FORWARD:
        if KIND == MIXED:
            weight *= 1.0 - beta
        for first in range(0, V, BLOCK_V):
            col = first + tl.arange(0, BLOCK_V)
            x, z = load_logits(logits_ptr, row, col, V, cap)
            _, z_teacher = load_logits(teacher_logits_ptr, row, col, V, teacher_cap)
            tl.debug_barrier()
            p, log_p = softmax_of(z, maximum, total)
            q, log_q = softmax_of(z_teacher, teacher_maximum, teacher_total)
            over_p, _, _ = mixture(p, q, log_p, log_q, beta, KIND)
            d_logit = tl.where(p == 0, 0.0, -weight * p * (over_p + kl_p))
            store_gradient(gradient_ptr, row, stride_g, col, col < V, d_logit, x, slope, cap)


@triton.jit
def is_wrong(ids_ptr, ids, is_id, V, K, BLOCK_K: tl.constexpr):
    """Whether an id is out of range or occurs twice."""
    count = tl.zeros((BLOCK_K,), tl.int32)
    for k in range(0, K):
        count += (tl.load(ids_ptr + k) == ids).to(tl.int32)
    wrong = is_id & ((ids < 0) | (ids >= V) | (count > 1))
    return tl.max(wrong.to(tl.int32), 0) > 0


@triton.jit
def slopes(p, q, over_p, beta, KIND: tl.constexpr, IS_OPEN: tl.constexpr):
    """d(divergence) / d(log p) of each class; 0 where p is."""
    if KIND == FORWARD:
        if IS_OPEN:
            return -q
        else:
            return p - q
    elif KIND == REVERSE:
        if IS_OPEN:
            return tl.where(p == 0, 0.0, p * (1.0 - over_p))
        else:
            return tl.where(p == 0, 0.0, -p * over_p)
    else:
        return tl.where(p == 0, 0.0, (beta - 1.0) * p * over_p)


@triton.jit
def topk_divergence_kernel(
    logits_ptr,
    gradient_ptr,
    ids_ptr,
    teacher_logprob_ptr,
    live_ptr,
    weight_ptr,
    maximum_ptr,
    total_ptr,
    divergence_ptr,
    teacher_lse_ptr,
    V,
    K,
    stride_g,
    slope,
    cap,
    beta,
    KIND: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """weight * D over the K classes ids [rows, K] and, if HAS_TAIL, one class of all others.

    Student: a row of logits [rows, V], whose gradient takes its place (gradient_ptr as in
    divergence_kernel); teacher: teacher_logprob [rows, K]. The mass of the others is a sum over
    them, with their own maximum: 1 - sum p would cancel. A row whose ids repeat or are out of
    range gives NaN. BLOCK_K >= K, or > K if HAS_TAIL: slot K is the tail.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    if row >= tl.load(live_ptr):
        return
    maximum = tl.load(maximum_ptr + row)
    total = tl.load(total_ptr + row)
    slot = tl.arange(0, BLOCK_K)
    is_id = slot < K
    ids = tl.load(ids_ptr + row * K + slot, mask=is_id, other=-1)
    log_q = tl.load(teacher_logprob_ptr + row * K + slot, mask=is_id, other=float("-inf"))
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
    weight = tl.where(is_wrong(ids_ptr + row * K, ids, is_id, V, K, BLOCK_K), float("nan"), weight)
    is_id = is_id & (ids >= 0) & (ids < V)
    x_id = tl.load(logits_ptr + row * V + ids, mask=is_id, other=0.0)
    p, log_p = softmax_of(tl.where(is_id, capped(x_id, cap), float("-inf")), maximum, total)
    teacher_maximum = tl.max(log_q, 0)
    teacher_maximum = tl.where(teacher_maximum == float("-inf"), 0.0, teacher_maximum)
    teacher_lse = teacher_maximum + tl.log(tl.sum(tl.exp(log_q - teacher_maximum), 0))
    tl.store(teacher_lse_ptr + row, teacher_lse)
    q = tl.exp(log_q)
    # A class that is no id has the gradient coefficient * exp(z - base).
    base = maximum
    if HAS_TAIL:
        # NaN marks the ids: -inf is a logit like others, finite under a softcap.
        tl.debug_barrier()
        tl.store(logits_ptr + row * V + ids, tl.full((BLOCK_K,), float("nan"), tl.float32), is_id)
        tl.debug_barrier()
        rest_maximum = tl.full((1,), float("-inf"), tl.float32)
        rest_total = tl.zeros((1,), tl.float32)
        for first in range(0, V, BLOCK_V):
            x, z = load_logits(logits_ptr, row, first + tl.arange(0, BLOCK_V), V, cap)
            z = tl.where(x == x, z, float("-inf"))[None, :]
            rest_maximum, rest_total, _ = fold_tile(rest_maximum, rest_total, 0.0, z, False)
        base = tl.max(rest_maximum, 0)
        base = tl.where(base == float("-inf"), 0.0, base)
        rest = tl.sum(rest_total, 0)
        log_p_rest = (base - maximum) + (tl.log(rest) - tl.log(total))
        # In fp64: 1 - sum q of a peaked teacher has few digits in fp32. Nothing is left where the
        # ids are all classes; rounding would leave some.
        q_sum = tl.sum(tl.exp(tl.cast(log_q, tl.float64)), 0)
        q_rest = tl.maximum(tl.cast(1.0 - q_sum, tl.float32), TAIL_FLOOR)
        q_rest = tl.where(K < V, q_rest, 0.0)
        p = tl.where(slot == K, tl.exp(log_p_rest), p)
        log_p = tl.where(slot == K, log_p_rest, log_p)
        q = tl.where(slot == K, q_rest, q)
        log_q = tl.where(slot == K, tl.log(q_rest), log_q)
    of_p, of_q, over_p = kl_terms(p, q, log_p, log_q, beta, KIND, not HAS_TAIL)
    divergence = weighted(tl.sum(of_p, 0), tl.sum(of_q, 0), beta, KIND)
    tl.store(divergence_ptr + row, weight * divergence)
    if gradient_ptr is not None:
        g = weight * slopes(p, q, over_p, beta, KIND, not HAS_TAIL)
        g_sum = tl.sum(g, 0)
        if HAS_TAIL:
            # p_v = p_rest * s_v with s_v = exp(z - base) / rest, the share of the tail.
            is_tail = slot == K
            of_tail = tl.sum(tl.where(is_tail, g - p * g_sum, 0.0), 0)
            coefficient = tl.where(rest > 0, of_tail / rest, 0.0)
        else:
            coefficient = -g_sum / total
        for first in range(0, V, BLOCK_V):
            col = first + tl.arange(0, BLOCK_V)
            x, z = load_logits(logits_ptr, row, col, V, cap)
            tl.debug_barrier()
            d_logit = tl.exp(z - base) * coefficient
            store_gradient(gradient_ptr, row, stride_g, col, col < V, d_logit, x, slope, cap)
        # What the loop wrote over the ids is replaced.
        tl.debug_barrier()
        store_gradient(gradient_ptr, row, stride_g, ids, is_id, g - p * g_sum, x_id, slope, cap)
