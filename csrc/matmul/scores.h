// Sweep one with bf16 products: logits of many tiles, and their row statistics from registers.
#pragma once

#include <cstdint>

#include "common/abi.h"
#include "common/parallel.h"

extern "C" {
// Statistics of 64 rows over a tile, about a reference of each row.
struct xopd_tile_sums {
  float maximum[64];
  float reference[64];  // that of exp and of the moment
  double total[64];
  double moment[64];
};

// The linear outputs x = weight hidden^T of classes [first_class, first_class + classes), tile by
// tile of `tile` classes, and what xopd_add_statistics makes of them.
struct xopd_scores {
  const uint16_t* weight;  // [classes, k], k even
  int64_t weight_stride;   // elements
  const uint32_t* hidden;  // [rows, k] packed as b^T
  int64_t rows;
  int64_t classes;
  int64_t k;
  int64_t tile;      // of a task
  int64_t out_tile;  // a multiple of it
  float* out;  // null: x is not kept; else [rows, T] of a tile of `out_tile` that begins with class
  int64_t out_class;   // c of these, at out + c * out_class + T * out_offset
  int64_t out_offset;  // both in elements
  const float* bias;   // [classes] or null
  float scale;         // as in xopd_logits
  float cap;
  int64_t first_class;   // class number of the first of them
  const int64_t* ids;    // [rows, id_count] class numbers, ascending in a row: they take no part
  int64_t id_count;      // in maximum, total, moment
  float* maximum;        // [rows]
  double* total;         // [rows]
  double* moment;        // [rows] or null
  float* at_ids;         // [rows, id_count] z of the ids among these classes; the others stay
  xopd_tile_sums* sums;  // [tiles][ceil(rows / 64)]: memory for the sums of the tiles
};

XOPD_EXPORT int32_t xopd_run_scores(const xopd_scores* call, xopd_parallel_for* parallel);
}
