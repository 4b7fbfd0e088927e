// From the kept entries of all models to the merged delta q of a whole program, eight elements at a time.
//
// The models are walked more than once (sums and votes; what agrees with the vote; who uses the result); all but the
// first walk find their inputs in the cache, and the masks of the first.
#pragma once

#include "cuda/votes.h"

namespace mergekernels {

// q: the merged delta. total: what makes the result NaN. nonzero: see Votes. plus, minus: bit j set where that sign is
// elected.
template <class C>
struct Merged {
  C q[kGroup], total[kGroup];
  std::uint64_t nonzero;
  unsigned plus, minus;
};

template <int kDType, class C>
MK_HD unsigned agreeing_mask(const Group<C>& g, int m, const std::int32_t* segment, const Merged<C>& merged) {
  C e[kGroup], w[kGroup], weight[kGroup];
  entries<kDType>(g, m, e);
  weights_of(g, m, segment, weight);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) w[j] = weight[j] * e[j];
  return agreeing(g.p, merged.plus, merged.minus, e, w);
}

// The second walk: numerators and divisors that depend on the vote, and the lonely entries.
template <int kDType, class C>
MK_HD void second_walk(const Group<C>& g, const std::int32_t* segment, const Votes<C>& votes, Merged<C>* merged,
                       C* divisor, C* alone) {
  C best[kGroup];
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) merged->q[j] = divisor[j] = alone[j] = best[j] = C(0);
  MK_ROLLED
  for (int m = 0; m < g.p.num_models; ++m) {
    C e[kGroup], w[kGroup], weight[kGroup];
    entries<kDType>(g, m, e);
    weights_of(g, m, segment, weight);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) w[j] = weight[j] * e[j];
    const unsigned agree = agreeing(g.p, merged->plus, merged->minus, e, w);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const bool agrees = (agree >> j & 1u) != 0;
      if (g.p.merge == kMergeMax) {
        const C size = w[j] < C(0) ? -w[j] : w[j];
        merged->q[j] = agrees && size > merged->q[j] ? size : merged->q[j];
      } else if (g.p.merge == kMergeLargest) {
        const C size = e[j] < C(0) ? -e[j] : e[j];
        const bool leads = size >= best[j] && size != C(0);
        merged->q[j] = leads ? w[j] : merged->q[j];
        best[j] = leads ? size : best[j];
      } else {
        merged->q[j] = merged->q[j] + (agrees ? w[j] : C(0));
      }
      const C share = g.p.divisor == kDivisorAgreeingCount ? C(1) : weight[j];
      divisor[j] = divisor[j] + (agrees ? share : C(0));
      if (g.p.has_alone != 0) {
        const bool only = (votes.nonzero >> (8 * j) & 0xFFu) == 1 && e[j] != C(0);
        alone[j] = only ? g.p.models[m].alone * e[j] : alone[j];
      }
    }
  }
  if (g.p.merge == kMergeMax) {
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const C sign = C(int(merged->plus >> j & 1u) - int(merged->minus >> j & 1u));
      merged->q[j] = sign * merged->q[j];
    }
  }
}

// num of merge "importance": the inputs weighted by the importances that follow them.
template <int kDType, class C, class Tally>
MK_HD void importance_walk(const Group<C>& g, const std::int32_t* segment, C* num, Tally& tally) {
  C below[kGroup];
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) num[j] = below[j] = C(0);
  MK_ROLLED
  for (int m = 0; m < g.p.num_models; ++m) {
    C x[kGroup], f[kGroup], weight[kGroup];
    widen(load_input<kDType>(g, m), x);
    const Packed<kDType> packed = load_input<kDType>(g, g.p.num_models + m);
    widen(packed, f);
    // An importance below 0 is as wrong as one that is not finite.
    report_bad(g.at.piece, g.p.num_models + m, g.at.first,
               nonfinite_mask(packed, g.at.n) | (below_zero(f) & first_bits(g.at.n)), tally);
    weights_of(g, m, segment, weight);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const C share = weight[j] * (f[j] + g.p.epsilon);
      num[j] = num[j] + share * x[j];
      below[j] = below[j] + share;
    }
  }
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) num[j] = num[j] / below[j];
}

// num of merge "balance".
template <int kDType, class C>
MK_HD void balance_walk(const Group<C>& g, C* num) {
  C total[kGroup], below[kGroup];
  total_delta<kDType>(g, total);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) num[j] = below[j] = C(0);
  MK_ROLLED
  for (int m = 0; m < g.p.num_models; ++m) {
    const BalancePlan<C>& b = g.p.models[m].balance;
    C d[kGroup], z[kGroup] = {};
    deltas(g, load_input<kDType>(g, m), d);
    balance_keys(b, d, total, g.at.n, z);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const C size = d[j] < C(0) ? -d[j] : d[j];
      const C a = size < b.lo ? b.lo : size > b.hi ? b.hi : size;
      const C signed_a = d[j] < C(0) ? -a : d[j] == C(0) ? C(0) : a;
      const C share = b.top == b.cut ? C(0) : ((z[j] < b.cut ? b.cut : z[j]) - b.cut) / (b.top - b.cut);
      num[j] = num[j] + share * signed_a;
      below[j] = below[j] + share;
    }
  }
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) num[j] = num[j] / (below[j] < g.p.epsilon ? g.p.epsilon : below[j]);
}

