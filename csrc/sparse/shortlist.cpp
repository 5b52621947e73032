#include "common/sums.h"
#include "sparse/sparse.h"

namespace xopd {
namespace {

// The lanes of a comparison that are true, as bits of words: of lane i bit 8 (i % 8).
struct Lanes {
  uint64_t words[(WIDTH + 7) / 8];

  static Lanes of(Ints mask) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lane 0 is in the low bits");
    typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
    const Bytes bytes = __builtin_convertvector(mask, Bytes);
    Lanes lanes = {};
    std::memcpy(lanes.words, &bytes, sizeof bytes);
    for (uint64_t& word : lanes.words) word &= 0x0101010101010101u;
    return lanes;
  }

  bool any() const {
    uint64_t all = 0;
    for (const uint64_t word : words) all |= word;
    return all != 0;
  }

  // visit(lane), from the first one on.
  template <class Visit>
  void each(const Visit& visit) const {
    int64_t first = 0;
    for (uint64_t word : words) {
      for (; word != 0; word &= word - 1) visit(first + __builtin_ctzll(word) / 8);
      first += 8;
    }
  }
};

// Whole numbers in the order of the floats.
int32_t rank_of(float z) {
  int32_t word;
  std::memcpy(&word, &z, sizeof word);
  return word ^ (word < 0 ? 0x7fffffff : 0);
}

float of_rank(int32_t rank) {
  const int32_t word = rank ^ (rank < 0 ? 0x7fffffff : 0);
  float z;
  std::memcpy(&z, &word, sizeof z);
  return z;
}

int64_t count_above(const float* z, int64_t count, float least) {
  Ints lanes[UNROLL] = {};
  int64_t i = 0;
  for (; i + STEP <= count; i += STEP) {
    for (int64_t k = 0; k < UNROLL; ++k) lanes[k] -= load(z + i + k * WIDTH) > splat(least);
  }
  const Ints all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  int64_t result = 0;
  for (int64_t lane = 0; lane < WIDTH; ++lane) result += all[lane];
  for (; i < count; ++i) result += z[i] > least;
  return result;
}

// Which of some values are the largest: those above `least`, and the first `ties` of its size.
struct Cut {
  float least;
  int64_t ties;

  // At least `wanted` of more values than that, at most `most`; none lies below `low` or above
  // `high`.
  static Cut of(const float* z, int64_t count, int64_t wanted, int64_t most, float low,
                float high) {
    int64_t below = int64_t{rank_of(low)} - 1, above = rank_of(high);  // of the `wanted`-th largest
    int64_t over = 0;                                                  // values over `above`
    while (below + 1 < above) {
      const int64_t middle = below + (above - below) / 2;
      const float least = of_rank(static_cast<int32_t>(middle));
      const int64_t found = count_above(z, count, least);
      if (found >= wanted && found <= most) return {least, 0};
      if (found > wanted) {
        below = middle;
      } else {
        above = middle;
        over = found;
      }
    }
    return {of_rank(static_cast<int32_t>(above)), wanted - over};
  }
};

// The list of a row; what leaves it goes into the sums.
template <bool HAS_MOMENT>
struct List {
  RowSums sums;
  int64_t count;
  float cutoff;
  int32_t* ids;
  float* z;
  float* slope;  // or null

  static List of(const xopd_shortlist& call, int64_t row) {
    const int64_t first = row * call.capacity;
    return {{call.maximum[row], call.outside[row], HAS_MOMENT ? call.moment[row] : 0.0},
            call.count[row],
            call.cutoff[row],
            call.listed + first,
            call.z + first,
            call.slope == nullptr ? nullptr : call.slope + first};
  }

  void put(const xopd_shortlist& call, int64_t row) const {
    call.maximum[row] = sums.maximum;
    call.outside[row] = sums.total;
    if (HAS_MOMENT) call.moment[row] = sums.moment;
    call.count[row] = count;
    call.cutoff[row] = cutoff;
  }

