// The unit of work of one thread: eight consecutive elements. Host and device run the same code.
#pragma once

#include "common/dtype.h"
#include "common/key.h"
#include "common/philox.h"
#include "common/program.h"

namespace mergekernels {

constexpr int kGroup = 8;

// Eight elements as they lie in memory.
template <int kDType>
struct alignas(16) Packed {
  typename Element<kDType>::Bits bits[kGroup];
};

// Elements first .. first + n - 1 (n <= 8, negative for none); the rest are zeros. `aligned`: whole groups begin at
// multiples of 16 bytes.
template <int kDType>
MK_HD Packed<kDType> load_packed(const void* data, std::int64_t first, int n, bool aligned) {
  using Bits = typename Element<kDType>::Bits;
  const Bits* at = static_cast<const Bits*>(data) + first;
  Packed<kDType> packed;
#if defined(__CUDA_ARCH__)
  if (aligned && n == kGroup) {
    constexpr int kWords = int(sizeof(packed) / sizeof(uint4));
    const uint4* from = reinterpret_cast<const uint4*>(at);
    uint4 words[kWords];
    MK_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = from[i];
    memcpy(&packed, words, sizeof(packed));
    return packed;
  }
#else
  (void)aligned;
#endif
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) packed.bits[j] = j < n ? at[j] : Bits(0);
  return packed;
}

template <int kDType, class C>
MK_HD void widen(const Packed<kDType>& packed, C* x) {
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) x[j] = Element<kDType>::template load<C>(packed.bits[j]);
}

template <int kDType>
MK_HD void store_packed(const Packed<kDType>& packed, void* data, std::int64_t first, int n, bool aligned) {
  using Bits = typename Element<kDType>::Bits;
  Bits* at = static_cast<Bits*>(data) + first;
#if defined(__CUDA_ARCH__)
  if (aligned && n == kGroup) {
    constexpr int kWords = int(sizeof(packed) / sizeof(uint4));
    uint4 words[kWords];
    memcpy(words, &packed, sizeof(packed));
    MK_UNROLL
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(at)[i] = words[i];
    return;
  }
#else
  (void)aligned;
#endif
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j)
    if (j < n) at[j] = packed.bits[j];
}

template <int kDType, class C>
MK_HD Packed<kDType> narrow(const C* y) {
  Packed<kDType> packed;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) packed.bits[j] = Element<kDType>::store(y[j]);
  return packed;
}

// The exponent field of a type: all ones for NaN and infinity.
template <int kDType>
struct Exponent;
template <>
struct Exponent<kBF16> {
  static constexpr std::uint16_t kMask = 0x7F80;
};
template <>
struct Exponent<kF16> {
  static constexpr std::uint16_t kMask = 0x7C00;
};
template <>
struct Exponent<kF32> {
  static constexpr std::uint32_t kMask = 0x7F800000u;
};
template <>
struct Exponent<kF64> {
  static constexpr std::uint64_t kMask = 0x7FF0000000000000ull;
};

// Bit j set: element j < n is NaN or infinite.
template <int kDType>
MK_HD unsigned nonfinite_mask(const Packed<kDType>& packed, int n) {
  constexpr auto kMask = Exponent<kDType>::kMask;
  unsigned mask = 0;
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) mask |= unsigned(j < n && (packed.bits[j] & kMask) == kMask) << j;
  return mask;
}

// Word `lane` of four, without an indexed array, which would live in memory.
MK_HD std::uint32_t lane_of(const Philox4& words, std::int64_t lane) {
  const std::uint32_t even = (lane & 2) != 0 ? words.word[2] : words.word[0];
  const std::uint32_t odd = (lane & 2) != 0 ? words.word[3] : words.word[1];
  return (lane & 1) != 0 ? odd : even;
}

// The first n bits.
MK_HD unsigned first_bits(int n) { return n <= 0 ? 0u : (1u << n) - 1u; }

