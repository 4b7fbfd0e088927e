// divergence: per row the terms of the divergence of two softmaxes; see Backend.divergence. Eight elements at a time.
// Reads both inputs once per pass.
#pragma once

#include "common/program.h"
#include "common/transcendental.h"
#include "cuda/group.h"

namespace mergekernels {

// One call, by value. maxima: C [2][rows], of the model and of the base. totals: nullptr in the first pass, whose sums
// are those of e, double [2][rows][blocks]; in the second C [2][rows], and the sums are those of the terms,
// [rows][blocks].
template <class C>
struct DivergenceArgs {
  std::int64_t rows, cols, blocks;
  const void* inputs[2];  // model, base
  const C* maxima;
  const C* totals;
  double* sums;
  bool aligned;
};

template <class C>
MK_HD C softmax_term(C x, C highest) {
  return C(exact_exp(double(C(x - highest))));
}

template <class C>
MK_HD C softmax(C x, C highest, C total) {
  const C share = softmax_term(x, highest) / total;
  return share + C(1e-8);
}

// Adds what a pass sums to eight lanes: side 0 or 1 in the first pass. at: column of the first element.
template <int kDType, class C>
MK_HD void add_terms(const DivergenceArgs<C>& a, int side, std::int64_t row, std::int64_t at, int n, double* lanes) {
  C x[kGroup], y[kGroup] = {};
  const std::int64_t first = row * a.cols + at;
  widen(load_packed<kDType>(a.inputs[side], first, n, a.aligned), x);
  if (a.totals != nullptr) widen(load_packed<kDType>(a.inputs[1], first, n, a.aligned), y);
  // One copy of the functions in the code.
  MK_ROLLED
  for (int i = 0; i < n; ++i) {
    C value;
    if (a.totals == nullptr) {
      value = softmax_term(pick(x, i), a.maxima[side * a.rows + row]);
    } else {
      const C p = softmax(pick(x, i), a.maxima[row], a.totals[row]);
      const C q = softmax(pick(y, i), a.maxima[a.rows + row], a.totals[a.rows + row]);
      value = p * C(exact_log(double(C(p / q))));
    }
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) lanes[j] = j == i ? lanes[j] + double(value) : lanes[j];
  }
}

}  // namespace mergekernels