  // Keeps the entries that `is_kept` says, in their order.
  template <class Predicate>
  void keep(const Predicate& is_kept) {
    Buffer leaving;
    int64_t kept = 0, left = 0;
    const auto flush = [&] {
      std::fill(leaving.values + left, leaving.values + padded(left), -INF);
      sums.template add<HAS_MOMENT>(leaving.values, padded(left));
      left = 0;
    };
    for (int64_t i = 0; i < count; ++i) {
      const float value = z[i];
      const bool stays = is_kept(value);
      leaving.values[left] = value;
      left += !stays;
      if (left == PIECE) flush();
      ids[kept] = ids[i];
      z[kept] = value;
      if (slope != nullptr) slope[kept] = slope[i];
      kept += stays;
    }
    flush();
    count = kept;
  }

  // At most `most` entries, all above `floor`, and at least `limit` of those; the first of equals.
  void prune(int64_t limit, int64_t most, float floor) {
    if (floor > cutoff) {
      keep([floor](float value) { return value > floor; });
      cutoff = floor;
    }
    if (count <= most) return;
    Cut cut = Cut::of(z, count, limit, most, cutoff, sums.maximum);
    cutoff = cut.least;
    keep([&cut](float value) {
      const bool is_tie = value == cut.least && cut.ties > 0;
      cut.ties -= is_tie;
      return value > cut.least || is_tie;
    });
  }

  // Moves what is above the cutoff from `values` to the list.
  void take(const xopd_shortlist& call, Buffer& values, const Buffer* slopes, int64_t width,
            int32_t first, float floor) {
    for (int64_t i = 0; i < width; i += STEP) {
      Ints hits = {};
      for (int64_t k = 0; k < UNROLL; ++k) {
        hits |= load(values.values + i + k * WIDTH) > splat(std::max(cutoff, floor));
      }
      if (!Lanes::of(hits).any()) continue;
      for (int64_t at = i; at < i + STEP; at += WIDTH) {
        take_lanes(call, values, slopes, at, first + static_cast<int32_t>(at), floor);
      }
    }
  }

