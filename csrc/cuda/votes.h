// The first walk over the models: what is kept of each, their sum, and the vote.
#pragma once

#include "cuda/rules.h"

namespace mergekernels {

// Takes counts and does nothing with them.
struct NoTally {
  MK_HD void kept(int, int) {}
  MK_HD void votes(int, int, int) {}
  MK_HD void nonfinite(int, int, std::int64_t) {}
};

// Begins a group: what deltas are taken from, and the joint mask. kept: room for a mask of each model.
template <int kDType, class C, class Tally>
MK_HD Group<C> begin_group(const ProgramArgs<C>& a, std::int64_t first, int n, std::uint8_t* kept, int stride,
                           Tally& tally) {
  const Plan<C>& p = *a.plan;
  Group<C> g{a, p, Place{a.piece, first, n, a.quads, p.seed, p.tensor}, {}, kept, stride, 0xFFu};
  if (a.base != nullptr) {
    const Packed<kDType> packed = load_packed<kDType>(a.base, first, n, a.aligned);
    report_bad(a.piece, a.num_inputs, first, nonfinite_mask(packed, n), tally);
    if (p.subtract != 0) widen(packed, g.from);
  }
  g.joint = joint_mask<kDType>(g);
  return g;
}

// Bit j set: v[j] > 0, or v[j] < 0.
template <class C>
MK_HD unsigned above_zero(const C* v) {
  unsigned mask = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) mask |= unsigned(v[j] > C(0)) << j;
  return mask;
}
template <class C>
MK_HD unsigned below_zero(const C* v) {
  unsigned mask = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) mask |= unsigned(v[j] < C(0)) << j;
  return mask;
}

// The numbers of the segments of eight elements.
template <class C>
MK_HD void find_segments(const Group<C>& g, std::int32_t* segment) {
  const std::int64_t length = g.p.table_length;
  if (g.p.axis == kAxisGroups) {
    std::uint32_t words[kGroup] = {};
    group_words(g.p.seed, g.p.table_tensor, kPurposeGroup, g.at.piece, g.at.first, g.at.quads, first_bits(g.at.n),
                words);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) segment[j] = std::int32_t(std::uint64_t(words[j]) * std::uint64_t(length) >> 32);
    return;
  }
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    const std::int64_t flat = j < g.at.n ? flat_index(g.at.piece, g.at.first + j) : 0;
    segment[j] = std::int32_t(g.p.axis == kAxisRows ? flat / length : flat % length);
  }
}

// wt of model m, for each element.
template <class C>
MK_HD void weights_of(const Group<C>& g, int m, const std::int32_t* segment, C* weight) {
  const C common = g.p.models[m].weight;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j)
    weight[j] = g.p.axis == kAxisNone ? common : j < g.at.n ? g.p.table[m * g.p.segments + segment[j]] : C(0);
}

// What the first walk finds besides the masks: s, the vote (s without one), and how many et are not 0, a byte for each
// element.
template <class C>
struct Votes {
  C sum[kGroup], vote[kGroup];
  std::uint64_t nonzero;
};

template <int kDType, class C, class Tally>
MK_HD void first_walk(Group<C>& g, const std::int32_t* segment, Votes<C>* found, Tally& tally) {
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) found->sum[j] = found->vote[j] = C(0);
  found->nonzero = 0;
  unsigned above = 0, below = 0;
  const unsigned there = first_bits(g.at.n);
  const auto load = [&g](int m) { return load_input<kDType>(g, m); };
  // Groups of float64 leave no registers for a second one on its way.
  constexpr bool kAhead = kDType != kF64;
  Pipeline<kDType> pipeline;
  if constexpr (kAhead) pipeline.start(g.p.num_models, load);
  MK_ROLLED
  for (int m = 0; m < g.p.num_models; ++m) {
    Packed<kDType> packed;
    if constexpr (kAhead) {
      packed = pipeline.next(m, g.p.num_models, load);
    } else {
      packed = load(m);
    }
    C e[kGroup], weight[kGroup];
    deltas(g, packed, e);
    const unsigned kept = rule_mask(g, m, e) & g.joint;
    g.kept[m * g.stride] = std::uint8_t(kept);
    trim(g, m, kept, e);
    apply_factor(g, m, e);
    weights_of(g, m, segment, weight);
    unsigned nonzero = 0;
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const C w = weight[j] * e[j];
      found->sum[j] = found->sum[j] + w;
      above |= unsigned(w > C(0)) << j;
      below |= unsigned(w < C(0)) << j;
      nonzero |= unsigned(e[j] != C(0)) << j;
      found->nonzero += std::uint64_t(e[j] != C(0)) << (8 * j);
      if (g.p.vote == kVotePlain) found->vote[j] = found->vote[j] + e[j];
      if (g.p.vote == kVoteCount) found->vote[j] = found->vote[j] + C(int(e[j] > C(0)) - int(e[j] < C(0)));
    }
    tally.kept(m, count_bits(nonzero & there));
    report_bad(g.at.piece, m, g.at.first, nonfinite_mask(packed, g.at.n), tally);
  }
  if (g.p.vote == kVoteWeighted || g.p.vote == kVoteNone) {
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) found->vote[j] = found->sum[j];
  }
  tally.votes(count_bits(above & below & there), count_bits(above_zero(found->vote) & there),
              count_bits(below_zero(found->vote) & there));
}

// Bit j set: model m, of which e and w are given, agrees with the elected sign.
template <class C>
MK_HD unsigned agreeing(const Plan<C>& p, unsigned plus, unsigned minus, const C* e, const C* w) {
  const bool weighted = p.vote == kVoteWeighted;
  C stand[kGroup];
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) stand[j] = weighted ? w[j] : e[j];
  return (above_zero(stand) & plus) | (below_zero(stand) & minus);
}

}  // namespace mergekernels
