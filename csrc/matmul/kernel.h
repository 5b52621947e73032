// The block of a bf16 product that stays in registers, and how it is stored.
#pragma once

#include <algorithm>
#include <cstdint>
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

// The first `count` of 16 lanes.
inline __mmask16 first(int64_t count) {
  return count >= LANES ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
}

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

XOPD_BF16 inline __m256i rounded(__m512 values) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
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
    // The next rows, which may lie in memory: one line of each a line ahead of their turn.
    if (pair % LANES == 0) {
      for (int64_t i = 0; i < M; ++i) __builtin_prefetch(a + (i + M) * a_stride + 2 * pair, 0, 2);
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

}  // namespace
}  // namespace xopd
#endif
