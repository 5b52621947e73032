// Gradients of few classes: the lists of the largest logits, and products with their entries.
#pragma once

#include "common/abi.h"
#include "common/logits.h"
#include "common/parallel.h"

extern "C" {

// For each row the `limit` largest logits, those of equal size by class number, and sums over all
// others. The ids are in neither. A call folds one tile of classes in; the tiles come in order.
struct xopd_shortlist {
  xopd_logits logits;
  int64_t rows;
  int64_t classes;
  int64_t first_class;  // class number of column 0
  const int64_t* ids;   // [rows, id_count] class numbers, ascending in a row
  int64_t id_count;
  int64_t limit;     // entries that are kept in the end
  int64_t capacity;  // of the lists: >= limit + 16, and + id_count
  float reach;       // logits <= maximum - reach are not kept
  float* maximum;    // [rows] over all classes but the ids
  double* outside;   // [rows] sum exp(z - maximum) of the classes that are not on the list
  double* moment;    // [rows] the same of exp(z - maximum) (z - maximum), or null
  float* at_ids;     // [rows, id_count] z of the ids of this tile; the others stay
  float* id_slope;   // [rows, id_count] dz/dx of them; with a cap
  int64_t* count;    // [rows] entries on the list
  float* cutoff;     // [rows] no smaller logit comes on the list
  int32_t* listed;   // [rows, capacity] class numbers, ascending
  float* z;          // [rows, capacity]
  float* slope;      // [rows, capacity] dz/dx; with a cap
};

// Ends a shortlist: at most `limit` entries, then the ids among them.
struct xopd_finish {
  xopd_shortlist lists;   // `logits`, `classes`, `first_class` and `at_ids` are not read
  double* inside;         // [rows] sum exp(z - maximum) of the list, without the ids
  double* inside_moment;  // [rows] of exp(z - maximum) (z - maximum), or null
  int64_t* places;        // [rows, id_count] where the ids stand in the list
  // `z` becomes exp(z - maximum), 0 at the ids; behind the list 0, and -1 in `listed`.
};

// Lists of entries: row i has `count[i]` of them. Those of value 0 are none.
struct xopd_entries {
  const int32_t* ids;   // [rows, row_stride] class numbers, ascending in a row
  const float* values;  // [rows, row_stride]
  const int64_t* count;
  int64_t rows;
  int64_t row_stride;
  int64_t classes;  // of the vocabulary
};

// The entries whose value is not 0, and those at `places`, as lists to be kept.
struct xopd_compact {
  xopd_entries entries;
  const int64_t* places;  // [rows, place_count] ascending in a row
  int64_t place_count;
  const int64_t* row_of;  // [rows] row of out
  int64_t out_rows;
  int64_t out_width;
  int64_t* out_ids;   // [out_rows, out_width] behind the entries -1
  float* out_values;  // [out_rows, out_width] behind the entries 0
};

enum xopd_dtype { XOPD_FLOAT32 = 0, XOPD_BFLOAT16 = 1, XOPD_FLOAT16 = 2 };

struct xopd_matrix {
  const void* data;  // [rows, dim], unit inner stride
  int64_t dtype;     // xopd_dtype
  int64_t row_stride;
  int64_t first_row;  // number of the row that `data` begins with
  int64_t rows;
};

// out[i] += sum over the entries of row row_of[i] of value * weight[class], over the classes that
// are rows of `weight`.
struct xopd_gather {
  xopd_entries entries;
  const int64_t* row_of;  // [rows]
  int64_t rows;
  xopd_matrix weight;
  int64_t dim;
  float* out;  // [rows, dim]
};

// The entries in the order of classes, those of a class in the order of rows.
struct xopd_sort {
  xopd_entries entries;
  int64_t* offsets;  // [classes + 2] the entries of class v are [offsets[v], offsets[v + 1])
  int64_t capacity;  // of the two below
  int32_t* rows;
  float* values;
};

// out[v] = sum over the entries of class v of value * hidden[row], over a range of classes.
struct xopd_scatter {
  const int64_t* offsets;  // [classes + 1] of the range
  const int32_t* rows;
  const float* values;
  int64_t entry_count;  // of `rows` and `values`
  int64_t classes;
  xopd_matrix hidden;
  int64_t dim;
  void* out;          // [classes, dim], or null
  int64_t out_dtype;  // XOPD_FLOAT32, XOPD_BFLOAT16
  int64_t adds;       // 1 (XOPD_FLOAT32): to what stands in out
  float* bias;        // [classes] to which the sum of the values is added, or null
};

// Adds an entry to each of some lists, where its class belongs; one of this class takes the value.
struct xopd_insert {
  int32_t* ids;  // [list_rows, row_stride] as in xopd_entries
  float* values;
  int64_t* count;
  int64_t list_rows;
  int64_t row_stride;
  int64_t rows;
  const int64_t* row_of;   // [rows]
  const int64_t* classes;  // [rows]; negative: no entry
  const float* added;      // [rows]
};

// One class of each row, by a point on the running sum of exp(z - maximum) over the classes that
// have no entry. A call goes on with one tile of classes; the tiles come in order.
struct xopd_draw {
  xopd_logits logits;
  int64_t classes;
  int64_t first_class;
  xopd_entries kept;     // [rows of the logits]; those of value 0 are drawn from
  const float* maximum;  // [rows of the logits]
  int64_t rows;          // of what follows
  const int64_t* row_of;
  const double* point;
  double* running;  // starts at 0
  int64_t* drawn;   // starts at -1: the first class whose sum is above the point, if any is
  int64_t* last;    // starts at -1: the last class so far that has any mass
  float* slope;     // dz/dx at `drawn`, or while there is none at `last`; with a cap
};

XOPD_EXPORT int32_t xopd_add_shortlist(const xopd_shortlist* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_finish_shortlist(const xopd_finish* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_compact_entries(const xopd_compact* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_gather_entries(const xopd_gather* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_sort_entries(const xopd_sort* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_scatter_entries(const xopd_scatter* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_insert_entries(const xopd_insert* call, xopd_parallel_for* parallel);
XOPD_EXPORT int32_t xopd_draw_entries(const xopd_draw* call, xopd_parallel_for* parallel);
}
