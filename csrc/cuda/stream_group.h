// stream: y = x0 + scale * elect(sum_t w_t keep_t(x_t - x0)) / divisor, eight elements at a time.
// Reads each input once, writes the output once.
#pragma once

#include "cuda/point.h"

namespace mergekernels {

// One call, as it goes to the kernel by value (under the 4 KiB of kernel arguments). counters: [slots][3 K + 7], see
// counter_* below; nullptr for no statistics. C: the compute type.
template <class C>
struct StreamArgs {
  using Signed = typename KeyOf<C>::SignedKey;
  std::int64_t n;
  Piece piece;
  const void* base;
  void* out;
  unsigned long long* counters;
  std::uint64_t seed;
  std::uint32_t tensor;
  int slots, num_models, out_dtype, consensus, zero_vote, divisor;
  bool copy, raw, scaled, aligned, quads;
  C divisor_value, scale;
  const void* models[kMaxModels];
  C weights[kMaxModels];
  Signed bound[kMaxModels];  // kept above it without looking at ties
  Signed tau[kMaxModels];
  std::int64_t index[kMaxModels];
  std::uint32_t word[kMaxModels];
  std::int8_t rule[kMaxModels];  // kTiesHash, kTiesIndex, or kTiesNone
};
static_assert(sizeof(StreamArgs<double>) <= 4096, "the arguments of a kernel");

MK_HD int counter_conflicts(int num_models) { return num_models; }
MK_HD int counter_bad(int num_models, int source) { return num_models + 3 + source; }
MK_HD int counter_first(int num_models, int source) { return 2 * num_models + 5 + source; }
MK_HD int num_counters(int num_models) { return 3 * num_models + 7; }

// Bit j set: element j of model m passes its point.
template <class C>
MK_HD unsigned keep_mask(const StreamArgs<C>& a, int m, const C* d, std::int64_t first, int n) {
  const Point<C> point{a.bound[m], a.tau[m], a.index[m], a.word[m], a.rule[m]};
  return point_mask(point, m, d, Place{a.piece, first, n, a.quads, a.seed, a.tensor});
}

template <int kOut, bool kStats, class C, class Tally>
MK_HD void write_group(const StreamArgs<C>& a, const C* y, std::int64_t first, int n, Tally& tally) {
  const Packed<kOut> packed = narrow<kOut>(y);
  store_packed(packed, a.out, first, n, a.aligned);
  if (kStats) report_bad(a.piece, a.num_models + 1, first, nonfinite_mask(packed, n), tally);
}

template <bool kStats, class C, class Tally>
MK_HD void write_result(const StreamArgs<C>& a, const C* y, std::int64_t first, int n, Tally& tally) {
  switch (a.out_dtype) {
    case kBF16:
      write_group<kBF16, kStats>(a, y, first, n, tally);
      break;
    case kF16:
      write_group<kF16, kStats>(a, y, first, n, tally);
      break;
    case kF32:
      write_group<kF32, kStats>(a, y, first, n, tally);
      break;
    default:
      write_group<kF64, kStats>(a, y, first, n, tally);
      break;
  }
}

// `copy`: one model and only the scale.
template <int kDType, bool kStats, class C, class Tally>
MK_HD void copy_group(const StreamArgs<C>& a, std::int64_t first, int n, Tally& tally) {
  const Packed<kDType> packed = load_packed<kDType>(a.models[0], first, n, a.aligned);
  C y[kGroup];
  widen(packed, y);
  unsigned nonzero = 0, above = 0, below = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    if (a.scaled) y[j] = y[j] * a.scale;
    nonzero |= unsigned(y[j] != C(0) && j < n) << j;
    above |= unsigned(y[j] > C(0) && j < n) << j;
    below |= unsigned(y[j] < C(0) && j < n) << j;
  }
  if (kStats) {
    const unsigned bad = nonfinite_mask(packed, n);
    tally.kept(0, count_bits(nonzero));
    tally.votes(0, count_bits(above), count_bits(below));
    report_bad(a.piece, 0, first, bad, tally);
    if (a.raw && a.out != nullptr) report_bad(a.piece, a.num_models + 1, first, bad, tally);
    if (a.base != nullptr) {
      const Packed<kDType> base = load_packed<kDType>(a.base, first, n, a.aligned);
      report_bad(a.piece, a.num_models, first, nonfinite_mask(base, n), tally);
    }
  }
  if (a.out == nullptr) return;
  if (a.raw) {
    store_packed(packed, a.out, first, n, a.aligned);
  } else {
    write_result<kStats>(a, y, first, n, tally);
  }
}

// The running sums of a group. Sums over the positive and over the negative terms are kept side by side and one is
// chosen at the end, when the sign of the whole sum is known: adding the +0 of a term left out changes no bit.
template <class C>
struct Sums {
  C total[kGroup], plus[kGroup], minus[kGroup], plus_divisor[kGroup], minus_divisor[kGroup];
  unsigned above, below;
};

