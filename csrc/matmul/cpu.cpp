#include "matmul/matmul.h"

#include <cstring>

#if defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own header's _mm512_undefined_epi32 (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
// Which the object is not compiled for: no other function of it may use these instructions.
#define XOPD_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace xopd {
namespace {

constexpr int64_t LANES = 16;
constexpr int64_t VECTORS = 4;  // of a row of the block of `out` that stays in registers
constexpr int64_t COLUMNS = VECTORS * LANES;
constexpr int64_t ROWS = 6;  // 6 x 4 sums, 4 vectors of b and one of a are 29 of 32 registers
constexpr int64_t ROWS_OF_TASK = 32 * ROWS;


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

// The first `count` of 16 lanes.
inline __mmask16 first(int64_t count) {
  return count >= LANES ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
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
        const __m256i high = is_whole ? load_row(low + call.row_stride + at, count)
                                      : _mm256_setzero_si256();
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
        words[i] = _mm512_maskz_loadu_epi32(mask,
                                            call.from + (begin + i) * call.row_stride + 2 * pair);
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
      const float* from = call.from + (begin + i) * call.row_stride + column;
      row[i] = rounded(_mm512_maskz_loadu_ps(mask, from));
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

// A block [M, 64] of the product over `pairs` pairs, in registers.
template <int64_t M>
XOPD_BF16 inline void multiply(const uint16_t* a, int64_t a_stride, const uint32_t* b,
                               int64_t pairs, __m512 (&sums)[M][VECTORS]) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512i columns[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) {
      columns[v] = _mm512_loadu_si512(b + pair * COLUMNS + v * LANES);
    }
    for (int64_t i = 0; i < M; ++i) {
      int32_t word;
      std::memcpy(&word, a + i * a_stride + 2 * pair, sizeof word);
      const __m512i row = _mm512_set1_epi32(word);
      for (int64_t v = 0; v < VECTORS; ++v) {
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], reinterpret_cast<__m512bh>(row),
                                      reinterpret_cast<__m512bh>(columns[v]));
      }
    }
  }
}

// The columns of [M, 16] as rows of M numbers, `stride` apart, the first `count` of them.
template <int64_t M>
XOPD_BF16 inline void store_columns(const __m512 (&sums)[M], float* out, int64_t stride,
                                    int64_t count) {
  alignas(64) float block[M][LANES];
  for (int64_t i = 0; i < M; ++i) _mm512_store_ps(block[i], sums[i]);
  for (int64_t column = 0; column < count; ++column) {
    for (int64_t i = 0; i < M; ++i) out[column * stride + i] = block[i][column];
  }
}

// Six rows: by fours and twos in registers.
template <>
XOPD_BF16 inline void store_columns<ROWS>(const __m512 (&r)[ROWS], float* out, int64_t stride,
                                          int64_t count) {
  __m512 low[2], high[2], pair[2], four[LANES / 4];
  for (int64_t i = 0; i < 2; ++i) {
    low[i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    high[i] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  pair[0] = _mm512_unpacklo_ps(r[4], r[5]);
  pair[1] = _mm512_unpackhi_ps(r[4], r[5]);
  // Of the columns 4 l + j, in the 128 bits l of four[j].
  four[0] = _mm512_shuffle_ps(low[0], low[1], 0x44);
  four[1] = _mm512_shuffle_ps(low[0], low[1], 0xee);
  four[2] = _mm512_shuffle_ps(high[0], high[1], 0x44);
  four[3] = _mm512_shuffle_ps(high[0], high[1], 0xee);
  alignas(64) float fours[4][LANES], pairs[2][LANES];
  for (int64_t j = 0; j < 4; ++j) _mm512_store_ps(fours[j], four[j]);
  for (int64_t j = 0; j < 2; ++j) _mm512_store_ps(pairs[j], pair[j]);
  for (int64_t column = 0; column < count; ++column) {
    float* to = out + column * stride;
    const int64_t j = column % 4, l = column / 4;
    std::memcpy(to, &fours[j][4 * l], 4 * sizeof(float));
    std::memcpy(to + 4, &pairs[j / 2][4 * l + j % 2 * 2], 2 * sizeof(float));
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
