// exp, expm1, log1p, tanh of vectors, to 1-2 units in the last place. NaN and +inf give NaN.
#pragma once

#include "common/vector.h"

namespace xopd {
namespace {

// e^x = scale * (1 + tail), with scale = 2^n, n = round(x / ln 2), and tail = e^r - 1,
// |r| <= ln(2) / 2. For x <= 88; 0 from x = -87.7 down, where it would be subnormal.
struct Exponential {
  Floats tail;
  Floats scale;

  static Exponential of(Floats x) {
    x = at_least(x, splat(-88.0f));  // n = -127, whose scale is 0
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits; 127 more make it
    // the exponent of the scale.
    const Floats magic = splat(12582912.0f + 127.0f);
    const Floats shifted = x * splat(1.44269504f) + magic;
    const Floats n = shifted - magic;
    // ln 2 in two parts: the first has so few bits that n times it is exact.
    const Floats r = (x - n * splat(0.693145752f)) - n * splat(1.42860677e-6f);
    Floats p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    return {p * (r * r) + r, from_bits(bits(shifted) << 23)};
  }

  Floats value() const { return tail * scale + scale; }
  Floats less_one() const { return tail * scale + (scale - 1.0f); }  // all digits of small x
};

inline Floats exp(Floats x) { return Exponential::of(x).value(); }
inline Floats expm1(Floats x) { return Exponential::of(x).less_one(); }

// log(1 + x) for -1 <= x <= 0, with all digits of small x.
inline Floats log1p(Floats x) {
  const Floats u = x + 1.0f;  // chooses k alone
  // 2^k: the power of two that puts (1 + x) / 2^k between sqrt(1/2) and sqrt(2).
  const Words biased = (bits(u) + (0x3f800000u - 0x3f3504f3u)) >> 23;
  const Floats k = __builtin_convertvector(reinterpret_cast<Ints>(biased) - 127, Floats);
  const Floats inverse = from_bits((254u - biased) << 23);
  const Floats f = x * inverse + (inverse - 1.0f);  // (1 + x) / 2^k - 1, exact
  Floats p = splat(7.0376836292e-2f);
  p = p * f + splat(-1.1514610310e-1f);
  p = p * f + splat(1.1676998740e-1f);
  p = p * f + splat(-1.2420140846e-1f);
  p = p * f + splat(1.4249322787e-1f);
  p = p * f + splat(-1.6668057665e-1f);
  p = p * f + splat(2.0000714765e-1f);
  p = p * f + splat(-2.4999993993e-1f);
  p = p * f + splat(3.3333331174e-1f);
  const Floats square = f * f;
  Floats low = p * f * square + k * splat(-2.12194440e-4f);
  low = low - square * 0.5f;
  const Floats result = (f + low) + k * splat(0.693359375f);
  return u <= Floats{} ? splat(-INF) : result;
}

// tanh x and, apart from it, the slope 1 - tanh^2 x, whose digits a difference would lose.
struct Tanh {
  Floats value;
  Floats slope;

  static Tanh of(Floats x) {
    const Exponential e = Exponential::of(absolute(x) * -2.0f);
    const Floats less_one = e.less_one(), exponential = e.value();
    const Floats size = less_one / (less_one + 2.0f);  // -tanh |x|
    const Floats over = 1.0f / (exponential + 1.0f);
    const Words sign = (bits(x) ^ 0x80000000u) & 0x80000000u;
    return {from_bits(bits(size) ^ sign), exponential * 4.0f * over * over};
  }
};

}  // namespace
}  // namespace xopd
