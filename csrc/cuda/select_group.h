// select: what is ahead of a model's interval and what is in it, eight elements at a time.
#pragma once

#include "cuda/group.h"

namespace mergekernels {

enum Stage : int { kStageLeftOut = 0, kStageKeys = 1, kStageTies = 2 };
constexpr int kSelectBins = 4096;

// One call, as it goes to the kernel by value. counters: [4 K + 2]: ahead; inside; non-finite values per model and
// base; their first indices. entries: ordinals [K][capacity], then scope indices; bins: [K][4096], filled instead if
// not nullptr.
struct SweepArgs {
  std::int64_t n, offset, capacity;
  Piece piece;
  const void* base;
  unsigned long long* counters;
  std::int64_t* ordinals;
  std::int64_t* indices;
  unsigned long long* bins;
  std::uint64_t seed;
  std::uint32_t tensor;
  int num_models;
  bool by_word, aligned, quads;
  const void* models[kMaxModels];
  std::uint64_t lo[kMaxModels], hi[kMaxModels], tau[kMaxModels];
  std::int8_t stage[kMaxModels];
  std::uint8_t shift[kMaxModels];
};
static_assert(sizeof(SweepArgs) <= 4096, "the arguments of a kernel");

// Eight elements of one model: bit masks, and the ordinals of those inside.
struct Verdict {
  unsigned ahead, inside, bad;
  std::uint64_t ordinal[kGroup];
};

template <int kDType, class C>
MK_HD Verdict judge(const SweepArgs& a, int m, const Packed<kDType>& packed, const C* x0, std::int64_t first, int n) {
  using Key = typename KeyOf<C>::Key;
  C d[kGroup];
  widen(packed, d);
  Verdict v;
  v.ahead = v.inside = 0;
  v.bad = nonfinite_mask(packed, n);
  if (a.stage[m] == kStageKeys) {
    // In the width of the key: 64-bit comparisons would be the larger part of this pass.
    const Key lo = Key(a.lo[m]), hi = Key(a.hi[m]);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const Key key = key_of(C(d[j] - x0[j]));
      v.ahead |= unsigned(key > hi && j < n) << j;
      v.inside |= unsigned(key >= lo && key <= hi && j < n) << j;
      v.ordinal[j] = key;
    }
    return v;
  }
  unsigned tied = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) tied |= unsigned(std::uint64_t(key_of(C(d[j] - x0[j]))) == a.tau[m] && j < n) << j;
  std::uint32_t words[kGroup] = {};
  if (a.by_word && tied != 0) tie_words(a.seed, a.tensor, m, a.piece, first, a.quads, tied, words);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    v.ordinal[j] = 0;
    if ((tied >> j & 1u) == 0) continue;
    const std::uint64_t ordinal =
        a.by_word ? words[j] : static_cast<std::uint64_t>(flat_index(a.piece, first + j) + a.offset);
    v.ahead |= unsigned(ordinal < a.lo[m]) << j;
    v.inside |= unsigned(ordinal >= a.lo[m] && ordinal <= a.hi[m]) << j;
    v.ordinal[j] = ordinal;
  }
  return v;
}

// Visits a group: `visit(m, verdict)` for each model that takes part, `visit.base(bad)` for the base.
template <int kDType, class C, class Visit>
MK_HD void sweep_group(const SweepArgs& a, std::int64_t first, int n, Visit& visit) {
  C x0[kGroup] = {};
  if (a.base != nullptr) {
    const Packed<kDType> packed = load_packed<kDType>(a.base, first, n, a.aligned);
    widen(packed, x0);
    visit.base(nonfinite_mask(packed, n));
  }
  const auto load = [&a, first, n](int m) {
    return a.stage[m] == kStageLeftOut ? Packed<kDType>{} : load_packed<kDType>(a.models[m], first, n, a.aligned);
  };
  Pipeline<kDType> pipeline;
  pipeline.start(a.num_models, load);
  MK_ROLLED
  for (int m = 0; m < a.num_models; ++m) {
    const Packed<kDType> packed = pipeline.next(m, a.num_models, load);
    if (a.stage[m] != kStageLeftOut) visit(m, judge<kDType>(a, m, packed, x0, first, n));
  }
}

}  // namespace mergekernels
