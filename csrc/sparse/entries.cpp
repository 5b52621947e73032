#include "sparse/element.h"
#include "sparse/sparse.h"

namespace xopd {
namespace {

constexpr int64_t PANEL = 2048;  // columns at a time: their sums stay in the L1 cache
constexpr int64_t GROUP = 4;     // rows that are added at a time

struct alignas(64) Panel {
  float sums[PANEL];
};

// sums[i] += factor[0] row[0][i] + ... for `width` columns, in this order.
template <class Element>
void add_group(const typename Element::Word* const rows[GROUP], const float factors[GROUP],
               int64_t width, float* sums) {
  const Floats f0 = splat(factors[0]), f1 = splat(factors[1]);
  const Floats f2 = splat(factors[2]), f3 = splat(factors[3]);
  int64_t i = 0;
  for (; i + WIDTH <= width; i += WIDTH) {
    Floats sum = load(sums + i);
    sum += Element::load(rows[0] + i) * f0;
    sum += Element::load(rows[1] + i) * f1;
    sum += Element::load(rows[2] + i) * f2;
    sum += Element::load(rows[3] + i) * f3;
    store(sums + i, sum);
  }
  if (i == width) return;
  Floats sum = load_part(sums + i, width - i);
  for (int64_t k = 0; k < GROUP; ++k) {
    sum += load_part_of<Element>(rows[k] + i, width - i) * splat(factors[k]);
  }
  store_part(sums + i, sum, width - i);
}

template <class Element>
void add_one(const typename Element::Word* row, float factor, int64_t width, float* sums) {
  int64_t i = 0;
  for (; i + WIDTH <= width; i += WIDTH) {
    store(sums + i, load(sums + i) + Element::load(row + i) * splat(factor));
  }
  if (i == width) return;
  const Floats part = load_part_of<Element>(row + i, width - i) * splat(factor);
  store_part(sums + i, load_part(sums + i, width - i) + part, width - i);
}

// sums += the sum of values[k] * matrix[index[k]] over the columns [begin, begin + width).
template <class Element>
void add_entries(const xopd_matrix& matrix, const int32_t* index, const float* values,
                 int64_t count, int64_t begin, int64_t width, float* sums) {
  const auto* data = static_cast<const typename Element::Word*>(matrix.data) + begin;
  const typename Element::Word* rows[GROUP];
  float factors[GROUP];
  int64_t waiting = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (values[k] == 0.0f) continue;
    rows[waiting] = data + (index[k] - matrix.first_row) * matrix.row_stride;
    factors[waiting] = values[k];
    if (++waiting < GROUP) continue;
    add_group<Element>(rows, factors, width, sums);
    waiting = 0;
  }
  for (int64_t k = 0; k < waiting; ++k) add_one<Element>(rows[k], factors[k], width, sums);
}

void add_entries(const xopd_matrix& matrix, const int32_t* index, const float* values,
                 int64_t count, int64_t begin, int64_t width, float* sums) {
  switch (matrix.dtype) {
    case XOPD_FLOAT32:
      return add_entries<Float32>(matrix, index, values, count, begin, width, sums);
    case XOPD_BFLOAT16:
      return add_entries<BFloat16>(matrix, index, values, count, begin, width, sums);
    default:
      return add_entries<Float16>(matrix, index, values, count, begin, width, sums);
  }
}

bool is_dtype(int64_t dtype) { return dtype >= XOPD_FLOAT32 && dtype <= XOPD_FLOAT16; }

// Whether the list of a row holds classes of the vocabulary.
bool fits(const xopd_entries& entries, int64_t row) {
  const int64_t count = entries.count[row];
  if (count < 0 || count > entries.row_stride) return false;
  const int32_t* ids = entries.ids + row * entries.row_stride;
  int32_t least = 0, most = -1;
  for (int64_t k = 0; k < count; ++k) {
    least = std::min(least, ids[k]);
    most = std::max(most, ids[k]);
  }
  return least >= 0 && most < entries.classes;
}

bool fits(const xopd_entries& entries) {
  for (int64_t row = 0; row < entries.rows; ++row) {
    if (!fits(entries, row)) return false;
  }
  return true;
}

// The kept entries of a row; `put(k)` of each in turn.
template <class Put>
void for_kept(const xopd_compact& call, int64_t row, const Put& put) {
  const xopd_entries& entries = call.entries;
  const int64_t* place = call.places + row * call.place_count;
  const int64_t* end = place + call.place_count;
  const int64_t first = row * entries.row_stride;
  for (int64_t k = 0; k < entries.count[row]; ++k) {
    const bool is_place = place < end && *place == k;
    place += is_place;
    if (is_place || entries.values[first + k] != 0.0f) put(first + k);
  }
}

void compact_row(const xopd_compact& call, int64_t row) {
  int64_t at = call.row_of[row] * call.out_width;
  const int64_t end = at + call.out_width;
  for_kept(call, row, [&call, &at](int64_t k) {
    call.out_ids[at] = call.entries.ids[k];
    call.out_values[at++] = call.entries.values[k];
  });
  std::fill(call.out_ids + at, call.out_ids + end, -1);
  std::fill(call.out_values + at, call.out_values + end, 0.0f);
}

void gather_row(const xopd_gather& call, int64_t row) {
  const xopd_entries& entries = call.entries;
  const int64_t source = call.row_of[row], begins = call.weight.first_row;
  const int32_t* ids = entries.ids + source * entries.row_stride;
  const int32_t* first = std::lower_bound(ids, ids + entries.count[source], begins);
  const int32_t* last =
      std::lower_bound(first, ids + entries.count[source], begins + call.weight.rows);
  const float* values = entries.values + (first - entries.ids);
  for (int64_t begin = 0; begin < call.dim; begin += PANEL) {
    const int64_t width = std::min(PANEL, call.dim - begin);
    float* out = call.out + row * call.dim + begin;
    add_entries(call.weight, first, values, last - first, begin, width, out);
  }
}

void round_to(uint16_t* out, const float* sums, int64_t width) {
  int64_t i = 0;
  for (; i + WIDTH <= width; i += WIDTH) {
    const Halves rounded = BFloat16::round(load(sums + i));
    std::memcpy(out + i, &rounded, sizeof rounded);
  }
  if (i == width) return;
  const Halves rounded = BFloat16::round(load_part(sums + i, width - i));
  std::memcpy(out + i, &rounded, static_cast<size_t>(width - i) * sizeof out[0]);
}

// The row of `out` of a class that has entries.
void scatter_class(const xopd_scatter& call, int64_t at) {
  const int64_t first = call.offsets[at], count = call.offsets[at + 1] - first;
  if (call.bias != nullptr) {
    double sum = 0.0;
    for (int64_t k = first; k < first + count; ++k) sum += static_cast<double>(call.values[k]);
    call.bias[at] = static_cast<float>(static_cast<double>(call.bias[at]) + sum);
  }
  if (call.out == nullptr) return;
  const bool is_narrow = call.out_dtype == XOPD_BFLOAT16;
  for (int64_t begin = 0; begin < call.dim; begin += PANEL) {
    const int64_t width = std::min(PANEL, call.dim - begin), start = at * call.dim + begin;
    float* wide = is_narrow ? nullptr : static_cast<float*>(call.out) + start;
    Panel panel;
    if (call.adds != 0) {
      std::copy(wide, wide + width, panel.sums);
    } else {
      std::fill(panel.sums, panel.sums + width, 0.0f);
    }
    add_entries(call.hidden, call.rows + first, call.values + first, count, begin, width,
                panel.sums);
    if (is_narrow) {
      round_to(static_cast<uint16_t*>(call.out) + start, panel.sums, width);
    } else {
      std::copy(panel.sums, panel.sums + width, wide);
    }
  }
}

// The classes [begin, end): those without an entry are zeros, or stay.
void scatter_range(const xopd_scatter& call, int64_t begin, int64_t end) {
  const int64_t bytes = call.dim * (call.out_dtype == XOPD_BFLOAT16 ? 2 : 4);
  int64_t zeros = 0;  // classes before this one that are to be zeros
  const auto fill = [&](int64_t at) {
    if (zeros == 0) return;
    std::memset(static_cast<char*>(call.out) + (at - zeros) * bytes, 0,
                static_cast<size_t>(zeros * bytes));
    zeros = 0;
  };
  for (int64_t at = begin; at < end; ++at) {
    if (call.offsets[at] < call.offsets[at + 1]) {
      fill(at);
      scatter_class(call, at);
    } else {
      zeros += call.out != nullptr && call.adds == 0;
    }
  }
  fill(end);
}

// Whether the ranges lie within the entries, and those in the rows of `hidden`.
bool fits(const xopd_scatter& call) {
  if (call.out_dtype != XOPD_FLOAT32 && (call.out_dtype != XOPD_BFLOAT16 || call.adds != 0)) {
    return false;
  }
  int64_t last = std::max<int64_t>(0, call.offsets[0]);
  for (int64_t at = 0; at <= call.classes; ++at) {
    if (call.offsets[at] < last || call.offsets[at] > call.entry_count) return false;
    last = call.offsets[at];
  }
  for (int64_t k = call.offsets[0]; k < last; ++k) {
    if (call.rows[k] < 0 || call.rows[k] >= call.hidden.rows) return false;
  }
  return true;
}

}  // namespace
}  // namespace xopd

