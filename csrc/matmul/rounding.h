// d(loss)/d(linear output) of a tile: in fp32, or rounded to bf16 as its two products read it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/abi.h"
#include "common/logits.h"
#include "common/parallel.h"

extern "C" {
// bf16 [rows, columns] as a left factor: as it stands with whole pairs, and transposed.
struct xopd_factors {
  const uint16_t* from;
  int64_t rows, columns;
  int64_t row_stride;    // elements
  uint16_t* straight;    // [rows, columns + columns % 2], the padding 0; or null
  uint16_t* transposed;  // [columns, rows + rows % 2], the padding 0; or null
};

// Where d(loss)/d(linear output) [rows, classes] goes.
struct xopd_d_logit {
  float* out;  // fp32; or null:
  int64_t out_row_stride;
  uint16_t* straight;  // both as in xopd_factors
  uint16_t* transposed;
  float* sums;  // [ceil(rows / 32), classes]: of 32 rows, before they are rounded; or null
};

XOPD_EXPORT int32_t xopd_run_factors(const xopd_factors* call, xopd_parallel_for* parallel);
}

namespace xopd {

constexpr int64_t GROUP = 32;  // rows that are rounded together: two registers of a column

// `rows` <= 32 and `columns` of a block [all_rows, all_columns], from its row `row` and `column`.
struct Part {
  int64_t all_rows, all_columns;
  int64_t row, column;
  int64_t rows, columns;
};

// Rounds a part, fp32 with rows `stride` apart, to where it goes, and adds up its rows.
void round_part(const xopd_d_logit& to, const Part& part, const float* from, int64_t stride);

namespace {

// Classes of a part: 32 rows of them stay in a core's L2 cache, and a row is a stream.
constexpr int64_t PART_CLASSES = 1008;

// Fills a tile [rows, classes] by write(row, begin, count, out), the classes [begin, begin + count)
// of a row.
template <class Write>
int32_t write_d_logit(const xopd_d_logit& to, int64_t rows, int64_t classes,
                      xopd_parallel_for* parallel, const Write& write) {
  if (rows == 0 || classes == 0) return 0;  // an empty tensor has no address
  if (to.out != nullptr) {
    return for_rows(parallel, rows, classes, [&](int64_t row) {
      for (int64_t begin = 0; begin < classes; begin += PIECE) {
        const int64_t count = std::min(PIECE, classes - begin);
        write(row, begin, count, to.out + row * to.out_row_stride + begin);
      }
    });
  }
#if defined(__AVX512F__)
  const int64_t groups = (rows + GROUP - 1) / GROUP;
  const int64_t parts = (classes + PART_CLASSES - 1) / PART_CLASSES;
  return for_rows(parallel, groups * parts, GROUP * PART_CLASSES, [&](int64_t task) {
    alignas(64) float values[GROUP * PART_CLASSES];
    const int64_t row = task / parts * GROUP, begin = task % parts * PART_CLASSES;
    const Part part{rows,
                    classes,
                    row,
                    begin,
                    std::min(GROUP, rows - row),
                    std::min(PART_CLASSES, classes - begin)};
    for (int64_t i = 0; i < part.rows; ++i) {
      write(row + i, begin, part.columns, values + i * PART_CLASSES);
    }
    round_part(to, part, values, PART_CLASSES);
  });
#else
  return XOPD_NO_MATMUL;
#endif
}

}  // namespace
}  // namespace xopd
