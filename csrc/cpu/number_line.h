// Element types as `compare` sees them: exact values as double, places on the number line, distances in units in the
// last place. Functions are static to their type, so that this header adds no symbols.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mergekernels {
namespace {

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Each element type: its storage, exact value as double, and its place among the values of its type.
// kDigits orders float types by precision; 0 means that no ULP of another type is ever counted in it.
template <class Storage, int kMantissa, int kExponentMin, int kExponentMax>
struct Float {
  using Bits = Storage;
  static constexpr bool kIsFloat = true;
  static constexpr int kM = kMantissa;
  static constexpr int kMin = kExponentMin;
  static constexpr int kMax = kExponentMax;
  static constexpr std::int64_t kInfinity = std::int64_t(kMax - kMin + 2) << kM;

  // Signed position on the number line; both zeros are 0.
  static std::int64_t ordinal(Bits x) {
    constexpr int top = 8 * sizeof(Bits) - 1;
    const auto magnitude = std::int64_t(Bits(x & Bits(~(Bits(1) << top))));
    const std::int64_t negative = -std::int64_t(x >> top);  // no branch: signs are as good as random
    return (magnitude ^ negative) - negative;
  }

  // The ordinal of a double (not NaN) rounded to this type, nearest even.
  static std::int64_t rounded(double value) {
    const auto bits = bits_as<std::uint64_t>(value);
    const int field = int((bits >> 52) & 0x7ff);
    std::int64_t result = 0;
    if (field == 0x7ff) {
      result = kInfinity;
    } else if (field != 0) {
      const int exponent = field - 1023;
      const std::uint64_t mantissa = (bits & ((std::uint64_t(1) << 52) - 1)) | (std::uint64_t(1) << 52);
      const int e = std::max(exponent, kMin);
      const int shift = 52 - kM + (e - exponent);
      if (shift <= 0) {
        result = std::int64_t(mantissa) + (std::int64_t(e - kMin) << kM);
      } else if (shift <= 53) {
        const std::uint64_t half = (std::uint64_t(1) << (shift - 1)) - 1;
        const std::uint64_t even = (mantissa >> shift) & 1;
        result = std::int64_t((mantissa + half + even) >> shift) + (std::int64_t(e - kMin) << kM);
      }
      result = std::min(result, kInfinity);
    }
    return (bits >> 63) != 0 ? -result : result;
  }
};

struct BF16 : Float<std::uint16_t, 7, -126, 127> {
  static double value(Bits x) { return double(bits_as<float>(std::uint32_t(x) << 16)); }
};

struct F16 : Float<std::uint16_t, 10, -14, 15> {
  static double value(Bits x) {
    const std::uint32_t magnitude = x & 0x7fffu;
    // Exponent bias by multiplication: exact, also for subnormals; infinity and NaN keep all exponent bits.
    const float scaled = bits_as<float>(magnitude << 13) * 0x1p112f;
    const float special = bits_as<float>((magnitude << 13) | 0x7f800000u);
    const auto positive = double(magnitude >= 0x7c00u ? special : scaled);
    return (x & 0x8000u) != 0 ? -positive : positive;
  }
};

struct F32 : Float<std::uint32_t, 23, -126, 127> {
  static double value(Bits x) { return double(bits_as<float>(x)); }
};

struct F64 : Float<std::uint64_t, 52, -1022, 1023> {
  static double value(Bits x) { return bits_as<double>(x); }
};

template <class T>
struct Integer {
  using Bits = T;
  static constexpr bool kIsFloat = false;
  static double value(Bits x) { return double(x); }
};

// Types whose values are not interpreted.
template <class T>
struct Opaque {
  using Bits = T;
};

std::uint64_t distance(std::int64_t a, std::int64_t b) {
  return a > b ? std::uint64_t(a) - std::uint64_t(b) : std::uint64_t(b) - std::uint64_t(a);
}

// Distance of two values that are not NaN, in units in the last place of the narrower type.
template <class A, class B>
std::uint64_t ulps(typename A::Bits a, typename B::Bits b) {
  if constexpr (!A::kIsFloat) {
    return a > b ? std::uint64_t(a) - std::uint64_t(b) : std::uint64_t(b) - std::uint64_t(a);
  } else if constexpr (std::is_same_v<A, B>) {
    return distance(A::ordinal(a), A::ordinal(b));
  } else if constexpr (A::kM < B::kM) {
    return distance(A::ordinal(a), A::rounded(B::value(b)));
  } else {
    return distance(B::rounded(A::value(a)), B::ordinal(b));
  }
}

}  // namespace
}  // namespace mergekernels
