// Sums of exponentials about a maximum that rises as a row is read.
#pragma once

#include <cmath>

#include "common/logits.h"

namespace xopd {
namespace {

constexpr float LOG_ZERO = -1000.0f;  // exp(LOG_ZERO) is 0; keeps 0 * log(0) at 0, not NaN

// Sums of exp(z - maximum) and of its moment, about the maximum so far.
struct RowSums {
  float maximum;
  double total;
  double moment;

  // Takes `found` as the maximum if it is larger.
  void raise(float found) {
    if (!(found > maximum)) return;
    // Nothing but 0 or NaN stands in the sums of a row whose maximum is -inf: they stay.
    if (maximum != -INF) {
      const double shift = static_cast<double>(maximum) - static_cast<double>(found);
      const double factor = std::exp(shift);
      moment = factor == 0.0 ? factor * moment : factor * (moment + shift * total);
      total *= factor;
    }
    maximum = found;
  }

  // The logits `z`, a whole number of steps; with `e` their exponentials are written there. Those
  // of the maximum, 1, are counted apart: beside them fp32 loses what the others add to a
  // probability near 1.
  template <bool HAS_MOMENT>
  void add(const float* z, int64_t count, float* e = nullptr) {
    const Floats reference = splat(maximum == -INF ? 0.0f : maximum);
    const Floats one = splat(1.0f);
    Sum totals, tops, moments;
    for (int64_t i = 0; i < count; i += STEP) {
      for (int64_t k = 0; k < UNROLL; ++k) {
        const Floats shifted = load(z + i + k * WIDTH) - reference;
        const Floats value = exp(shifted);
        if (e != nullptr) store(e + i + k * WIDTH, value);
        const auto is_top = shifted == Floats{};
        totals.lanes[k] += is_top ? Floats{} : value;
        tops.lanes[k] += is_top ? one : Floats{};
        if (HAS_MOMENT) moments.lanes[k] += value * at_least(shifted, splat(LOG_ZERO));
      }
    }
    total += totals.total() + tops.total();
    if (HAS_MOMENT) moment += moments.total();
  }
};

inline float largest_of(const Buffer& z, int64_t count) {
  Floats lanes[UNROLL] = {splat(-INF), splat(-INF), splat(-INF), splat(-INF)};
  for (int64_t i = 0; i < count; i += STEP) {
    for (int64_t k = 0; k < UNROLL; ++k) {
      lanes[k] = larger(load(z.values + i + k * WIDTH), lanes[k]);
    }
  }
  return largest(larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3])));
}

}  // namespace
}  // namespace xopd
