// The numbers whose sums `reduce` takes: what a program computes on its way, eight elements of one slot at a time.
// A slot reads what it needs: its own model, or all of them where the number depends on the whole program.
#pragma once

#include "cuda/combine.h"

namespace mergekernels {

// See QUANTITIES in ops/sums.py.
enum Quantity : std::int32_t {
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

// Whether the whole program must run for it.
MK_HD bool is_merged(int quantity) {
  return quantity == kAgreeingAbs || quantity == kMergedAbs || quantity == kAloneCount;
}

// One call, by value. sums: double [num_slots][blocks]; slot s is quantity[s] of model[s].
constexpr int kMaxSlots = 9 * kMaxModels + 2;
template <class C>
struct ReduceArgs {
  ProgramArgs<C> program;
  double* sums;
  std::int64_t blocks;
  std::int32_t num_slots;
  std::int8_t quantity[kMaxSlots];
  std::int8_t model[kMaxSlots];
};
static_assert(sizeof(ReduceArgs<double>) <= 4096, "the arguments of a kernel");

// |x| or x^2, the product exact for inputs of 32 bits and fewer.
template <class C>
MK_HD void magnitudes(const C* x, bool squares, double* v) {
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    const double wide = double(x[j]);
    v[j] = squares ? wide * wide : wide < 0.0 ? -wide : wide;
  }
}

// The numbers of a slot that looks at its model (or at the sum of all deltas). v: +0 beyond the elements that exist.
template <int kDType, class C>
MK_HD void own_numbers(const Group<C>& g, int quantity, int m, double* v) {
  C x[kGroup];
  if (quantity == kTotalAbs) {
    total_delta<kDType>(g, x);
  } else if (quantity == kImportanceSquares || quantity == kNegativeCount) {
    widen(load_input<kDType>(g, g.p.num_models + m), x);
  } else {
    deltas(g, load_input<kDType>(g, m), x);
    if (quantity == kKeptAbs || quantity == kKeptSquares || quantity == kKeptCount) {
      trim(g, m, rule_mask(g, m, x) & g.joint, x);
      if (quantity == kKeptCount) apply_factor(g, m, x);
    }
  }
  // Counts are sums of 1.
  if (quantity == kKeptCount || quantity == kNegativeCount) {
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) x[j] = C(int(quantity == kKeptCount ? x[j] != C(0) : x[j] < C(0)));
  }
  magnitudes(x, quantity == kSquares || quantity == kKeptSquares || quantity == kImportanceSquares, v);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) v[j] = j < g.at.n ? v[j] : 0.0;
}

// The numbers of a slot that depends on the whole program.
template <int kDType, class C>
MK_HD void merged_numbers(Group<C>& g, int quantity, int m, double* v) {
  NoTally none;
  std::int32_t segment[kGroup] = {};
  if (g.p.axis != kAxisNone) find_segments(g, segment);
  Merged<C> merged;
  merge_group<kDType>(g, segment, &merged, none);
  drop_useless<kDType>(g, &merged);
  unsigned counted = first_bits(g.at.n);
  if (quantity == kAloneCount) {
    C e[kGroup];
    entries<kDType>(g, m, e);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      counted &= ~(unsigned(e[j] == C(0) || (merged.nonzero >> (8 * j) & 0xFFu) != 1) << j);
      merged.q[j] = C(1);
    }
  }
  if (quantity == kAgreeingAbs) counted &= agreeing_mask<kDType>(g, m, segment, merged);
  if (quantity == kMergedAbs) scale_merged(g.p, &merged);
  magnitudes(merged.q, false, v);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) v[j] = (counted >> j & 1u) != 0 ? v[j] : 0.0;
}

// The numbers of a slot for the eight elements from `first` on.
template <int kDType, bool kMerged, class C>
MK_HD void slot_numbers(const ReduceArgs<C>& a, int slot, std::int64_t first, int n, std::uint8_t* kept, int stride,
                        double* v) {
  NoTally none;
  Group<C> g = begin_group<kDType>(a.program, first, n, kept, stride, none);
  if constexpr (kMerged) {
    merged_numbers<kDType>(g, a.quantity[slot], a.model[slot], v);
  } else {
    own_numbers<kDType>(g, a.quantity[slot], a.model[slot], v);
  }
}

}  // namespace mergekernels