  void take_lanes(const xopd_shortlist& call, Buffer& values, const Buffer* slopes, int64_t at,
                  int32_t first, float floor) {
    const Floats value = load(values.values + at);
    Lanes lanes = Lanes::of(value > splat(std::max(cutoff, floor)));
    if (!lanes.any()) return;
    if (count + WIDTH > call.capacity) {
      // Not exactly `limit`, so that the cut is found soon.
      prune(call.limit, call.limit + (call.capacity - call.limit - WIDTH) / 4, floor);
      lanes = Lanes::of(value > splat(std::max(cutoff, floor)));
    }
    const float least = std::max(cutoff, floor);
    lanes.each([&](int64_t lane) {
      ids[count] = first + static_cast<int32_t>(lane);
      z[count] = values.values[at + lane];
      if (slope != nullptr) slope[count] = slopes->values[at + lane];
      ++count;
    });
    store(values.values + at, value > splat(least) ? splat(-INF) : value);
  }
};

template <bool HAS_MOMENT>
void add_row(const xopd_shortlist& call, int64_t row) {
  Buffer z, slopes;
  Buffer* slope = call.slope == nullptr ? nullptr : &slopes;
  auto list = List<HAS_MOMENT>::of(call, row);
  const int64_t *ids = call.ids + row * call.id_count, *end = ids + call.id_count;
  const int64_t* id = std::lower_bound(ids, end, call.first_class);
  for (int64_t begin = 0; begin < call.classes; begin += PIECE) {
    const int64_t count = std::min(PIECE, call.classes - begin);
    transform(call.logits, row, begin, count, z, slope);
    const int64_t first = call.first_class + begin;
    // Ids that do not ascend, against the contract, must not lead out of the piece.
    for (; id < end && *id >= first && *id < first + count; ++id) {
      const int64_t at = row * call.id_count + (id - ids);
      call.at_ids[at] = z.values[*id - first];
      if (slope != nullptr) call.id_slope[at] = slope->values[*id - first];
      z.values[*id - first] = -INF;
    }
    const float found = largest_of(z, padded(count));
    list.sums.raise(found);
    const float floor = list.sums.maximum - call.reach;  // -inf before the first logit
    if (found > std::max(list.cutoff, floor)) {
      list.take(call, z, slope, padded(count), static_cast<int32_t>(first), floor);
    }
    list.sums.template add<HAS_MOMENT>(z.values, padded(count));
  }
  list.put(call, row);
}

// The ids between the entries, in place: from the back.
void insert_ids(const xopd_finish& call, int64_t row) {
  const xopd_shortlist& lists = call.lists;
  const int64_t id_count = lists.id_count, first = row * lists.capacity;
  int64_t entry = lists.count[row] - 1, place = entry + id_count;
  for (int64_t id = id_count - 1; id >= 0; --id, --place) {
    const int64_t at = row * id_count + id;
    for (; entry >= 0 && lists.listed[first + entry] > lists.ids[at]; --entry, --place) {
      lists.listed[first + place] = lists.listed[first + entry];
      lists.z[first + place] = lists.z[first + entry];
      if (lists.slope != nullptr) lists.slope[first + place] = lists.slope[first + entry];
    }
    lists.listed[first + place] = static_cast<int32_t>(lists.ids[at]);
    lists.z[first + place] = 0.0f;
    if (lists.slope != nullptr) lists.slope[first + place] = lists.id_slope[at];
    call.places[at] = place;
  }
  lists.count[row] += id_count;
}

template <bool HAS_MOMENT>
void finish_row(const xopd_finish& call, int64_t row) {
  const xopd_shortlist& lists = call.lists;
  auto list = List<HAS_MOMENT>::of(lists, row);
  list.prune(lists.limit, lists.limit, list.sums.maximum - lists.reach);
  list.put(lists, row);
  RowSums inside{list.sums.maximum, 0.0, 0.0};
  Buffer z, e;
  for (int64_t begin = 0; begin < list.count; begin += PIECE) {
    const int64_t count = std::min(PIECE, list.count - begin);
    std::copy(list.z + begin, list.z + begin + count, z.values);
    std::fill(z.values + count, z.values + padded(count), -INF);
    inside.template add<HAS_MOMENT>(z.values, padded(count), e.values);
    std::copy(e.values, e.values + count, list.z + begin);
  }
  call.inside[row] = inside.total;
  if (HAS_MOMENT) call.inside_moment[row] = inside.moment;
  insert_ids(call, row);
  const int64_t first = row * lists.capacity, end = first + lists.capacity;
  std::fill(lists.listed + first + lists.count[row], lists.listed + end, -1);
  std::fill(lists.z + first + lists.count[row], lists.z + end, 0.0f);
  if (lists.slope == nullptr) return;
  std::fill(lists.slope + first + lists.count[row], lists.slope + end, 0.0f);
}

// Whether the lists have room, and their entries lie in it.
bool fits(const xopd_shortlist& call) {
  const bool has_room =
      call.limit > 0 && call.capacity >= call.limit + std::max(WIDTH, call.id_count);
  return has_room && std::all_of(call.count, call.count + call.rows, [&call](int64_t count) {
           return count >= 0 && count <= call.capacity;
         });
}

bool ids_ascend(const xopd_shortlist& call) {
  for (int64_t row = 0; row < call.rows; ++row) {
    int64_t last = -1;
    for (int64_t k = row * call.id_count; k < (row + 1) * call.id_count; ++k) {
      if (call.ids[k] <= last || call.ids[k] > INT32_MAX) return false;
      last = call.ids[k];
    }
  }
  return true;
}

}  // namespace
}  // namespace xopd

extern "C" {

int32_t xopd_add_shortlist(const xopd_shortlist* call, xopd_parallel_for* parallel) {
  if (!xopd::fits(*call) || call->first_class + call->classes > INT32_MAX) {
    return XOPD_ENTRY_OUT_OF_RANGE;
  }
  return xopd::for_rows(parallel, call->rows, call->classes, [call](int64_t row) {
    if (call->moment == nullptr) {
      xopd::add_row<false>(*call, row);
    } else {
      xopd::add_row<true>(*call, row);
    }
  });
}

int32_t xopd_finish_shortlist(const xopd_finish* call, xopd_parallel_for* parallel) {
  const xopd_shortlist& lists = call->lists;
  if (!xopd::fits(lists) || !xopd::ids_ascend(lists)) return XOPD_ENTRY_OUT_OF_RANGE;
  return xopd::for_rows(parallel, lists.rows, lists.capacity, [call](int64_t row) {
    if (call->lists.moment == nullptr) {
      xopd::finish_row<false>(*call, row);
    } else {
      xopd::finish_row<true>(*call, row);
    }
  });
}
}
