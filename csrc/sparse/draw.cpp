#include "sparse/sparse.h"

namespace xopd {
namespace {

// Adds the exponentials `e` of a piece to `running`: at once where their sum stays at or below the
// point, else class by class until it is above.
void find(const xopd_draw& call, int64_t row, const Buffer& e, const Buffer* slope, int64_t count,
          int64_t first) {
  Sum sums;
  for (int64_t i = 0; i < padded(count); i += STEP) {
    for (int64_t k = 0; k < UNROLL; ++k) sums.lanes[k] += load(e.values + i + k * WIDTH);
  }
  const double whole = call.running[row] + sums.total();
  int64_t at = count - 1;
  if (whole <= call.point[row]) {
    while (at >= 0 && !(e.values[at] > 0.0f)) --at;
    if (at < 0) return;
    call.running[row] = whole;
  } else {
    double running = call.running[row];
    int64_t found = -1;
    for (at = 0; at < count; ++at) {
      if (!(e.values[at] > 0.0f)) continue;
      found = at;
      running += static_cast<double>(e.values[at]);
      if (running > call.point[row]) break;
    }
    call.running[row] = running;
    if (found < 0) return;  // NaN alone
    if (at < count) call.drawn[row] = first + at;
    at = found;
  }
  call.last[row] = first + at;
  if (slope != nullptr) call.slope[row] = slope->values[at];
}

void draw_row(const xopd_draw& call, int64_t row) {
  if (call.drawn[row] >= 0) return;
  const int64_t source = call.row_of[row];
  const float* values = call.kept.values + source * call.kept.row_stride;
  const int32_t* ids = call.kept.ids + source * call.kept.row_stride;
  const int32_t* end = ids + call.kept.count[source];
  const int32_t* id = std::lower_bound(ids, end, call.first_class);
  const Floats maximum = splat(call.maximum[source]);
  Buffer e, slopes;
  Buffer* slope = call.slope == nullptr ? nullptr : &slopes;
  for (int64_t begin = 0; begin < call.classes && call.drawn[row] < 0; begin += PIECE) {
    const int64_t count = std::min(PIECE, call.classes - begin);
    transform(call.logits, source, begin, count, e, slope);
    const int64_t first = call.first_class + begin;
    for (; id < end && *id < first + count; ++id) {
      // One before the piece, against the contract, must not lead out of it.
      if (*id >= first && values[id - ids] != 0.0f) e.values[*id - first] = -INF;
    }
    for (int64_t i = 0; i < padded(count); i += WIDTH) {
      store(e.values + i, exp(load(e.values + i) - maximum));
    }
    find(call, row, e, slope, count, first);
  }
}

bool row_numbers_fit(const int64_t* row_of, int64_t count, int64_t rows) {
  return std::all_of(row_of, row_of + count,
                     [rows](int64_t row) { return row >= 0 && row < rows; });
}

void insert(const xopd_insert& call, int64_t row) {
  const int64_t list = call.row_of[row], first = list * call.row_stride;
  const int32_t added = static_cast<int32_t>(call.classes[row]);
  int32_t* ids = call.ids + first;
  float* values = call.values + first;
  const int64_t count = call.count[list];
  const int64_t at = std::lower_bound(ids, ids + count, added) - ids;
  if (at == count || ids[at] != added) {
    std::copy_backward(ids + at, ids + count, ids + count + 1);
    std::copy_backward(values + at, values + count, values + count + 1);
    ids[at] = added;
    ++call.count[list];
  }
  values[at] = call.added[row];
}

}  // namespace
}  // namespace xopd

extern "C" {

int32_t xopd_insert_entries(const xopd_insert* call, xopd_parallel_for*) {
  if (!xopd::row_numbers_fit(call->row_of, call->rows, call->list_rows)) {
    return XOPD_ROW_OUT_OF_RANGE;
  }
  for (int64_t row = 0; row < call->rows; ++row) {
    if (call->classes[row] < 0) continue;
    const int64_t count = call->count[call->row_of[row]];
    const bool fits = call->classes[row] <= INT32_MAX && count >= 0 && count < call->row_stride;
    if (!fits) return XOPD_ENTRY_OUT_OF_RANGE;
    xopd::insert(*call, row);
  }
  return 0;
}

int32_t xopd_draw_entries(const xopd_draw* call, xopd_parallel_for* parallel) {
  if (!xopd::row_numbers_fit(call->row_of, call->rows, call->kept.rows)) {
    return XOPD_ROW_OUT_OF_RANGE;
  }
  for (int64_t row = 0; row < call->kept.rows; ++row) {
    if (call->kept.count[row] < 0 || call->kept.count[row] > call->kept.row_stride) {
      return XOPD_ENTRY_OUT_OF_RANGE;
    }
  }
  return xopd::for_rows(parallel, call->rows, call->classes,
                        [call](int64_t row) { xopd::draw_row(*call, row); });
}
}
