// Element types as bit patterns: exact widening, and rounding to nearest even with integers.
#pragma once

#include <cmath>

#include "common/hd.h"

namespace mergekernels {

enum DTypeCode : int { kBF16 = 0, kF16 = 1, kF32 = 2, kF64 = 3 };

constexpr int itemsize(int dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

MK_HD float bf16_to_float(std::uint16_t h) { return bits_as<float>(std::uint32_t(h) << 16); }

// A half with its exponent field moved to a float's is 2^-112 of its value; the product with 2^112 is exact, for
// subnormals too.
MK_HD float half_to_float(std::uint16_t h) {
  const std::uint32_t magnitude = (std::uint32_t(h) & 0x7FFFu) << 13;
  const float scaled = bits_as<float>(magnitude) * bits_as<float>(0x77800000u);
  const std::uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  return bits_as<float>(bits_as<std::uint32_t>(scaled) | special | (std::uint32_t(h) & 0x8000u) << 16);
}

MK_HD std::uint16_t float_to_bf16(float x) {
  const std::uint32_t u = bits_as<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return std::uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

MK_HD std::uint16_t float_to_half(float x) {
  const std::uint32_t u = bits_as<std::uint32_t>(x);
  const std::uint32_t magnitude = u & 0x7FFFFFFFu;
  // Normal results: move the exponent (by 112), round away 13 bits.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lets the float adder round at the half's last place, to nearest even.
  const std::uint32_t tiny = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  const std::uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  const std::uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  // From 65520 on everything rounds to infinity. A NaN is canonical, without its sign.
  const std::uint32_t sign = magnitude > 0x7F800000u ? 0u : (u >> 16) & 0x8000u;
  return std::uint16_t((magnitude >= 0x477FF000u ? large : finite) | sign);
}

MK_HD std::uint32_t float_to_canonical(float x) {
  const std::uint32_t u = bits_as<std::uint32_t>(x);
  return (u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : u;
}

MK_HD std::uint64_t double_to_canonical(double x) {
  const std::uint64_t u = bits_as<std::uint64_t>(x);
  return (u & 0x7FFFFFFFFFFFFFFFull) > 0x7FF0000000000000ull ? 0x7FF8000000000000ull : u;
}

// What is rounded to 16 bits, as a float. A double is rounded to odd: toward zero, with the last bit set where anything
// was cut off. That bit stands for the rest, so that the second rounding gives what one rounding of the double would.
MK_HD float before_16_bits(float x) { return x; }

MK_HD float before_16_bits(double x) {
  const float nearest = float(x);
  const double back = double(nearest);
  const std::uint32_t away = fabs(back) > fabs(x) ? 1u : 0u;
  const std::uint32_t inexact = back != x ? 1u : 0u;
  return bits_as<float>((bits_as<std::uint32_t>(nearest) - away) | inexact);
}

// One element type: its storage, widening to float or double, and the store, rounded once to nearest even.
template <int kDType>
struct Element;

template <>
struct Element<kBF16> {
  using Bits = std::uint16_t;
  template <class C>
  MK_HD static C load(Bits b) {
    return C(bf16_to_float(b));
  }
  template <class C>
  MK_HD static Bits store(C x) {
    return float_to_bf16(before_16_bits(x));
  }
};

template <>
struct Element<kF16> {
  using Bits = std::uint16_t;
  template <class C>
  MK_HD static C load(Bits b) {
    return C(half_to_float(b));
  }
  template <class C>
  MK_HD static Bits store(C x) {
    return float_to_half(before_16_bits(x));
  }
};

template <>
struct Element<kF32> {
  using Bits = std::uint32_t;
  template <class C>
  MK_HD static C load(Bits b) {
    return C(bits_as<float>(b));
  }
  template <class C>
  MK_HD static Bits store(C x) {
    return float_to_canonical(float(x));
  }
};

template <>
struct Element<kF64> {
  using Bits = std::uint64_t;
  template <class C>
  MK_HD static C load(Bits b) {
    return C(bits_as<double>(b));
  }
  template <class C>
  MK_HD static Bits store(C x) {
    return double_to_canonical(double(x));
  }
};

}  // namespace mergekernels
