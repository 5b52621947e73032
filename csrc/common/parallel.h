// Rows over threads. The threads are torch's own: the caller hands in its C function.
#pragma once

#include <algorithm>
#include <cstdint>

extern "C" {
typedef void xopd_body(int64_t begin, int64_t end, void* context);
// `torch_parallel_for` of torch's stable C interface; returns 0, or an error that is passed on.
typedef int32_t xopd_parallel_for(int64_t begin, int64_t end, int64_t grain, xopd_body* body,
                                  void* context);
}

namespace xopd {
namespace {

constexpr int64_t GRAIN_ELEMENTS = 16384;  // about 10 us of work: less is not worth a thread

// body(begin, end) for parts of [0, rows), on one thread each; `classes` elements a row.
template <class Body>
int32_t for_ranges(xopd_parallel_for* parallel, int64_t rows, int64_t classes, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, GRAIN_ELEMENTS / std::max<int64_t>(1, classes));
  xopd_body* run = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  return parallel(0, rows, grain, run, const_cast<void*>(static_cast<const void*>(&body)));
}

// body(row) for each row; which thread runs it changes nothing about its result.
template <class Body>
int32_t for_rows(xopd_parallel_for* parallel, int64_t rows, int64_t classes, const Body& body) {
  return for_ranges(parallel, rows, classes, [&body](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace
}  // namespace xopd
