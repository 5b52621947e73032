#include "matmul/scores.h"

#include "common/sums.h"
#include "matmul/kernel.h"

#if defined(__AVX512F__)
namespace xopd {
namespace {

static_assert(WIDTH == LANES, "a vector of sums is a vector of floats");
static_assert(sizeof(xopd_tile_sums::maximum) == COLUMNS * sizeof(float), "one for each column");

// How far above its reference a logit may lie: e^16 of a sum in fp64 loses nothing. Without it a
// row's maximum is exp(0), exactly 1 and counted apart; with it, exp's error of 1e-7 hides what the
// other classes add to a probability near 1. So there is none where that class may be among those
// summed: without ids. A moment has none either, as its terms would no longer have one sign.
constexpr float HEADROOM = 16.0f;

// Where the outputs of a task's tile go: those of row 0, class 0 of the tile.
struct Place {
  float* out;
  int64_t stride;  // from row to row

  static Place of(const xopd_scores& call, int64_t begin) {
    if (call.out == nullptr) return {nullptr, 0};
    const int64_t first = begin / call.out_tile * call.out_tile;
    const int64_t stride = std::min(call.out_tile, call.classes - first);
    return {call.out + first * call.out_class + stride * call.out_offset + (begin - first), stride};
  }
};

// What a task keeps of its 64 rows while it goes through a tile.
struct Rows64 {
  alignas(64) int32_t next[COLUMNS];  // class of the next id, counted in the tile
  int64_t at[COLUMNS];                // which of the row's ids that is
};

constexpr int32_t NO_CLASS = std::numeric_limits<int32_t>::max();

// The `at`-th id of a row as a class of the tile [begin, end), NO_CLASS if it is not one of them.
inline int32_t class_of(const xopd_scores& call, int64_t row, int64_t at, int64_t begin,
                        int64_t end) {
  if (at >= call.id_count) return NO_CLASS;
  const int64_t id = call.ids[row * call.id_count + at] - call.first_class;
  // Ids that do not ascend, against the contract, must not lead out of the tile.
  return id >= begin && id < end ? static_cast<int32_t>(id - begin) : NO_CLASS;
}

inline void find_ids(const xopd_scores& call, int64_t first_row, int64_t begin, int64_t end,
                     Rows64& rows) {
  for (int64_t i = 0; i < COLUMNS; ++i) {
    const int64_t row = first_row + i;
    rows.next[i] = NO_CLASS;
    if (row >= call.rows) continue;
    const int64_t* ids = call.ids + row * call.id_count;
    rows.at[i] = std::lower_bound(ids, ids + call.id_count, call.first_class + begin) - ids;
    rows.next[i] = class_of(call, row, rows.at[i], begin, end);
  }
}

// Writes the logits z [M, 16] of ids among the classes [at, at + M) of the tile, and takes them
// out.
template <int64_t M>
void take_ids(const xopd_scores& call, int64_t first_row, int64_t begin, int64_t end, int64_t at,
              int64_t lane, Floats (&z)[M], Rows64& rows) {
  for (int64_t i = 0; i < LANES; ++i) {
    const int64_t row = first_row + lane + i;
    int32_t& next = rows.next[lane + i];
    while (next < at + M) {
      Floats& found = z[next - at];
      call.at_ids[row * call.id_count + rows.at[lane + i]] = found[i];
      found[i] = -INF;
      const int32_t last = next;
      next = class_of(call, row, ++rows.at[lane + i], begin, end);
      if (next < last) next = NO_CLASS;  // they do not ascend
    }
  }
}

// Rows whose logits rose above what their reference allows get another one.
inline void raise(Floats found, float headroom, bool has_moment, float* reference, double* total,
                  double* moment) {
  for (int64_t i = 0; i < LANES; ++i) {
    if (!(found[i] > reference[i] + headroom)) continue;
    RowSums sums{reference[i], total[i], has_moment ? moment[i] : 0.0};
    sums.raise(found[i]);
    reference[i] = sums.maximum;
    total[i] = sums.total;
    if (has_moment) moment[i] = sums.moment;
  }
}

XOPD_BF16 inline void add_to(double* sums, Floats values) {
  const __m512 v = reinterpret_cast<__m512>(values);
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

// Adds the logits z [M, 16] of 16 rows to their sums.
template <int64_t M, bool HAS_MOMENT>
XOPD_BF16 inline void add_logits(const Floats (&z)[M], float headroom, float* maximum,
                                 float* reference, double* total, double* moment) {
  Floats found = larger(z[0], splat(-INF));  // passes over a NaN; the sum has it
  for (int64_t i = 1; i < M; ++i) found = larger(z[i], found);
  store(maximum, larger(found, load(maximum)));
  const Floats bound = load(reference) + headroom;
  if (_mm512_cmp_ps_mask(reinterpret_cast<__m512>(found), reinterpret_cast<__m512>(bound),
                         _CMP_GT_OQ) != 0) {
    raise(found, headroom, HAS_MOMENT, reference, total, moment);
  }
  const Floats old = load(reference);
  const Floats base = old == splat(-INF) ? Floats{} : old;
  const Floats one = splat(1.0f);
  Floats sum{}, tops{}, weighted{};
  for (int64_t i = 0; i < M; ++i) {
    const Floats shifted = z[i] - base, e = exp(shifted);
    const auto is_top = shifted == Floats{};
    sum += is_top ? Floats{} : e;  // as in RowSums.add
    tops += is_top ? one : Floats{};
    if (HAS_MOMENT) weighted += e * at_least(shifted, splat(LOG_ZERO));
  }
  add_to(total, sum);
  add_to(total, tops);
  if (HAS_MOMENT) add_to(moment, weighted);
}

// The classes [at, at + M) of the tile [begin, end) for 64 rows.
template <int64_t M, bool HAS_MOMENT>
XOPD_BF16 void score_block(const xopd_scores& call, const Place& place, int64_t first_row,
                           int64_t begin, int64_t end, int64_t at, Rows64& rows,
                           xopd_tile_sums& sums) {
  const int64_t pairs = call.k / 2;
  const float headroom = HAS_MOMENT || call.id_count == 0 ? 0.0f : HEADROOM;
  __m512 products[M][VECTORS];
  for (auto& row : products) {
    for (auto& vector : row) vector = _mm512_setzero_ps();
  }
  multiply<M>(call.weight + (begin + at) * call.weight_stride, call.weight_stride,
              call.hidden + first_row * pairs, pairs, products);
  for (int64_t v = 0; v < VECTORS; ++v) {
    const int64_t lane = v * LANES, row = first_row + lane;
    const int64_t count = std::min(LANES, call.rows - row);
    if (count <= 0) return;
    __m512 x[M];
    for (int64_t i = 0; i < M; ++i) x[i] = products[i][v];
    if (place.out != nullptr) {
      store_columns<M>(x, place.out + place.stride * row + at, place.stride, count);
    }
    Floats z[M];
    for (int64_t i = 0; i < M; ++i) {
      Floats linear = reinterpret_cast<Floats>(x[i]);
      if (call.bias != nullptr) linear += call.bias[begin + at + i];
      z[i] = linear * call.scale;
      if (call.cap != 0.0f) z[i] = Tanh::of(z[i]).value * call.cap;
      // As in `transform`: a multiplication that is one rounding with what follows would make the
      // logits of the statistics others than those of the gradient.
      asm volatile("" : "+v"(z[i]));
    }
    const __m512i next = _mm512_load_si512(rows.next + lane);
    const __m512i last = _mm512_set1_epi32(static_cast<int32_t>(at + M));
    if (_mm512_cmplt_epi32_mask(next, last) != 0) {
      take_ids<M>(call, first_row, begin, end, at, lane, z, rows);
    }
    add_logits<M, HAS_MOMENT>(z, headroom, sums.maximum + lane, sums.reference + lane,
                              sums.total + lane, sums.moment + lane);
  }
}

template <bool HAS_MOMENT>
void score_tile(const xopd_scores& call, int64_t tile, int64_t first_row, xopd_tile_sums& sums) {
  using Block = void (*)(const xopd_scores&, const Place&, int64_t, int64_t, int64_t, int64_t,
                         Rows64&, xopd_tile_sums&);
  constexpr Block BLOCKS[ROWS] = {score_block<1, HAS_MOMENT>, score_block<2, HAS_MOMENT>,
                                  score_block<3, HAS_MOMENT>, score_block<4, HAS_MOMENT>,
                                  score_block<5, HAS_MOMENT>, score_block<6, HAS_MOMENT>};
  const int64_t begin = tile * call.tile, end = std::min(begin + call.tile, call.classes);
  for (int64_t i = 0; i < COLUMNS; ++i) {
    sums.maximum[i] = sums.reference[i] = -INF;
    sums.total[i] = sums.moment[i] = 0.0;
  }
  const Place place = Place::of(call, begin);
  Rows64 rows;
  find_ids(call, first_row, begin, end, rows);
  for (int64_t at = 0; at < end - begin; at += ROWS) {
    const int64_t classes = std::min(ROWS, end - begin - at);
    BLOCKS[classes - 1](call, place, first_row, begin, end, at, rows, sums);
  }
}

// The sums of the tiles, in their order, to those of a row.
void add_tiles(const xopd_scores& call, int64_t row, int64_t tiles, int64_t blocks) {
  const bool has_moment = call.moment != nullptr;
  RowSums sums{call.maximum[row], call.total[row], has_moment ? call.moment[row] : 0.0};
  const int64_t lane = row % COLUMNS;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const xopd_tile_sums& of = call.sums[tile * blocks + row / COLUMNS];
    sums.raise(of.maximum[lane]);
    RowSums part{of.reference[lane], of.total[lane], of.moment[lane]};
    // From the tile's reference to the row's, which may lie below it by the headroom.
    if (part.maximum != -INF) {
      const double shift = static_cast<double>(part.maximum) - static_cast<double>(sums.maximum);
      const double factor = std::exp(shift);
      part.moment =
          factor == 0.0 ? factor * part.moment : factor * (part.moment + shift * part.total);
      part.total *= factor;
    }
    sums.total += part.total;
    sums.moment += part.moment;
  }
  call.maximum[row] = sums.maximum;
  call.total[row] = sums.total;
  if (has_moment) call.moment[row] = sums.moment;
}

}  // namespace
}  // namespace xopd

extern "C" int32_t xopd_run_scores(const xopd_scores* call, xopd_parallel_for* parallel) {
  const int64_t tiles = (call->classes + call->tile - 1) / call->tile;
  const int64_t blocks = (call->rows + xopd::COLUMNS - 1) / xopd::COLUMNS;
  // A task is a tile for 64 rows; neighbours share the tile.
  const int32_t status =
      xopd::for_rows(parallel, tiles * blocks, call->tile * call->k, [=](int64_t task) {
        const int64_t row = task % blocks * xopd::COLUMNS;
        const auto score =
            call->moment == nullptr ? xopd::score_tile<false> : xopd::score_tile<true>;
        score(*call, task / blocks, row, call->sums[task]);
      });
  if (status != 0) return status;
  return xopd::for_rows(parallel, call->rows, tiles,
                        [=](int64_t row) { xopd::add_tiles(*call, row, tiles, blocks); });
}
#else
extern "C" int32_t xopd_run_scores(const xopd_scores*, xopd_parallel_for*) {
  return XOPD_NO_MATMUL;
}
#endif
