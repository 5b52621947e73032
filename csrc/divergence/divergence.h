// Divergences of two models over a block of logits, and their gradient.
#pragma once

#include "common/abi.h"
#include "common/logits.h"
#include "common/parallel.h"
#include "matmul/rounding.h"

extern "C" {

// One model: log p = (z - maximum) - log_total.
struct xopd_side {
  xopd_logits logits;
  const float* maximum;    // [rows]
  const float* log_total;  // [rows]
};

// value and the sums of u = d value / d log p grow by the terms of a tile of classes. A class of p
// above the row's bound, at most one, stands apart: its gradient is made of the others'.
struct xopd_divergence {
  xopd_side student;
  xopd_side teacher;
  int64_t rows;
  int64_t classes;
  double beta;
  const float* bound;    // [rows]
  double* value;         // [rows]
  double* slope_top;     // [rows] u of the class above the bound
  double* slope_others;  // [rows] sum of u over all others
};

// d_logit = slope(x) * weight * (u - p * slope_sum), x and p of the student; above the bound
// slope(x) * weight * (u * rest - p * slope_others), the same without a difference of numbers
// near 1.
struct xopd_divergence_gradient {
  xopd_side student;
  xopd_side teacher;
  int64_t rows;
  int64_t classes;
  double beta;
  const float* bound;         // [rows]
  const float* slope_sum;     // [rows] of all classes
  const float* slope_others;  // [rows]
  const float* rest;          // [rows] 1 - p of the class above the bound
  const float* weight;        // [rows]
  xopd_d_logit d_logit;
};

XOPD_EXPORT int32_t xopd_add_divergence(const xopd_divergence* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_write_divergence_gradient(const xopd_divergence_gradient* call,
                                                   xopd_parallel_for* parallel);
}
