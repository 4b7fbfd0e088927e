// Keys: the bit pattern of |delta|, which orders like |delta|; and the point at which a selection cuts.
#pragma once

#include "common/hd.h"

namespace mergekernels {

template <class C>
struct KeyOf;

template <>
struct KeyOf<float> {
  using Key = std::uint32_t;
  using SignedKey = std::int32_t;
  static constexpr Key kMax = 0x7F800001u;  // every NaN
  static constexpr Key kInf = 0x7F800000u;
  static constexpr Key kMagnitude = 0x7FFFFFFFu;
};

template <>
struct KeyOf<double> {
  using Key = std::uint64_t;
  using SignedKey = std::int64_t;
  static constexpr Key kMax = 0x7FF0000000000001ull;
  static constexpr Key kInf = 0x7FF0000000000000ull;
  static constexpr Key kMagnitude = 0x7FFFFFFFFFFFFFFFull;
};

template <class C>
MK_HD typename KeyOf<C>::Key magnitude_bits(C x) {
  return bits_as<typename KeyOf<C>::Key>(x) & KeyOf<C>::kMagnitude;
}

template <class C>
MK_HD typename KeyOf<C>::Key key_of(C delta) {
  const auto bits = magnitude_bits(delta);
  return bits < KeyOf<C>::kMax ? bits : KeyOf<C>::kMax;
}

enum Ties : int { kTiesAll = 0, kTiesNone = 1, kTiesHash = 2, kTiesIndex = 3 };

// See Keep in ops/program.py. `active` is 0 for a model that is not trimmed.
struct KeepPoint {
  std::uint64_t tau;
  std::int64_t index;
  std::uint32_t word;
  int ties;
  int active;
};

// Whether an element whose key equals tau is kept under "hash": (word, g) <= (keep.word, keep.index).
MK_HD bool hash_tie_kept(std::uint32_t word, std::int64_t g, std::uint32_t keep_word, std::int64_t keep_index) {
  // Without branches: half of the words are below any bound that matters.
  return bool(int(word < keep_word) | (int(word == keep_word) & int(g <= keep_index)));
}

// The exclusive bound on keys: kept without looking at ties iff key > bound (as signed numbers). "all" lowers tau by
// one.
template <class C>
MK_HD typename KeyOf<C>::SignedKey key_bound(const KeepPoint& keep) {
  using Signed = typename KeyOf<C>::SignedKey;
  if (keep.tau > KeyOf<C>::kMax) return Signed(KeyOf<C>::kMagnitude);
  const Signed bound = Signed(keep.tau) - (keep.ties == kTiesAll ? 1 : 0);
  // Keys are not clamped before this comparison, so a bound at the key of NaN must lie above every NaN pattern.
  return bound >= Signed(KeyOf<C>::kMax) ? Signed(KeyOf<C>::kMagnitude) : bound;
}

}  // namespace mergekernels
