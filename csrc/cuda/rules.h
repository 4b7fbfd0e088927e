// Which entries of a model are kept, and what is kept of them, eight elements at a time.
#pragma once

#include "cuda/plan.h"

namespace mergekernels {

// Eight elements of a call: where they are and what is known of them. from: what deltas are taken from, the base or +0.
// kept: masks of the models, `stride` bytes apart. joint: bit j set where the joint point is passed.
template <class C>
struct Group {
  const ProgramArgs<C>& a;
  const Plan<C>& p;
  Place at;
  C from[kGroup];
  std::uint8_t* kept;
  int stride;
  unsigned joint;
};

template <int kDType, class C>
MK_HD Packed<kDType> load_input(const Group<C>& g, int m) {
  return load_packed<kDType>(g.a.models[m], g.at.first, g.at.n, g.a.aligned);
}

template <int kDType, class C>
MK_HD void deltas(const Group<C>& g, const Packed<kDType>& packed, C* d) {
  widen(packed, d);
  // Without a base `from` is +0, and x - (+0) has the bits of x.
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) d[j] = d[j] - g.from[j];
}

// The deltas of any model, for sums over all of them.
template <int kDType, class C>
struct LoadDeltas {
  const Group<C>& g;
  MK_HD void operator()(int m, C* d) const { deltas(g, load_input<kDType>(g, m), d); }
};

// +0 + d1 + ... + dT.
template <int kDType, class C>
MK_HD void total_delta(const Group<C>& g, C* s) {
  sum_of(g.p.num_models, LoadDeltas<kDType, C>{g}, s);
}

template <int kDType, class C>
MK_HD unsigned joint_mask(const Group<C>& g) {
  if (g.p.joint == kJointNone) return 0xFFu;
  C key[kGroup];
  if (g.p.joint == kJointVariance) {
    variance_of(g.p.num_models, LoadDeltas<kDType, C>{g}, key);
  } else {
    deltas(g, load_input<kDType>(g, 0), key);
    important(g.p.rows, g.p.row_length, g.at.piece, g.at.first, g.at.n, key);
  }
  return point_mask(g.p.joint_point, 0, key, g.at);
}

// Eight bits of a packed mask whose first element is bit `shift` of its first byte.
MK_HD unsigned packed_bits(const std::uint8_t* bits, int shift, std::int64_t first, int n) {
  if (n <= 0) return 0;
  const std::uint8_t* at = bits + first / kGroup;
  const unsigned low = unsigned(at[0]) >> shift;
  return n > kGroup - shift ? (low | unsigned(at[1]) << (kGroup - shift)) & 0xFFu : low;
}

// Bit j set: model m's own rule keeps element j, whose delta is d[j].
template <class C>
MK_HD unsigned rule_mask(const Group<C>& g, int m, const C* d) {
  const ModelPlan<C>& model = g.p.models[m];
  switch (model.rule) {
    case kRulePoint:
    case kRuleBand:
    case kRuleDraw: {
      // All points by one copy of the code.
      unsigned kept = 0;
      MK_ROLLED
      for (int i = 0; i < (model.rule == kRuleBand ? 2 : 1); ++i) {
        const unsigned passed = point_mask(i == 0 ? model.point : model.top, m, d, g.at);
        kept = i == 0 ? passed : kept & ~passed;
      }
      if (model.rule != kRuleDraw) return kept;
      std::uint32_t words[kGroup] = {};
      group_words(g.at.seed, g.at.tensor, philox_stream(m, kPurposeDraw), g.at.piece, g.at.first, g.at.quads,
                  first_bits(g.at.n), words);
      unsigned drawn = 0;
      MK_UNROLL
      for (int j = 0; j < kGroup; ++j) drawn |= unsigned(std::uint64_t(words[j]) < model.threshold) << j;
      return kept & drawn;
    }
    case kRuleMarked:
      return packed_bits(model.marks, g.p.marks_shift, g.at.first, g.at.n);
    case kRuleRank: {
      unsigned kept = 0;
      MK_UNROLL
      for (int j = 0; j < kGroup; ++j) kept |= unsigned(j < g.at.n && model.masks[g.at.first + j] != 0) << j;
      return kept;
    }
    default:
      return 0xFFu;
  }
}

// Deltas become et before `factors`: +0 where not kept, divided where a rank rule asks for it.
template <class C>
MK_HD void trim(const Group<C>& g, int m, unsigned kept, C* d) {
  const ModelPlan<C>& model = g.p.models[m];
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) d[j] = (kept >> j & 1u) != 0 ? d[j] : C(0);
  if (model.thresholds == nullptr) return;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    if (j >= g.at.n || (kept >> j & 1u) == 0) continue;
    const std::uint64_t threshold = std::uint64_t(model.thresholds[g.at.first + j]) + 1;
    d[j] = d[j] / (C(threshold) * C(1.0 / 4294967296.0));
  }
}

template <class C>
MK_HD void apply_factor(const Group<C>& g, int m, C* e) {
  if (g.p.models[m].scaled == 0) return;
  const C factor = g.p.models[m].factor;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) e[j] = e[j] * factor;
}

// et of model m, whose mask has been noted.
template <int kDType, class C>
MK_HD void entries(const Group<C>& g, int m, C* e) {
  deltas(g, load_input<kDType>(g, m), e);
  trim(g, m, g.kept[m * g.stride], e);
  apply_factor(g, m, e);
}

}  // namespace mergekernels