// q from the numerator.
template <class C>
MK_HD C settle(const Plan<C>& p, C num, C divisor, C alone, int nonzero) {
  C q = num;
  if (p.divisor != kDivisorNone) {
    C by = divisor;
    if (p.divisor == kDivisorValue) by = p.divisor_value;
    if (p.divisor == kDivisorAgreeingWeights && p.has_floor != 0) by = by < p.divisor_floor ? p.divisor_floor : by;
    if (p.divisor == kDivisorAgreeingWeights && p.has_floor == 0) by = by == C(0) ? C(1) : by;
    if (p.divisor == kDivisorAgreeingCount && by < C(1)) by = C(1);
    if (p.divisor == kDivideByKept) by = nonzero < 1 ? C(1) : C(nonzero);
    q = q / by;
  }
  if (p.has_alone != 0 && nonzero == 1) q = alone;
  if (p.has_limit != 0) {
    const C size = q < C(0) ? -q : q;
    const bool small = size < p.limit_below;
    const C clipped = q > p.limit ? p.limit : q < -p.limit ? -p.limit : q;
    q = small ? q * p.limit_factor : clipped;
  }
  return q;
}

// Bit j set: model m uses the merged delta of element j, see Useful.
template <int kDType, class C>
MK_HD unsigned useful_mask(const Group<C>& g, int m, const C* q) {
  C d[kGroup];
  deltas(g, load_input<kDType>(g, m), d);
  const C threshold = g.p.models[m].useful;
  unsigned mask = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    const C apart = q[j] - d[j];
    mask |= unsigned((d[j] < C(0) ? -d[j] : d[j]) > threshold * (apart < C(0) ? -apart : apart)) << j;
  }
  return mask;
}

// The whole program up to q, which `useful` has not been applied to.
template <int kDType, class C, class Tally>
MK_HD void merge_group(Group<C>& g, const std::int32_t* segment, Merged<C>* merged, Tally& tally) {
  Votes<C> votes;
  first_walk<kDType>(g, segment, &votes, tally);
  merged->nonzero = votes.nonzero;
  merged->plus = merged->minus = 0;
  if (g.p.vote != kVoteNone) {
    merged->plus = above_zero(votes.vote);
    merged->minus = below_zero(votes.vote);
    const unsigned zero = ~(merged->plus | merged->minus) & 0xFFu;
    if (g.p.zero_vote > 0) merged->plus |= zero;
    if (g.p.zero_vote < 0) merged->minus |= zero;
  }
  C divisor[kGroup] = {}, alone[kGroup] = {};
  const bool walks = g.p.vote != kVoteNone || g.p.merge == kMergeLargest || g.p.has_alone != 0;
  if (walks) second_walk<kDType>(g, segment, votes, merged, divisor, alone);
  const bool own = g.p.merge == kMergeImportance || g.p.merge == kMergeBalance;
  if (g.p.merge == kMergeImportance) importance_walk<kDType>(g, segment, merged->q, tally);
  if (g.p.merge == kMergeBalance) balance_walk<kDType>(g, merged->q);
  const bool plain = g.p.merge == kMergeSum && g.p.vote == kVoteNone;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    const C num = plain ? votes.sum[j] : merged->q[j];
    merged->total[j] = own ? num : votes.sum[j];
    merged->q[j] = settle(g.p, num, divisor[j], alone[j], int(votes.nonzero >> (8 * j) & 0xFFu));
  }
}

// q becomes +0 where too few models use it.
template <int kDType, class C>
MK_HD void drop_useless(const Group<C>& g, Merged<C>* merged) {
  if (g.p.useful_at_least < 0) return;
  std::uint64_t users = 0;
  MK_ROLLED
  for (int m = 0; m < g.p.num_models; ++m) {
    const unsigned mask = useful_mask<kDType>(g, m, merged->q);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) users += std::uint64_t(mask >> j & 1u) << (8 * j);
  }
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j)
    if (int(users >> (8 * j) & 0xFFu) < g.p.useful_at_least) merged->q[j] = C(0);
}

// q becomes y before the anchor.
template <class C>
MK_HD void scale_merged(const Plan<C>& p, Merged<C>* merged) {
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    const C y = p.scaled != 0 ? merged->q[j] * p.scale : merged->q[j];
    merged->q[j] = merged->total[j] == merged->total[j] ? y : merged->total[j];
  }
}

}  // namespace mergekernels
