#include "common/sums.h"
#include "softmax/softmax.h"

namespace xopd {
namespace {

// visit(k, ids[k] - first) for the ids of a row that lie in [first, end).
template <class Visit>
void for_ids(const int64_t* ids, int64_t count, int64_t first, int64_t end, const Visit& visit) {
  for (int64_t k = std::lower_bound(ids, ids + count, first) - ids; k < count; ++k) {
    // Ids that do not ascend, against the contract, must not lead out of the piece.
    if (ids[k] < first || ids[k] >= end) break;
    visit(k, ids[k] - first);
  }
}

template <bool HAS_MOMENT>
void add_row(const xopd_statistics& call, int64_t row) {
  Buffer z;
  RowSums sums{call.maximum[row], call.total[row], HAS_MOMENT ? call.moment[row] : 0.0};
  const int64_t* ids = call.ids + row * call.id_count;
  float* at_ids = call.at_ids + row * call.id_count;
  for (int64_t begin = 0; begin < call.classes; begin += PIECE) {
    const int64_t count = std::min(PIECE, call.classes - begin);
    transform(call.logits, row, begin, count, z, nullptr);
    const int64_t first = call.first_class + begin;
    for_ids(ids, call.id_count, first, first + count, [&](int64_t k, int64_t at) {
      at_ids[k] = z.values[at];
      z.values[at] = -INF;
    });
    sums.raise(largest_of(z, padded(count)));
    sums.add<HAS_MOMENT>(z.values, padded(count));
  }
  call.maximum[row] = sums.maximum;
  call.total[row] = sums.total;
  if (HAS_MOMENT) call.moment[row] = sums.moment;
}

template <bool HAS_GAMMA>
void write_piece(const xopd_gradient& call, int64_t row, const Buffer& z, const Buffer* slope,
                 int64_t count, float* out) {
  const Floats maximum = splat(call.maximum[row]), scale = splat(call.logits.scale);
  const Floats alpha = splat(call.alpha[row]);
  const Floats gamma = splat(HAS_GAMMA ? call.gamma[row] : 0.0f);
  const auto value = [&](int64_t at) {
    const Floats shifted = load(z.values + at) - maximum;
    Floats factor = alpha;
    if (HAS_GAMMA) factor = gamma * at_least(shifted, splat(LOG_ZERO)) + alpha;
    return exp(shifted) * factor * (slope == nullptr ? scale : load(slope->values + at));
  };
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(out + i, value(i));
  if (i < count) store_part(out + i, value(i), count - i);
}

// The classes [begin, begin + count) of a row, at most a piece.
template <bool HAS_GAMMA>
void write_classes(const xopd_gradient& call, int64_t row, int64_t begin, int64_t count,
                   float* out) {
  Buffer z, slopes;
  Buffer* slope = call.logits.cap == 0.0f ? nullptr : &slopes;
  const int64_t source = call.row_of == nullptr ? row : call.row_of[row];
  const int64_t* ids = call.ids + row * call.id_count;
  const float* at_ids = call.at_ids + row * call.id_count;
  transform(call.logits, source, begin, count, z, slope);
  write_piece<HAS_GAMMA>(call, row, z, slope, count, out);
  const int64_t first = call.first_class + begin;
  for_ids(ids, call.id_count, first, first + count, [&](int64_t k, int64_t at) {
    out[at] = at_ids[k] * (slope == nullptr ? call.logits.scale : slope->values[at]);
  });
}

}  // namespace
}  // namespace xopd

extern "C" {

int32_t xopd_abi_version() { return XOPD_ABI_VERSION; }

int32_t xopd_add_statistics(const xopd_statistics* call, xopd_parallel_for* parallel) {
  return xopd::for_rows(parallel, call->rows, call->classes, [call](int64_t row) {
    if (call->moment == nullptr) {
      xopd::add_row<false>(*call, row);
    } else {
      xopd::add_row<true>(*call, row);
    }
  });
}

int32_t xopd_write_gradient(const xopd_gradient* call, xopd_parallel_for* parallel) {
  for (int64_t row = 0; call->row_of != nullptr && row < call->rows; ++row) {
    const int64_t source = call->row_of[row];
    if (source < 0 || source >= call->logit_rows) return XOPD_ROW_OUT_OF_RANGE;
  }
  const auto write =
      call->gamma == nullptr ? xopd::write_classes<false> : xopd::write_classes<true>;
  return xopd::write_d_logit(call->d_logit, call->rows, call->classes, parallel,
                             [=](int64_t row, int64_t begin, int64_t count, float* out) {
                               write(*call, row, begin, count, out);
                             });
}
}
