// The softmax passes over a block of logits: row statistics, and the gradient of their functions.
#pragma once

#include "common/abi.h"
#include "common/logits.h"
#include "common/parallel.h"
#include "matmul/rounding.h"

extern "C" {

// Row statistics of the classes seen so far; a call folds one tile of classes in.
struct xopd_statistics {
  xopd_logits logits;
  int64_t rows;
  int64_t classes;
  int64_t first_class;  // class number of column 0
  const int64_t* ids;   // [rows, id_count] class numbers, ascending in a row: they take no part
  int64_t id_count;     // in maximum, total, moment
  float* maximum;       // [rows]
  double* total;        // [rows] sum exp(z - maximum)
  double* moment;       // [rows] sum exp(z - maximum) (z - maximum), or null
  float* at_ids;        // [rows, id_count] z of the ids of this tile; the others stay
};

// d_logit = slope(x) * (alpha e + gamma e max(z - maximum, -1000)), e = exp(z - maximum).
struct xopd_gradient {
  xopd_logits logits;
  int64_t logit_rows;
  int64_t rows;  // of d_logit
  int64_t classes;
  int64_t first_class;
  const int64_t* row_of;  // [rows] row of x, or null: row i is row i
  const float* maximum;   // [rows] finite
  const float* alpha;     // [rows]
  const float* gamma;     // [rows] or null
  const int64_t* ids;     // [rows, id_count] ascending in a row
  int64_t id_count;
  const float* at_ids;  // [rows, id_count] stands for the bracket at the ids
  xopd_d_logit d_logit;
};

XOPD_EXPORT int32_t xopd_abi_version();
XOPD_EXPORT int32_t xopd_add_statistics(const xopd_statistics* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_write_gradient(const xopd_gradient* call, xopd_parallel_for* parallel);
}
