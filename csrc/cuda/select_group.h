// select: what is ahead of the interval of a search and what is in it, eight elements at a time.
#pragma once

#include "cuda/keys.h"

namespace mergekernels {

enum Stage : int { kStageLeftOut = 0, kStageKeys = 1, kStageTies = 2 };
constexpr int kSelectBins = 4096;
constexpr int kMaxSearches = 64;

// Up to 64 searches of a call, as they go to a kernel by value: number `begin` and those that follow, of S in all.
// models: with a joint key all models, else one for each search. which: the model of each search. counters: [4 S + 2]:
// ahead; inside; non-finite values per search and base; their first indices. entries: ordinals [S][capacity], then
// scope indices; bins: [S][4096], filled instead if not nullptr. numbers: of the key, see KeyKind.
struct SweepArgs {
  std::int64_t n, offset, capacity, row_length;
  Piece piece;
  const void* base;
  const void* numbers;
  unsigned long long* counters;
  std::int64_t* ordinals;
  std::int64_t* indices;
  unsigned long long* bins;
  std::uint64_t seed;
  std::uint32_t tensor;
  std::int32_t begin, count, total, num_models, key;
  bool by_word, aligned, quads;
  const void* models[kMaxModels];
  std::uint64_t lo[kMaxSearches], hi[kMaxSearches], tau[kMaxSearches];
  std::int8_t stage[kMaxSearches], which[kMaxSearches];
  std::uint8_t shift[kMaxSearches];
};
static_assert(sizeof(SweepArgs) <= 4096, "the arguments of a kernel");

MK_HD bool is_joint(const SweepArgs& a) { return a.key == kKeyVariance || a.key == kKeyBalance; }

// Where the counters of the searches begin, and those of the base lie.
MK_HD unsigned long long* ahead_of(const SweepArgs& a, int s) { return a.counters + a.begin + s; }
MK_HD unsigned long long* inside_of(const SweepArgs& a, int s) { return a.counters + a.total + a.begin + s; }
MK_HD unsigned long long* bad_of(const SweepArgs& a, int s) { return a.counters + 2 * a.total + a.begin + s; }
MK_HD unsigned long long* bad_of_base(const SweepArgs& a) { return a.counters + 3 * a.total; }
MK_HD unsigned long long* first_of(const SweepArgs& a, unsigned long long* bad) { return bad + a.total + 1; }

// Eight elements of one search: bit masks, and the ordinals of those inside.
struct Verdict {
  unsigned ahead, inside, bad;
  std::uint64_t ordinal[kGroup];
};

// value: what is ranked, as numbers. bad: which elements are not finite.
template <class C>
MK_HD Verdict judge(const SweepArgs& a, int s, const C* value, unsigned bad, std::int64_t first, int n) {
  using Key = typename KeyOf<C>::Key;
  Verdict v;
  v.ahead = v.inside = 0;
  v.bad = bad;
  if (a.stage[s] == kStageKeys) {
    // In the width of the key: 64-bit comparisons would be the larger part of this pass.
    const Key lo = Key(a.lo[s]), hi = Key(a.hi[s]);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const Key key = key_of(value[j]);
      v.ahead |= unsigned(key > hi && j < n) << j;
      v.inside |= unsigned(key >= lo && key <= hi && j < n) << j;
      v.ordinal[j] = key;
    }
    return v;
  }
  unsigned tied = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) tied |= unsigned(std::uint64_t(key_of(value[j])) == a.tau[s] && j < n) << j;
  std::uint32_t words[kGroup] = {};
  if (a.by_word && tied != 0) tie_words(a.seed, a.tensor, a.which[s], a.piece, first, a.quads, tied, words);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    v.ordinal[j] = 0;
    if ((tied >> j & 1u) == 0) continue;
    const std::uint64_t ordinal =
        a.by_word ? words[j] : static_cast<std::uint64_t>(flat_index(a.piece, first + j) + a.offset);
    v.ahead |= unsigned(ordinal < a.lo[s]) << j;
    v.inside |= unsigned(ordinal >= a.lo[s] && ordinal <= a.hi[s]) << j;
    v.ordinal[j] = ordinal;
  }
  return v;
}

template <int kDType>
MK_HD Packed<kDType> load_model(const SweepArgs& a, int m, std::int64_t first, int n) {
  return load_packed<kDType>(a.models[m], first, n, a.aligned);
}

