// The linear outputs of a head, and the logits that are made of them piece by piece.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/math.h"

extern "C" {
// z = scale * (x + bias), with a cap: z = cap * tanh(scale * (x + bias)).
struct xopd_logits {
  const float* x;      // [rows, classes]
  const float* bias;   // [classes] or null
  int64_t row_stride;  // elements from one row of x to the next
  float scale;
  float cap;  // 0: none
};
}

namespace xopd {
namespace {

constexpr int64_t PIECE = 1024;  // classes at a time: the buffers of a piece stay in the L1 cache
constexpr int64_t STEP = WIDTH * UNROLL;
static_assert(PIECE % STEP == 0, "a piece is a whole number of steps");

struct alignas(64) Buffer {
  float values[PIECE];
};

inline int64_t padded(int64_t count) { return (count + STEP - 1) / STEP * STEP; }

// The logits z of the classes [begin, begin + count) of a row, padded with -inf to whole steps.
// With a cap and a `slope` that is not null: dz/dx as well, padded with 0.
inline void transform(const xopd_logits& logits, int64_t row, int64_t begin, int64_t count,
                      Buffer& z, Buffer* slope) {
  const float* x = logits.x + row * logits.row_stride + begin;
  const float* bias = logits.bias == nullptr ? nullptr : logits.bias + begin;
  const auto put = [&](int64_t at, Floats linear) {
    const Floats scaled = linear * logits.scale;
    if (logits.cap == 0.0f) {
      store(z.values + at, scaled);
      return;
    }
    const Tanh tanh = Tanh::of(scaled);
    store(z.values + at, tanh.value * logits.cap);
    if (slope != nullptr) store(slope->values + at, tanh.slope * (logits.scale * logits.cap));
  };
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    __builtin_prefetch(x + i + logits.row_stride, 0, 3);  // the row that follows, from memory
    put(i, bias == nullptr ? load(x + i) : load(x + i) + load(bias + i));
  }
  if (i < count) {
    const Floats part = load_part(x + i, count - i);
    put(i, bias == nullptr ? part : part + load_part(bias + i, count - i));
  }
  std::fill(z.values + count, z.values + padded(count), -INF);
  if (slope != nullptr) std::fill(slope->values + count, slope->values + padded(count), 0.0f);
  // From here on z is what memory holds: multiplied and subtracted in one rounding, the logits of
  // the gradient would differ from those of the statistics.
  asm volatile("" : : "r"(z.values) : "memory");
}

}  // namespace
}  // namespace xopd
