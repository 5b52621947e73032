#include "matmul/rounding.h"

#include "matmul/kernel.h"

#if defined(__AVX512F__)
namespace xopd {
namespace {

XOPD_BF16 inline __m256i load_rounded(const float* from, __mmask16 mask) {
  return rounded(_mm512_maskz_loadu_ps(mask, from));
}

XOPD_BF16 inline __m256i load_rounded(const uint16_t* from, __mmask16 mask) {
  return _mm256_maskz_loadu_epi16(mask, from);
}

// 16 columns at a time.
template <class Element>
XOPD_BF16 inline void round_columns(const Part& part, const Element* from, int64_t stride,
                                    uint16_t* straight, uint16_t* transposed) {
  const int64_t width = part.all_columns + part.all_columns % 2;
  const int64_t height = part.all_rows + part.all_rows % 2;
  for (int64_t at = 0; at < part.columns; at += LANES) {
    const __mmask16 mask = first(part.columns - at);
    const int64_t column = part.column + at;
    __m256i row[GROUP];
    for (int64_t i = 0; i < GROUP; ++i) {
      row[i] = _mm256_setzero_si256();
      if (i >= part.rows) continue;
      row[i] = load_rounded(from + i * stride + at, mask);
      if (straight != nullptr) {
        uint16_t* to = straight + (part.row + i) * width + column;
        _mm256_mask_storeu_epi16(to, first(width - column), row[i]);
      }
    }
    if (transposed == nullptr) continue;
    __m512i words[LANES];
    for (int64_t i = 0; i < LANES; ++i) words[i] = pairs_of(row[2 * i], row[2 * i + 1]);
    transpose(words);
    const __mmask16 pairs = first((height - part.row) / 2);
    for (int64_t i = 0; i < std::min(LANES, part.columns - at); ++i) {
      _mm512_mask_storeu_epi32(transposed + (column + i) * height + part.row, pairs, words[i]);
    }
  }
}

}  // namespace

void round_part(const xopd_d_logit& to, const Part& part, const float* from, int64_t stride) {
  round_columns(part, from, stride, to.straight, to.transposed);
  if (to.sums == nullptr) return;
  float* sums = to.sums + part.row / GROUP * part.all_columns + part.column;
  std::fill(sums, sums + part.columns, 0.0f);
  for (int64_t i = 0; i < part.rows; ++i) {
    for (int64_t at = 0; at < part.columns; ++at) sums[at] += from[i * stride + at];
  }
}

}  // namespace xopd

extern "C" int32_t xopd_run_factors(const xopd_factors* call, xopd_parallel_for* parallel) {
  const int64_t groups = (call->rows + xopd::GROUP - 1) / xopd::GROUP;
  return xopd::for_rows(parallel, groups, xopd::GROUP * call->columns, [call](int64_t group) {
    const int64_t row = group * xopd::GROUP;
    const xopd::Part part{
        call->rows, call->columns, row, 0, std::min(xopd::GROUP, call->rows - row), call->columns};
    xopd::round_columns(part, call->from + row * call->row_stride, call->row_stride, call->straight,
                        call->transposed);
  });
}
#else
extern "C" int32_t xopd_run_factors(const xopd_factors*, xopd_parallel_for*) {
  return XOPD_NO_MATMUL;
}
#endif