// Zero where the draw of a model does not keep the element.
template <class C>
MK_HD void keep_drawn(const SweepArgs& a, int m, std::int64_t first, int n, C* d) {
  const std::uint64_t threshold = static_cast<const std::uint64_t*>(a.numbers)[m];
  std::uint32_t words[kGroup] = {};
  group_words(a.seed, a.tensor, philox_stream(m, kPurposeDraw), a.piece, first, a.quads, first_bits(n), words);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) d[j] = std::uint64_t(words[j]) < threshold ? d[j] : C(0);
}

// The verdict of a search on a tensor of its own.
template <int kDType, class C>
MK_HD Verdict judge_own(const SweepArgs& a, int s, const Packed<kDType>& packed, const C* x0, std::int64_t first,
                        int n) {
  C d[kGroup];
  widen(packed, d);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) d[j] = d[j] - x0[j];
  if (a.key == kKeyImportance) important(static_cast<const C*>(a.numbers), a.row_length, a.piece, first, n, d);
  if (a.key == kKeyDrawn) keep_drawn(a, a.which[s], first, n, d);
  return judge(a, s, d, nonfinite_mask(packed, n), first, n);
}

// What a joint key takes from all models: the variance, or the sum of the deltas; and which elements are not finite.
template <int kDType, class C>
MK_HD unsigned joint_numbers(const SweepArgs& a, const C* x0, std::int64_t first, int n, C* number) {
  unsigned bad = 0;
  const auto load = [&](int m, C* d) {
    const Packed<kDType> packed = load_model<kDType>(a, m, first, n);
    bad |= nonfinite_mask(packed, n);
    widen(packed, d);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) d[j] = d[j] - x0[j];
  };
  if (a.key == kKeyVariance) {
    variance_of(a.num_models, load, number);
  } else {
    sum_of(a.num_models, load, number);
  }
  return bad;
}

// The verdict of a search on a joint key.
template <int kDType, class C>
MK_HD Verdict judge_joint(const SweepArgs& a, int s, const C* x0, const C* number, unsigned bad, std::int64_t first,
                          int n) {
  if (a.key == kKeyVariance) return judge(a, s, number, bad, first, n);
  C d[kGroup], z[kGroup] = {};
  widen(load_model<kDType>(a, a.which[s], first, n), d);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) d[j] = d[j] - x0[j];
  balance_keys(static_cast<const BalancePlan<C>*>(a.numbers)[a.which[s]], d, number, n, z);
  return judge(a, s, z, bad, first, n);
}

template <int kDType, class C>
MK_HD unsigned load_base(const SweepArgs& a, std::int64_t first, int n, C* x0) {
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) x0[j] = C(0);
  if (a.base == nullptr) return 0;
  const Packed<kDType> packed = load_packed<kDType>(a.base, first, n, a.aligned);
  widen(packed, x0);
  return nonfinite_mask(packed, n);
}

// Visits a group: `visit(s, verdict)` for each search that takes part, `visit.base(bad)` for the base.
template <int kDType, bool kJoint, class C, class Visit>
MK_HD void sweep_group(const SweepArgs& a, std::int64_t first, int n, Visit& visit) {
  C x0[kGroup];
  const unsigned bad_base = load_base<kDType>(a, first, n, x0);
  if (a.begin == 0) visit.base(bad_base);
  if constexpr (kJoint) {
    C number[kGroup];
    const unsigned bad = joint_numbers<kDType>(a, x0, first, n, number);
    MK_ROLLED
    for (int s = 0; s < a.count; ++s)
      if (a.stage[s] != kStageLeftOut) visit(s, judge_joint<kDType>(a, s, x0, number, bad, first, n));
  } else {
    const auto load = [&a, first, n](int s) {
      return a.stage[s] == kStageLeftOut ? Packed<kDType>{} : load_model<kDType>(a, s, first, n);
    };
    Pipeline<kDType> pipeline;
    pipeline.start(a.count, load);
    MK_ROLLED
    for (int s = 0; s < a.count; ++s) {
      const Packed<kDType> packed = pipeline.next(s, a.count, load);
      if (a.stage[s] != kStageLeftOut) visit(s, judge_own<kDType>(a, s, packed, x0, first, n));
    }
  }
}

// The verdict of one search alone.
template <int kDType, bool kJoint, class C>
MK_HD Verdict judge_one(const SweepArgs& a, int s, std::int64_t first, int n) {
  C x0[kGroup];
  load_base<kDType>(a, first, n, x0);
  if constexpr (kJoint) {
    C number[kGroup];
    const unsigned bad = joint_numbers<kDType>(a, x0, first, n, number);
    return judge_joint<kDType>(a, s, x0, number, bad, first, n);
  } else {
    return judge_own<kDType>(a, s, load_model<kDType>(a, s, first, n), x0, first, n);
  }
}

}  // namespace mergekernels
