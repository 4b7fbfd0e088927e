// Numbers that are ranked instead of |delta|: the variance over the models, the weighted delta, and the competition of
// "balance"; see Sweep in ops/sweeps.py. Eight elements at a time.
#pragma once

#include "common/transcendental.h"
#include "cuda/group.h"

namespace mergekernels {

enum KeyKind : std::int32_t { kKeyDelta = 0, kKeyVariance = 1, kKeyImportance = 2, kKeyBalance = 3, kKeyDrawn = 4 };

// See Balance in ops/program.py; the order of the fields is that of the table in `Launches`.
template <class C>
struct BalancePlan {
  C lo, hi, spread, cut, top;
};

// +0 + d1 + ... + dT; load(m, d) gives the deltas of a model.
template <class C, class Load>
MK_HD void sum_of(int num_models, const Load& load, C* s) {
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) s[j] = C(0);
  MK_ROLLED
  for (int m = 0; m < num_models; ++m) {
    C d[kGroup];
    load(m, d);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) s[j] = s[j] + d[j];
  }
}

template <class C, class Load>
MK_HD void variance_of(int num_models, const Load& load, C* v) {
  const C count = C(num_models);
  C mean[kGroup];
  sum_of(num_models, load, mean);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    mean[j] = mean[j] / count;
    v[j] = C(0);
  }
  MK_ROLLED
  for (int m = 0; m < num_models; ++m) {
    C d[kGroup];
    load(m, d);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const C away = d[j] - mean[j];
      v[j] = v[j] + away * away;
    }
  }
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) v[j] = v[j] / count;
}

// d becomes |d| times the number of its row.
template <class C>
MK_HD void important(const C* rows, std::int64_t row_length, const Piece& piece, std::int64_t first, int n, C* d) {
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j)
    if (j < n) d[j] = (d[j] < C(0) ? -d[j] : d[j]) * rows[flat_index(piece, first + j) / row_length];
}

// The number z of Balance for one element.
template <class C>
MK_HD C balance_key(const BalancePlan<C>& b, C d, C total) {
  const C size = d < C(0) ? -d : d;
  const C a = size < b.lo ? b.lo : size > b.hi ? b.hi : size;
  const C m = b.hi == b.lo ? C(0) : (a - b.lo) / (b.hi - b.lo);
  const C square = m * m;
  const C grown = C(exact_exp(double(C(b.spread * square))));
  const C z = grown * C(exact_tanh(double(C(d * total))));
  return z < C(0) ? C(0) : z;
}

// Eight of them; one copy of the functions in the code.
template <class C>
MK_HD void balance_keys(const BalancePlan<C>& b, const C* d, const C* total, int n, C* z) {
  MK_ROLLED
  for (int i = 0; i < n; ++i) {
    const C value = balance_key(b, pick(d, i), pick(total, i));
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) z[j] = j == i ? value : z[j];
  }
}

}  // namespace mergekernels
