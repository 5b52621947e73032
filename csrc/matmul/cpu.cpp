#include "matmul/kernel.h"
#include "matmul/matmul.h"

#if defined(__AVX512F__)
namespace xopd {
namespace {

// 64 columns of the rows 2 pair and 2 pair + 1 of b [k, n]; `high` is null where b has ended.
XOPD_BF16 inline void pack_pair(const uint16_t* low, const uint16_t* high, int64_t columns,
                                uint32_t* to) {
  for (int64_t v = 0; v < VECTORS; ++v) {
    const int64_t at = v * LANES, count = columns - at;
    __m512i words = _mm512_setzero_si512();
    if (count > 0) {
      words = pairs_of(load_row(low + at, count),
                       high != nullptr ? load_row(high + at, count) : _mm256_setzero_si256());
    }
    _mm512_storeu_si512(to + at, words);
  }
}

// Two rows of b [k, n] to their place in every block of columns.
XOPD_BF16 void pack_rows(const xopd_pack& call, int64_t pair) {
  const int64_t pairs = (call.rows + 1) / 2;
  const uint16_t* low = call.from + 2 * pair * call.row_stride;
  const bool is_whole = 2 * pair + 1 < call.rows;
  for (int64_t begin = 0; begin < call.columns; begin += COLUMNS) {
    pack_pair(low + begin, is_whole ? low + call.row_stride + begin : nullptr, call.columns - begin,
              call.to + begin * pairs + pair * COLUMNS);
  }
}

// 16 rows of b^T [n, k], columns of b, to their place in a block.
XOPD_BF16 void pack_columns(const xopd_pack& call, int64_t group) {
  const int64_t pairs = call.columns / 2, begin = group * LANES;
  uint32_t* to = call.to + begin / COLUMNS * COLUMNS * pairs + begin % COLUMNS;
  for (int64_t pair = 0; pair < pairs; pair += LANES) {
    const __mmask16 mask = first(pairs - pair);
    __m512i words[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      words[i] = _mm512_setzero_si512();
      if (begin + i < call.rows) {
        words[i] =
            _mm512_maskz_loadu_epi32(mask, call.from + (begin + i) * call.row_stride + 2 * pair);
      }
    }
    transpose(words);
    const int64_t count = std::min(LANES, pairs - pair);
    for (int64_t i = 0; i < count; ++i) {
      _mm512_storeu_si512(to + (pair + i) * COLUMNS, words[i]);
    }
  }
}

// The sums of rows [row, row + M) and columns [begin, begin + 64), where they belong.
template <int64_t M>
XOPD_BF16 inline void store(const xopd_product& call, int64_t row, int64_t begin,
                            const __m512 (&sums)[M][VECTORS]) {
  for (int64_t v = 0; v < VECTORS; ++v) {
    const int64_t column = begin + v * LANES, count = std::min(LANES, call.n - column);
    if (count <= 0) return;
    if (call.is_transposed != 0) {
      __m512 part[M];
      for (int64_t i = 0; i < M; ++i) part[i] = sums[i][v];
      store_columns<M>(part, call.out + column * call.out_stride + row, call.out_stride, count);
      continue;
    }
    for (int64_t i = 0; i < M; ++i) {
      const int64_t at = (row + i) * call.out_stride + column;
      if (call.out != nullptr) {
        _mm512_mask_storeu_ps(call.out + at, first(count), sums[i][v]);
      } else {
        _mm256_mask_storeu_epi16(call.rounded + at, first(count), rounded(sums[i][v]));
      }
    }
  }
}

// Rows [row, row + M) of the columns [begin, begin + 64), over the whole inner dimension.
template <int64_t M>
XOPD_BF16 void multiply_block(const xopd_product& call, int64_t row, int64_t begin) {
  const int64_t pairs = (call.k + 1) / 2;
  __m512 sums[M][VECTORS];
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t v = 0; v < VECTORS; ++v) {
      sums[i][v] = _mm512_setzero_ps();
      if (call.is_added == 0) continue;
      const int64_t column = begin + v * LANES, at = (row + i) * call.out_stride + column;
      sums[i][v] = _mm512_maskz_loadu_ps(first(call.n - column), call.out + at);
    }
  }
  multiply<M>(call.a + row * call.a_stride, call.a_stride, call.b + begin * pairs, pairs, sums);
  store<M>(call, row, begin, sums);
}

using Block = void (*)(const xopd_product&, int64_t, int64_t);
constexpr Block BLOCKS[ROWS] = {multiply_block<1>, multiply_block<2>, multiply_block<3>,
                                multiply_block<4>, multiply_block<5>, multiply_block<6>};

// Some rows of a block of 64 columns. Which task has them changes nothing about their sums.
void multiply_rows(const xopd_product& call, int64_t first_row, int64_t begin) {
  const int64_t end = std::min(first_row + ROWS_OF_TASK, call.m);
  for (int64_t row = first_row; row < end; row += ROWS) {
    BLOCKS[std::min(ROWS, end - row) - 1](call, row, begin);
  }
}

// 64 columns of a piece of the inner dimension, packed: they stay in a core's L2 cache.
constexpr int64_t SLAB_PAIRS = 504;

struct alignas(64) Slab {
  uint32_t words[SLAB_PAIRS * COLUMNS];
};

