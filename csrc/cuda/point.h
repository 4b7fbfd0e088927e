// Whether entries pass a point (tau, word, index), eight at a time.
#pragma once

#include "cuda/group.h"

namespace mergekernels {

// A point as a kernel takes it. bound: kept above it without looking at ties. rule: kTiesHash, kTiesIndex, or
// kTiesNone.
template <class C>
struct Point {
  using Signed = typename KeyOf<C>::SignedKey;
  Signed bound, tau;
  std::int64_t index;
  std::uint32_t word;
  std::int32_t rule;
};

// The point that everything passes.
template <class C>
MK_HD Point<C> pass_all() {
  return {-1, -1, 0, 0, kTiesNone};
}

template <class C>
MK_HD Point<C> to_point(const KeepPoint& keep) {
  Point<C> p = pass_all<C>();
  p.bound = key_bound<C>(keep);
  if (keep.ties == kTiesAll || keep.ties == kTiesNone || keep.tau > KeyOf<C>::kMax) return p;
  p.tau = static_cast<typename KeyOf<C>::SignedKey>(keep.tau);
  p.rule = keep.ties;
  p.word = keep.word;
  p.index = keep.index;
  return p;
}

// Where a group of eight lies, and what its random words depend on.
struct Place {
  const Piece& piece;
  std::int64_t first;
  int n;
  bool quads;
  std::uint64_t seed;
  std::uint32_t tensor;
};

// Bit j set: element j, whose key is that of |d[j]|, passes the point. model: whose stream orders the ties.
template <class C>
MK_HD unsigned point_mask(const Point<C>& point, int model, const C* d, const Place& at) {
  using Signed = typename KeyOf<C>::SignedKey;
  unsigned kept = 0, tied = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    const Signed key = Signed(key_of(d[j]));
    kept |= unsigned(key > point.bound) << j;
    tied |= unsigned(key == point.tau && j < at.n) << j;
  }
  if (point.rule == kTiesNone || tied == 0) return kept;
  std::uint32_t words[kGroup] = {};
  if (point.rule == kTiesHash) tie_words(at.seed, at.tensor, model, at.piece, at.first, at.quads, tied, words);
  const std::uint32_t cut = point.rule == kTiesHash ? point.word : 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    if ((tied >> j & 1u) == 0) continue;
    kept |= unsigned(hash_tie_kept(words[j], flat_index(at.piece, at.first + j), cut, point.index)) << j;
  }
  return kept;
}

}  // namespace mergekernels