extern "C" {

int32_t xopd_compact_entries(const xopd_compact* call, xopd_parallel_for* parallel) {
  if (!xopd::fits(call->entries)) return XOPD_ENTRY_OUT_OF_RANGE;
  for (int64_t row = 0; row < call->entries.rows; ++row) {
    if (call->row_of[row] < 0 || call->row_of[row] >= call->out_rows) return XOPD_ROW_OUT_OF_RANGE;
    int64_t kept = 0;
    xopd::for_kept(*call, row, [&kept](int64_t) { ++kept; });
    if (kept > call->out_width) return XOPD_ENTRY_OUT_OF_RANGE;
  }
  return xopd::for_rows(parallel, call->entries.rows, call->out_width,
                        [call](int64_t row) { xopd::compact_row(*call, row); });
}

int32_t xopd_gather_entries(const xopd_gather* call, xopd_parallel_for* parallel) {
  if (!xopd::is_dtype(call->weight.dtype)) return XOPD_ENTRY_OUT_OF_RANGE;
  // These lists alone: a caller asks for a few of them at a time.
  for (int64_t row = 0; row < call->rows; ++row) {
    const int64_t source = call->row_of[row];
    if (source < 0 || source >= call->entries.rows) return XOPD_ROW_OUT_OF_RANGE;
    if (!xopd::fits(call->entries, source)) return XOPD_ENTRY_OUT_OF_RANGE;
  }
  // A row is about 32 entries: enough for a thread of its own.
  return xopd::for_rows(parallel, call->rows, call->dim * 32,
                        [call](int64_t row) { xopd::gather_row(*call, row); });
}

int32_t xopd_sort_entries(const xopd_sort* call, xopd_parallel_for*) {
  const xopd_entries& entries = call->entries;
  if (!xopd::fits(entries)) return XOPD_ENTRY_OUT_OF_RANGE;
  const auto for_entries = [&entries](const auto& visit) {
    for (int64_t row = 0; row < entries.rows; ++row) {
      const int64_t first = row * entries.row_stride;
      for (int64_t k = first; k < first + entries.count[row]; ++k) {
        if (entries.values[k] != 0.0f) visit(row, entries.ids[k], entries.values[k]);
      }
    }
  };
  // Counted two places on: once they are summed, offsets[v + 1] is where the next one of class v
  // goes, and at last where class v + 1 begins.
  int64_t* offsets = call->offsets;
  std::fill(offsets, offsets + entries.classes + 2, 0);
  for_entries([offsets](int64_t, int32_t id, float) { ++offsets[id + 2]; });
  for (int64_t v = 2; v < entries.classes + 2; ++v) offsets[v] += offsets[v - 1];
  if (offsets[entries.classes + 1] > call->capacity) return XOPD_ENTRY_OUT_OF_RANGE;
  for_entries([call, offsets](int64_t row, int32_t id, float value) {
    const int64_t at = offsets[id + 1]++;
    call->rows[at] = static_cast<int32_t>(row);
    call->values[at] = value;
  });
  return 0;
}

int32_t xopd_scatter_entries(const xopd_scatter* call, xopd_parallel_for* parallel) {
  if (!xopd::is_dtype(call->hidden.dtype) || !xopd::fits(*call)) return XOPD_ENTRY_OUT_OF_RANGE;
  // Parts of equal work, a class without entries counting as one: the frequent classes of a
  // vocabulary lie together.
  constexpr int64_t PARTS = 256;
  const int64_t classes = call->classes, base = call->offsets[0];
  const auto work = [call, base](int64_t at) { return call->offsets[at] - base + at; };
  const auto start = [&](int64_t part) {
    const int64_t before = work(classes) / PARTS * part + work(classes) % PARTS * part / PARTS;
    int64_t low = 0, high = classes;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (work(middle) < before) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const int64_t share = work(classes) / PARTS + 1;
  return xopd::for_rows(parallel, PARTS, share * call->dim, [call, &start](int64_t part) {
    xopd::scatter_range(*call, start(part), part + 1 == PARTS ? call->classes : start(part + 1));
  });
}
}