// The rows of b [k, n] that a slab is made of.
struct Piece {
  const uint16_t* from;
  int64_t stride;
  int64_t rows;
  int64_t columns;

  static Piece of(const xopd_unpacked& call, int64_t begin, int64_t column) {
    const int64_t rows = std::min(2 * SLAB_PAIRS, call.k - begin);
    return {call.b + begin * call.b_stride + column, call.b_stride, rows, call.n - column};
  }

  void pack(Slab& slab) const {
    for (int64_t row = 0; row < rows; row += 2) {
      const uint16_t* low = from + row * stride;
      pack_pair(low, row + 1 < rows ? low + stride : nullptr, columns,
                slab.words + row / 2 * COLUMNS);
    }
  }

  // Asks for some of its rows, two lines each.
  void prefetch(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < std::min(end, rows); ++row) {
      __builtin_prefetch(from + row * stride, 0, 2);
      __builtin_prefetch(from + row * stride + COLUMNS / 2, 0, 2);
    }
  }
};

// Rows [first_row, end_row) of the columns [column, column + 64), over the whole inner dimension.
void add_block(const xopd_unpacked& call, int64_t first_row, int64_t end_row, int64_t column) {
  Slab slab;
  const int64_t steps = (end_row - first_row + ROWS - 1) / ROWS;
  for (int64_t begin = 0; begin < call.k; begin += 2 * SLAB_PAIRS) {
    const Piece piece = Piece::of(call, begin, column);
    piece.pack(slab);
    // While this piece is multiplied, the next one comes from memory: behind it or, after the last
    // one, beside the first.
    const bool is_last = begin + piece.rows >= call.k;
    Piece next = is_last ? Piece::of(call, 0, column + COLUMNS)
                         : Piece::of(call, begin + piece.rows, column);
    if (next.columns <= 0) next.rows = 0;
    const int64_t lines = (next.rows + steps - 1) / steps;
    const xopd_product product{call.a + begin,
                               call.a_stride,
                               slab.words,
                               call.m,
                               std::min(COLUMNS, piece.columns),
                               piece.rows,
                               call.out + column,
                               nullptr,
                               call.out_stride,
                               1,
                               0};
    for (int64_t step = 0; step < steps; ++step) {
      next.prefetch(step * lines, (step + 1) * lines);
      const int64_t row = first_row + step * ROWS;
      BLOCKS[std::min(ROWS, end_row - row) - 1](product, row, 0);
    }
  }
}

}  // namespace
}  // namespace xopd
#endif

extern "C" {

#if defined(__AVX512F__)
int32_t xopd_has_matmul() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

int32_t xopd_run_pack(const xopd_pack* call, xopd_parallel_for* parallel) {
  if (call->is_transposed != 0) {
    // Up to a whole block: its last columns are zeros.
    const int64_t groups = (call->rows + xopd::COLUMNS - 1) / xopd::COLUMNS * xopd::VECTORS;
    return xopd::for_rows(parallel, groups, xopd::LANES * call->columns,
                          [call](int64_t group) { xopd::pack_columns(*call, group); });
  }
  return xopd::for_rows(parallel, (call->rows + 1) / 2, 2 * call->columns,
                        [call](int64_t pair) { xopd::pack_rows(*call, pair); });
}

int32_t xopd_run_product(const xopd_product* call, xopd_parallel_for* parallel) {
  const int64_t parts = (call->m + xopd::ROWS_OF_TASK - 1) / xopd::ROWS_OF_TASK;
  const int64_t blocks = (call->n + xopd::COLUMNS - 1) / xopd::COLUMNS;
  // Neighbours have the same block of b: a thread's tasks follow each other.
  return xopd::for_rows(parallel, blocks * parts, xopd::ROWS_OF_TASK * call->k, [=](int64_t task) {
    xopd::multiply_rows(*call, task % parts * xopd::ROWS_OF_TASK, task / parts * xopd::COLUMNS);
  });
}

int32_t xopd_run_unpacked(const xopd_unpacked* call, xopd_parallel_for* parallel) {
  const int64_t parts = (call->m + xopd::ROWS_OF_TASK - 1) / xopd::ROWS_OF_TASK;
  const int64_t blocks = (call->n + xopd::COLUMNS - 1) / xopd::COLUMNS;
  const auto run = [=](int64_t begin, int64_t end) {
    // A thread packs a block of b once for all its rows.
    while (begin < end) {
      const int64_t block = begin / parts, until = std::min(end, (block + 1) * parts);
      const int64_t last = std::min(call->m, (until - block * parts) * xopd::ROWS_OF_TASK);
      xopd::add_block(*call, begin % parts * xopd::ROWS_OF_TASK, last, block * xopd::COLUMNS);
      begin = until;
    }
  };
  return xopd::for_ranges(parallel, blocks * parts, xopd::ROWS_OF_TASK * call->k, run);
}
#else
int32_t xopd_has_matmul() { return 0; }
int32_t xopd_run_pack(const xopd_pack*, xopd_parallel_for*) { return XOPD_NO_MATMUL; }
int32_t xopd_run_product(const xopd_product*, xopd_parallel_for*) { return XOPD_NO_MATMUL; }
int32_t xopd_run_unpacked(const xopd_unpacked*, xopd_parallel_for*) { return XOPD_NO_MATMUL; }
#endif
}
