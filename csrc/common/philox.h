// Philox4x32-10 (Salmon et al., SC 2011): counter-based random words, one per element.
#pragma once

#include "common/hd.h"

namespace mergekernels {

struct Philox4 {
  std::uint32_t word[4];
};

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
// What the words of a model are for. Masks and groups are not a model's: their streams are kPurposeMask, kPurposeGroup.
constexpr std::uint32_t kPurposeDraw = 0, kPurposeMask = 1, kPurposeTie = 2, kPurposeGroup = 3;

MK_HD Philox4 philox4x32_10(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint32_t k0,
                            std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t(kPhiloxM0) * c0;
    const std::uint64_t p1 = std::uint64_t(kPhiloxM1) * c2;
    const std::uint32_t n0 = std::uint32_t(p1 >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = std::uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = std::uint32_t(p1);
    c3 = std::uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// The four words of elements 4 * group .. 4 * group + 3. Key: the seed. Counter: group (64 bits), tensor id, stream.
MK_HD Philox4 philox_group(std::uint64_t seed, std::uint32_t tensor, std::uint32_t stream, std::uint64_t group) {
  return philox4x32_10(std::uint32_t(group), std::uint32_t(group >> 32), tensor, stream, std::uint32_t(seed),
                       std::uint32_t(seed >> 32));
}

// The word of the element with flat index g.
MK_HD std::uint32_t philox_word(std::uint64_t seed, std::uint32_t tensor, std::uint32_t stream, std::uint64_t g) {
  return philox_group(seed, tensor, stream, g >> 2).word[g & 3];
}

// The stream of a model for a purpose.
MK_HD std::uint32_t philox_stream(int model, std::uint32_t purpose) { return 16u * std::uint32_t(model) + purpose; }

}  // namespace mergekernels