template <int kDType, bool kStats, class C, class Tally>
MK_HD void add_model(const StreamArgs<C>& a, int m, const Packed<kDType>& packed, const C* x0, std::int64_t first,
                     int n, Sums<C>* sums, Tally& tally) {
  C d[kGroup];
  widen(packed, d);
  // Without a base x0 is +0, and x - (+0) has the bits of x.
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) d[j] = d[j] - x0[j];
  const unsigned kept = keep_mask(a, m, d, first, n);
  const C weight = a.weights[m];
  const bool by_count = a.divisor == kDivisorAgreeingCount;
  unsigned nonzero = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    const C e = (kept >> j & 1u) != 0 ? d[j] : C(0);
    const C w = weight * e;
    const bool above = w > C(0), below = w < C(0);
    sums->total[j] = sums->total[j] + w;
    if (a.consensus == kConsensusSum) {
      const C share = by_count ? C(1) : weight;
      sums->plus[j] = sums->plus[j] + (above ? w : C(0));
      sums->minus[j] = sums->minus[j] + (below ? w : C(0));
      sums->plus_divisor[j] = sums->plus_divisor[j] + (above ? share : C(0));
      sums->minus_divisor[j] = sums->minus_divisor[j] + (below ? share : C(0));
    }
    nonzero |= unsigned(e != C(0) && j < n) << j;
    sums->above |= unsigned(above && j < n) << j;
    sums->below |= unsigned(below && j < n) << j;
  }
  if (kStats) {
    tally.kept(m, count_bits(nonzero));
    report_bad(a.piece, m, first, nonfinite_mask(packed, n), tally);
  }
}

template <class C>
MK_HD C finish(const StreamArgs<C>& a, const Sums<C>& sums, C x0, int j) {
  const C total = sums.total[j];
  C y = total, divisor = C(0);
  if (a.consensus == kConsensusSum) {
    const int vote = total > C(0) ? 1 : total < C(0) ? -1 : a.zero_vote;
    y = vote > 0 ? sums.plus[j] : vote < 0 ? sums.minus[j] : C(0);
    divisor = vote > 0 ? sums.plus_divisor[j] : vote < 0 ? sums.minus_divisor[j] : C(0);
  }
  if (a.divisor != kDivisorNone) {
    if (a.divisor == kDivisorValue) divisor = a.divisor_value;
    if (a.divisor == kDivisorAgreeingWeights) divisor = divisor == C(0) ? C(1) : divisor;
    if (a.divisor == kDivisorAgreeingCount) divisor = divisor < C(1) ? C(1) : divisor;
    y = y / divisor;
  }
  if (a.scaled) y = y * a.scale;
  if (a.base != nullptr) y = x0 + y;
  return total == total ? y : total;
}

// Elements first .. first + 7 of the piece, of which n exist (0 or less: none, but the tally is called all the same, so
// that the threads of a warp stay together).
template <int kDType, bool kStats, class C, class Tally>
MK_HD void stream_group(const StreamArgs<C>& a, std::int64_t first, int n, Tally& tally) {
  if (a.copy) {
    copy_group<kDType, kStats>(a, first, n, tally);
    return;
  }
  C x0[kGroup] = {};
  if (a.base != nullptr) {
    const Packed<kDType> packed = load_packed<kDType>(a.base, first, n, a.aligned);
    widen(packed, x0);
    if (kStats) report_bad(a.piece, a.num_models, first, nonfinite_mask(packed, n), tally);
  }
  Sums<C> sums = {};
  const auto load = [&a, first, n](int m) { return load_packed<kDType>(a.models[m], first, n, a.aligned); };
  Pipeline<kDType> pipeline;
  pipeline.start(a.num_models, load);
  MK_ROLLED
  for (int m = 0; m < a.num_models; ++m)
    add_model<kDType, kStats>(a, m, pipeline.next(m, a.num_models, load), x0, first, n, &sums, tally);
  if (kStats) {
    unsigned positive = 0, negative = 0;
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      positive |= unsigned(sums.total[j] > C(0) && j < n) << j;
      negative |= unsigned(sums.total[j] < C(0) && j < n) << j;
    }
    tally.votes(count_bits(sums.above & sums.below), count_bits(positive), count_bits(negative));
  }
  if (a.out == nullptr) return;
  C y[kGroup];
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) y[j] = finish(a, sums, x0[j], j);
  write_result<kStats>(a, y, first, n, tally);
}

// Sums of squares over canonical blocks: sums[m * blocks + b], of x - x0, or of what a copy writes.
template <class C>
struct NormArgs {
  std::int64_t n, blocks;
  const void* base;
  double* sums;
  int num_models;
  bool copy, scaled, aligned;
  C scale;
  const void* models[kMaxModels];
};

// Adds the squares of eight elements to eight lanes.
template <int kDType, class C>
MK_HD void add_squares(const NormArgs<C>& a, int m, std::int64_t first, int n, double* lanes) {
  C d[kGroup], x0[kGroup] = {};
  widen(load_packed<kDType>(a.models[m], first, n, a.aligned), d);
  if (a.base != nullptr && !a.copy) widen(load_packed<kDType>(a.base, first, n, a.aligned), x0);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    C v = d[j] - x0[j];
    if (a.copy && a.scaled) v = v * a.scale;
    const double wide = double(v);
    lanes[j] = lanes[j] + wide * wide;
  }
}

}  // namespace mergekernels
