#include "matmul/kernel.h"
#include "matmul/matmul.h"

#if defined(__AVX512F__)
namespace xopd {
namespace {

// Words [16][16] transposed in registers.
XOPD_BF16 inline void transpose(__m512i (&r)[LANES]) {
  __m512i t[LANES];
  for (int64_t i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int64_t i = 0; i < LANES; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int64_t i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int64_t i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Pairs of two rows of bf16: 16 columns of each, `low` in the low halves.
XOPD_BF16 inline __m512i pairs_of(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

XOPD_BF16 inline __m256i load_row(const uint16_t* from, int64_t count) {
  if (count >= LANES) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_maskz_loadu_epi16(first(count), from);
}

// Rows 2 pair and 2 pair + 1 of b [k, n] to their place in every block of columns.
XOPD_BF16 void pack_rows(const xopd_pack& call, int64_t pair) {
  const int64_t pairs = (call.rows + 1) / 2;
  const uint16_t* low = call.from + 2 * pair * call.row_stride;
  const bool is_whole = 2 * pair + 1 < call.rows;
  for (int64_t begin = 0; begin < call.columns; begin += COLUMNS) {
    uint32_t* to = call.to + begin * pairs + pair * COLUMNS;
    for (int64_t v = 0; v < VECTORS; ++v) {
      const int64_t at = begin + v * LANES, count = call.columns - at;
      __m512i words = _mm512_setzero_si512();
      if (count > 0) {
        const __m256i high =
            is_whole ? load_row(low + call.row_stride + at, count) : _mm256_setzero_si256();
        words = pairs_of(load_row(low + at, count), high);
      }
      _mm512_storeu_si512(to + v * LANES, words);
    }
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

XOPD_BF16 inline __m256i rounded(__m512 values) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
}

// 32 rows: rounded as they stand, and transposed, 16 columns at a time.
XOPD_BF16 void round_rows(const xopd_round& call, int64_t group) {
  const int64_t begin = group * 2 * LANES, rows = std::min(2 * LANES, call.rows - begin);
  const int64_t width = call.columns + call.columns % 2, height = call.rows + call.rows % 2;
  for (int64_t column = 0; column < call.columns; column += LANES) {
    const __mmask16 mask = first(call.columns - column);
    __m256i row[2 * LANES];
    for (int64_t i = 0; i < 2 * LANES; ++i) {
      row[i] = _mm256_setzero_si256();
      if (i >= rows) continue;
      const int64_t at = (begin + i) * call.row_stride + column;
      row[i] = call.from != nullptr ? rounded(_mm512_maskz_loadu_ps(mask, call.from + at))
                                    : _mm256_maskz_loadu_epi16(mask, call.from_bf16 + at);
      if (call.straight != nullptr) {
        uint16_t* to = call.straight + (begin + i) * width + column;
        _mm256_mask_storeu_epi16(to, first(width - column), row[i]);
      }
    }
    if (call.transposed == nullptr) continue;
    __m512i words[LANES];
    for (int64_t i = 0; i < LANES; ++i) words[i] = pairs_of(row[2 * i], row[2 * i + 1]);
    transpose(words);
    const __mmask16 pairs = first((height - begin) / 2);
    for (int64_t i = 0; i < std::min(LANES, call.columns - column); ++i) {
      _mm512_mask_storeu_epi32(call.transposed + (column + i) * height + begin, pairs, words[i]);
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
    const float* old = call.out + (row + i) * call.out_stride + begin;
    for (int64_t v = 0; v < VECTORS; ++v) {
      sums[i][v] = _mm512_setzero_ps();
      if (call.is_added != 0) {
        sums[i][v] = _mm512_maskz_loadu_ps(first(call.n - begin - v * LANES), old + v * LANES);
      }
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

int32_t xopd_run_round(const xopd_round* call, xopd_parallel_for* parallel) {
  const int64_t height = 2 * xopd::LANES;
  return xopd::for_rows(parallel, (call->rows + height - 1) / height, height * call->columns,
                        [call](int64_t group) { xopd::round_rows(*call, group); });
}

int32_t xopd_run_product(const xopd_product* call, xopd_parallel_for* parallel) {
  const int64_t parts = (call->m + xopd::ROWS_OF_TASK - 1) / xopd::ROWS_OF_TASK;
  const int64_t blocks = (call->n + xopd::COLUMNS - 1) / xopd::COLUMNS;
  // Neighbours have the same block of b: a thread's tasks follow each other.
  return xopd::for_rows(parallel, blocks * parts, xopd::ROWS_OF_TASK * call->k, [=](int64_t task) {
    xopd::multiply_rows(*call, task % parts * xopd::ROWS_OF_TASK, task / parts * xopd::COLUMNS);
  });
}
#else
int32_t xopd_has_matmul() { return 0; }
int32_t xopd_run_pack(const xopd_pack*, xopd_parallel_for*) { return XOPD_NO_MATMUL; }
int32_t xopd_run_round(const xopd_round*, xopd_parallel_for*) { return XOPD_NO_MATMUL; }
int32_t xopd_run_product(const xopd_product*, xopd_parallel_for*) { return XOPD_NO_MATMUL; }
#endif
}
