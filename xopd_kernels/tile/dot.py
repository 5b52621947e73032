"""Tile arithmetic: the dot, rounding, and functions without libdevice, each in one place."""

import triton
import triton.language as tl

# Triton's interpreter multiplies and rounds the raw bits of bf16: there, and only there, the
# operands are upcast (their products are exact in fp32) and results are rounded by hand.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def tile_dot(a, b, accumulator):
    """accumulator [M, N] fp32 + a [M, K] @ b [K, N].

    fp32 operands multiply in full fp32. fp32 with fp16 is TF32: its 10 mantissa bits are those of
    fp16, and its exponent keeps gradients that underflow in fp16.
    """
    if INTERPRETED:
        accumulator = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    elif a.dtype == b.dtype:
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
    else:
        accumulator = tl.dot(
            a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="tf32"
        )
    return accumulator


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 `x` rounded to nearest even in DTYPE."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DTYPE)
    return rounded


@triton.jit
def tanh(x):
    """tanh without libdevice; a series near 0, where the quotient would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    quotient = tl.where(x < 0, -quotient, quotient)
    s = x * x
    series = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.2, series, quotient)


@triton.jit
def tanh_slope(x):
    """d tanh(x) / dx = 4 e / (1 + e)^2 with e = exp(-2 |x|): 1 - tanh(x)^2 without cancellation."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0 without libdevice's expm1; a series near 0, where it cancels."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.2, series, 1.0 - tl.exp(x))
