// The general pass: a whole program of ops/program.py on eight elements, to a result, to packed bits, or to numbers
// that are summed. Reads each input from memory once, again from the cache for every further walk; writes the output
// once.
#pragma once

#include "cuda/combine.h"

namespace mergekernels {

template <int kOut, class C, class Tally>
MK_HD void put_group(const ProgramArgs<C>& a, const C* y, std::int64_t first, int n, Tally& tally) {
  const Packed<kOut> packed = narrow<kOut>(y);
  store_packed(packed, a.out, first, n, a.aligned);
  report_bad(a.piece, a.num_inputs + 1, first, nonfinite_mask(packed, n), tally);
}

// One packed byte per model: what a.mark asks for.
template <int kDType, class C>
MK_HD void write_marks(const Group<C>& g, const std::int32_t* segment, const Merged<C>& merged) {
  if (g.at.n <= 0) return;
  MK_ROLLED
  for (int m = 0; m < g.p.num_models; ++m) {
    unsigned bits = g.kept[m * g.stride];
    if (g.a.mark == kMarkUseful) bits = useful_mask<kDType>(g, m, merged.q);
    if (g.a.mark == kMarkAgreeing) bits = agreeing_mask<kDType>(g, m, segment, merged);
    g.a.marks[m][g.at.first / kGroup] = std::uint8_t(bits & first_bits(g.at.n));
  }
}

// Elements first .. first + 7 of the piece, of which n exist (0 or less: none, but the tally is called all the same).
template <int kDType, class C, class Tally>
MK_HD void program_group(const ProgramArgs<C>& a, std::int64_t first, int n, std::uint8_t* kept, int stride,
                         Tally& tally) {
  Group<C> g = begin_group<kDType>(a, first, n, kept, stride, tally);
  const Plan<C>& p = g.p;
  std::int32_t segment[kGroup] = {};
  if (p.axis != kAxisNone) find_segments(g, segment);
  Merged<C> merged;
  merge_group<kDType>(g, segment, &merged, tally);
  if (a.mark != kMarkNone) {
    write_marks<kDType>(g, segment, merged);
    return;
  }
  if (a.out == nullptr) return;
  drop_useless<kDType>(g, &merged);
  scale_merged(p, &merged);
  if (a.base != nullptr) {
    C anchor[kGroup];
    widen(load_packed<kDType>(p.anchor_first != 0 ? a.models[0] : a.base, first, n, a.aligned), anchor);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) merged.q[j] = anchor[j] + merged.q[j];
  }
  switch (a.out_dtype) {
    case kBF16:
      put_group<kBF16>(a, merged.q, first, n, tally);
      break;
    case kF16:
      put_group<kF16>(a, merged.q, first, n, tally);
      break;
    case kF32:
      put_group<kF32>(a, merged.q, first, n, tally);
      break;
    default:
      put_group<kF64>(a, merged.q, first, n, tally);
      break;
  }
}

}  // namespace mergekernels