// Words of a Philox stream for the elements in `wanted` among the eight that begin at position `first` of the piece;
// others are left alone. quads: the flat indices are consecutive and begin at a multiple of 4, so that one call serves
// four elements.
MK_HD void group_words(std::uint64_t seed, std::uint32_t tensor, std::uint32_t stream, const Piece& piece,
                       std::int64_t first, bool quads, unsigned wanted, std::uint32_t* words) {
  // Loops that are not unrolled, and selection instead of indexing: one copy of Philox in the code, no array in memory.
  if (quads) {
    const std::uint64_t group = static_cast<std::uint64_t>(piece.g0 + first) >> 2;
    MK_ROLLED
    for (int half = 0; half < 2; ++half) {
      if ((wanted >> (4 * half) & 0x0Fu) == 0) continue;
      const Philox4 four = philox_group(seed, tensor, stream, group + std::uint64_t(half));
      MK_UNROLL
      for (int j = 0; j < kGroup; ++j) words[j] = j / 4 == half ? four.word[j % 4] : words[j];
    }
    return;
  }
  MK_ROLLED
  for (int i = 0; i < kGroup; ++i) {
    if ((wanted >> i & 1u) == 0) continue;
    const std::int64_t g = flat_index(piece, first + i);
    const std::uint32_t word = lane_of(philox_group(seed, tensor, stream, static_cast<std::uint64_t>(g) >> 2), g);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) words[j] = j == i ? word : words[j];
  }
}

MK_HD void tie_words(std::uint64_t seed, std::uint32_t tensor, int model, const Piece& piece, std::int64_t first,
                     bool quads, unsigned wanted, std::uint32_t* words) {
  group_words(seed, tensor, philox_stream(model, kPurposeTie), piece, first, quads, wanted, words);
}

// Element i of eight in registers, i known at run time only: an indexed array would live in memory.
template <class T>
MK_HD T pick(const T* x, int i) {
  T value = x[0];
  MK_UNROLL
  for (int j = 1; j < kGroup; ++j) value = j == i ? x[j] : value;
  return value;
}

// Groups of the next models on their way while one is worked on: reads are issued `kAhead` models early.
template <int kDType>
struct Pipeline {
  static constexpr int kAhead = kDType == kF64 ? 1 : kDType == kF32 ? 1 : 2;
  Packed<kDType> slots[kAhead + 1];

  template <class Load>
  MK_HD void start(int num_models, const Load& load) {
    MK_UNROLL
    for (int i = 0; i <= kAhead; ++i)
      if (i < num_models) slots[i] = load(i);
  }

  // The group of model m, called for m = 0, 1, ... in order.
  template <class Load>
  MK_HD Packed<kDType> next(int m, int num_models, const Load& load) {
    const Packed<kDType> current = slots[0];
    MK_UNROLL
    for (int i = 0; i < kAhead; ++i) slots[i] = slots[i + 1];
    if (m + kAhead + 1 < num_models) slots[kAhead] = load(m + kAhead + 1);
    return current;
  }
};

MK_HD int count_bits(unsigned mask) {
#if defined(__CUDA_ARCH__)
  return __popc(mask);
#else
  return __builtin_popcount(mask);
#endif
}

// Position of the lowest set bit.
MK_HD int lowest_bit(unsigned mask) {
#if defined(__CUDA_ARCH__)
  return __ffs(int(mask)) - 1;
#else
  return __builtin_ctz(mask);
#endif
}

// Reports non-finite elements of a group: `tally` takes the source, the number and the smallest flat index.
template <class Tally>
MK_HD void report_bad(const Piece& piece, int source, std::int64_t first, unsigned mask, Tally& tally) {
  // Flat indices grow along a group.
  if (mask != 0) tally.nonfinite(source, count_bits(mask), flat_index(piece, first + lowest_bit(mask)));
}

}  // namespace mergekernels
