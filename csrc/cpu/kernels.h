// The entry points that are compiled once per instruction set. Plain data only: nothing with linkage of its own may
// cross.
#pragma once

#include "common/als.h"
#include "common/dtype.h"
#include "cpu/program.h"

namespace mergekernels {

// Elements that the kernels take through the first-level cache at a time.
constexpr int kBlock = 256;

// Consecutive elements of a tensor in memory. cast: dtype to round to after loading, -1 for none.
struct Source {
  const void* data;
  int dtype;
  int cast;
};

struct NonFinite {
  std::int64_t first;  // -1 for none
  std::int64_t count;
};

struct StreamCounters {
  std::int64_t kept[kMaxModels];
  std::int64_t conflicts, positive, negative;
  NonFinite nonfinite[kMaxModels + 2];  // models, base, output
};

// What reduce sums; see QUANTITIES in ops/sums.py. From kTotalAbs on one number, the others one per model.
enum Quantity : int {
  kAbs = 0,
  kSquares = 1,
  kKeptAbs = 2,
  kKeptSquares = 3,
  kAgreeingAbs = 4,
  kImportanceSquares = 5,
  kKeptCount = 6,
  kAloneCount = 7,
  kNegativeCount = 8,
  kTotalAbs = 9,
  kMergedAbs = 10
};

enum Mark : int { kMarkKept = 0, kMarkAgreeing = 1, kMarkUseful = 2 };

// One run of stream, reduce or mark: n consecutive elements of a piece, from ordinal `first` (a multiple of
// kCanonicalBlock).
struct StreamArgs {
  const Program* program;
  Piece piece;
  std::int64_t first, n;
  Source base;
  Source models[kMaxModels];              // the inputs: with merge importance the models and then their importances
  const std::uint8_t* marks[kMaxModels];  // bits of the piece, from the byte of its first element on
  const std::int8_t* ranks[kMaxModels];   // of the run: what rules by rank keep
  const void* divisors[kMaxModels];       // of the run: what such a rule divides by, or null
  int compute;                            // kF32 or kF64
  void* scratch;                          // stream_scratch_bytes(), aligned to 64
  // stream
  void* out;  // null: statistics only
  int out_dtype;
  StreamCounters* counters;  // null: no statistics
  double* block_sums;        // null: no norms; sum of block j of model t at [t * block_stride + j]
  std::int64_t block_stride;
  // reduce: sum of block j of the run in slot k at sums[k * sum_stride + j]
  const int* quantities;
  int num_quantities, num_slots;
  double* sums;
  std::int64_t sum_stride;
  // mark: bits of the piece. reduce: where to write what a model keeps of numbers other than 0, or null
  int mark;
  std::uint8_t* bits[kMaxModels];
};

// Numbers of groups that a pass rounds once, before its first block.
constexpr std::int64_t group_numbers(const Program& program) {
  return program.table.axis == kTableGroups ? program.num_models * program.table.segments : 0;
}

constexpr std::int64_t stream_scratch_bytes(const Program& program, int num_slots) {
  // Arrays of a block: 14, one to an input, 4 to a model; lanes of the norms or sums; numbers of groups.
  const std::int64_t lanes = num_slots > program.num_models ? num_slots : program.num_models;
  return std::int64_t(kBlock) * 8 * (14 + program.num_inputs + 4 * std::int64_t(program.num_models) + lanes) +
         8 * group_numbers(program);
}

enum Stage : int { kStageOut = 0, kStageKey = 1, kStageTie = 2 };

enum SweepKey : int { kSweepDelta = 0, kSweepVariance = 1, kSweepImportance = 2, kSweepBalance = 3, kSweepDrawn = 4 };

// A selection cuts each model twice at most.
constexpr int kMaxSearches = 2 * kMaxModels;

struct SweepSearch {
  int model;
  int stage;
  std::uint64_t lo, hi, tau;  // as in Interval; stage tie looks for key == tau only
};

// What a run found for one search: for stage key the elements inside [lo, hi], for stage tie those with key tau.
struct Found {
  void* keys;            // keys of the compute type
  std::uint32_t* where;  // ordinals inside the run
  std::int64_t size;
};

struct SweepArgs {
  int num_models, num_searches;
  int num_active;
  int active[kMaxSearches];  // searches that are not left out, those of a model next to one another
  Piece piece;
  std::int64_t first, n;  // n below 2^31
  Source base;
  Source models[kMaxModels];
  SweepSearch searches[kMaxSearches];
  int key;
  Table rows;                  // for kSweepImportance
  const Competitor* balance;   // for kSweepBalance, one per model
  const std::uint64_t* draws;  // for kSweepDrawn, a threshold per model
  std::uint64_t seed;          // of the draws
  std::uint32_t tensor;
  int compute;
  std::int64_t before[kMaxSearches];
  NonFinite nonfinite[kMaxSearches + 1];  // first: flat index
  Found found[kMaxSearches];
  std::int64_t capacity;  // of each `found`, which also has room for kBlock more
  void (*flush)(SweepArgs* args, int search);
  void* context;
  void* scratch;  // sweep_scratch_bytes(), aligned to 64
};

constexpr std::int64_t sweep_scratch_bytes(int num_models) {
  return std::int64_t(kBlock) * 8 * (4 + std::int64_t(num_models));
}

// rank_masks: what a rule by rank keeps of whole slabs of length * stride elements; see Rows in ops/keep.py.
struct RankArgs {
  const KeepRule* rule;
  Source base, model;  // base.data null: no deltas are taken
  std::int64_t g;      // flat index of the first element
  std::int64_t slabs, length, stride;
  std::uint64_t seed;
  std::uint32_t tensor;
  int number;  // of the model, for its Philox streams
  int compute;
  std::int8_t* mask;  // one per element: -1 if it is kept, else 0
  int skip_zeros;     // what is said of deltas that are zero does not matter
  void* divisors;     // of the compute type, one per element: C(threshold) * 2^-32; null unless the rule divides
  void* scratch;      // rank_scratch_bytes(length, stride), aligned to 64
};

constexpr int kRankBins = 65536;  // of a row, at most

// Bins in which the keys of a row are counted, at most. In a long row more of them, so that each holds few elements:
// those that share a bin with one that the counts leave open are looked at again.
constexpr int most_rank_bins(std::int64_t length) { return length > (std::int64_t(1) << 21) ? kRankBins : 8192; }

constexpr std::int64_t rank_scratch_bytes(std::int64_t length, std::int64_t) {
  return (length + 2 * kBlock) * 80 + 24 * std::int64_t(most_rank_bins(length));
}

// Up to this many models have all pairs of a Gram matrix summed at once.
constexpr int kFewModels = 4;

// gram: n consecutive elements of one segment from the beginning of a canonical block; the sum of block j of pair p
// goes to sums[p * slot_stride + j]. gram_lane: up to 16 rows of n columns, `pitch` elements apart; the sum of column c
// of pair p goes to sums[p * slot_stride + c], and up to 8 numbers beyond n are written.
struct GramArgs {
  int num_models;
  Source base;  // data null: no deltas
  Source models[kMaxModels];
  std::int64_t n;
  std::int64_t pitch;
  int rows;
  int compute;
  double* sums;
  std::int64_t slot_stride;
  void* scratch;  // gram_scratch_bytes(), aligned to 64
};

constexpr std::int64_t gram_values_bytes(int num_models) {
  return std::int64_t(kBlock) * 8 * (1 + std::int64_t(num_models) * (num_models > kFewModels ? 16 : 4));
}

constexpr std::int64_t gram_scratch_bytes(int num_models) {
  return gram_values_bytes(num_models) + std::int64_t(kLanes) * 8 * (kFewModels * (kFewModels + 1) / 2);
}

// Whole rows of a model and its base; one number for each row goes to `result`.
struct DivergenceArgs {
  Source base, model;
  std::int64_t rows, length;
  int compute;
  double* result;
  void* scratch;  // divergence_scratch_bytes(), aligned to 64
};

constexpr std::int64_t divergence_scratch_bytes(std::int64_t length) {
  return (length + kBlock) * 16 + (length / kCanonicalBlock + 2) * 8;
}

// A box of the product of b (rows x rank, dense) and a (rank x cols, rows a_pitch apart), all of the compute type.
struct ProductArgs {
  const void* b;
  const void* a;
  std::int64_t rank, rows, cols, a_pitch;
  void* out;  // rows out_pitch apart
  std::int64_t out_pitch;
  int add;  // to what is there
  int compute;
};

// x f (rows x width) or with `inner` x^T f (cols x width), of x with rows x cols numbers, rows `pitch` apart, float or
// double. f and out are double; width, f_pitch and out_pitch are multiples of kThinWidth.
constexpr int kThinWidth = 8;

struct ThinArgs {
  const void* x;
  const double* f;
  double* out;
  std::int64_t rows, cols, pitch, f_pitch, out_pitch, width;
  int inner, dtype;
};

// Rows of the matrices of a problem of cp_als are this far apart, and the loop needs so many numbers of memory, zeros.
MK_HD int als_pitch(const AlsShape& s) { return (s.width + kThinWidth - 1) / kThinWidth * kThinWidth; }
MK_HD std::int64_t als_numbers(const AlsShape& s) {
  return AlsRoom::numbers(s, als_pitch(s), 1, true) + (9 * std::int64_t(s.width) + s.most()) * als_pitch(s);
}

struct LearnedArgs;  // cpu/learned.h

struct Kernels {
  const char* name;
  void (*stream)(const StreamArgs* args);
  void (*reduce)(const StreamArgs* args);
  void (*mark)(const StreamArgs* args);
  void (*sweep)(SweepArgs* args);
  // The words of the elements with flat indices g[0 .. n - 1].
  void (*philox)(std::uint64_t seed, std::uint32_t tensor, std::uint32_t stream, const std::int64_t* g, std::int64_t n,
                 std::uint32_t* words);
  void (*rank_masks)(const RankArgs* args);
  void (*gram)(const GramArgs* args);
  void (*gram_lane)(const GramArgs* args);
  void (*learned)(const LearnedArgs* args);
  void (*divergence)(const DivergenceArgs* args);
  void (*product)(const ProductArgs* args);
  void (*thin)(const ThinArgs* args);
  // One problem; memory: als_numbers() zeros, aligned to 64. args->far is set.
  void (*als)(const AlsArgs* args, std::int64_t item, double* memory);
};

// The best instruction set first; `count` is set to their number. Only what this machine can run.
const Kernels* const* available_kernels(int* count);

}  // namespace mergekernels
