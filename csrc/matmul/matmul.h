// bf16 x bf16 -> fp32 matrix products, which torch does not have on a CPU, and what they read.
//
// A pair is two bf16 numbers that follow each other along the inner dimension, the first one in
// the low half of 32 bits: what the processor's dot product multiplies at a time.
#pragma once

#include <cstdint>

#include "common/abi.h"
#include "common/parallel.h"

extern "C" {
// b as the product reads it, from a matrix [rows, columns] of bf16: blocks of 64 columns n of b,
// each [ceil(k / 2)][64] pairs, with zeros where b ends.
struct xopd_pack {
  const uint16_t* from;
  int64_t rows, columns;
  int64_t row_stride;     // elements
  int64_t is_transposed;  // 0: `from` is b [k, n]; 1: it is b^T [n, k], and k is even
  uint32_t* to;
};

// out [m, n] = a [m, k] b [k, n], or out + a b.
struct xopd_product {
  const uint16_t* a;  // rows of k numbers, with a 0 after them if k is odd
  int64_t a_stride;   // elements
  const uint32_t* b;  // packed
  int64_t m, n, k;
  float* out;         // or null:
  uint16_t* rounded;  // the product rounded to bf16
  int64_t out_stride;
  int64_t is_added;  // to `out`; 0 with `rounded`
  // 1: `out` is [n, m], the product transposed; not with `rounded`, not if it is added to.
  int64_t is_transposed;
};

// out [m, n] += a [m, k] b [k, n], b read where it lies.
struct xopd_unpacked {
  const uint16_t* a;  // as in xopd_product
  int64_t a_stride;
  const uint16_t* b;
  int64_t b_stride;
  int64_t m, n, k;
  float* out;
  int64_t out_stride;
};

// 1 if this object has the products and this processor runs them.
XOPD_EXPORT int32_t xopd_has_matmul();
XOPD_EXPORT int32_t xopd_run_pack(const xopd_pack* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_run_product(const xopd_product* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_run_unpacked(const xopd_unpacked* call, xopd_parallel_for* parallel);
}
