#include "compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/tree.h"
#include "number_line.h"

namespace mergekernels {
namespace {

constexpr std::int64_t kBlock = 4096;
constexpr std::int64_t kLanes = 256;

// Sum of squares of up to 4,096 doubles: lane i mod 256 in order, then stride 128, 64, ... 1.
double block_squares(const double* x, std::int64_t m) {
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= m; i += kLanes) {
    for (std::int64_t l = 0; l < kLanes; ++l) {
      lanes[l] += x[i + l] * x[i + l];
    }
  }
  for (std::int64_t l = 0; i + l < m; ++l) {
    lanes[l] += x[i + l] * x[i + l];
  }
  return fold_lanes(lanes);
}

template <class A, class B>
bool same(typename A::Bits a, typename B::Bits b) {
  if constexpr (std::is_same_v<A, B>) {
    return a == b;
  } else {
    const double x = A::value(a);
    const double y = B::value(b);
    return (std::isnan(x) && std::isnan(y)) || bits_as<std::uint64_t>(x) == bits_as<std::uint64_t>(y);
  }
}

// One pair that differs.
template <class A, class B>
void count_pair(Comparison& c, typename A::Bits a, typename B::Bits b, std::int64_t index) {
  ++c.differing;
  if (c.first < 0) {
    c.first = index;
  }
  const double x = A::value(a);
  const double y = B::value(b);
  const bool nan_x = std::isnan(x);
  const bool nan_y = std::isnan(y);
  if (nan_x && nan_y) {
    return;
  }
  if (!std::isfinite(x) || !std::isfinite(y)) {
    ++c.unbounded;
  } else {
    c.max_abs = std::max(c.max_abs, std::fabs(x - y));
  }
  if (!nan_x && !nan_y) {
    const std::uint64_t u = ulps<A, B>(a, b);
    if (u > c.max_ulp) {
      c.max_ulp = u;
      c.max_ulp_at = index;
    }
  }
}

// Like `ulps`, in the narrowest integers that hold it.
template <class T>
auto narrow_ulps(typename T::Bits a, typename T::Bits b) {
  if constexpr (T::kIsFloat && sizeof(a) <= 4) {
    const auto x = std::int32_t(T::ordinal(a));
    const auto y = std::int32_t(T::ordinal(b));
    const std::uint32_t d = std::uint32_t(x) - std::uint32_t(y);
    const std::uint32_t swap = -std::uint32_t(x < y);
    return (d ^ swap) - swap;
  } else {
    return ulps<T, T>(a, b);
  }
}

// A block without NaN and infinity, both sides of one dtype: the same findings without a branch per pair.
template <class T>
void count_finite(Comparison& c, const typename T::Bits* a, const typename T::Bits* b, const double* diff,
                  std::int64_t m, std::int64_t start) {
  using Ulps = decltype(narrow_ulps<T>(*a, *b));
  constexpr std::int64_t kWidth = 16;  // separate maxima, so that no pair waits for the one before
  std::int32_t differing = 0;
  double most_abs[kWidth] = {};
  Ulps most_ulp[kWidth] = {};
  for (std::int64_t k = 0; k < m; ++k) differing += a[k] != b[k];
  const auto pair = [&](std::int64_t i, std::int64_t l) {
    const double d = std::fabs(diff[i + l]);
    const Ulps u = narrow_ulps<T>(a[i + l], b[i + l]);
    most_abs[l] = d > most_abs[l] ? d : most_abs[l];
    most_ulp[l] = u > most_ulp[l] ? u : most_ulp[l];
  };
  std::int64_t i = 0;
  for (; i + kWidth <= m; i += kWidth) {
    for (std::int64_t l = 0; l < kWidth; ++l) pair(i, l);
  }
  for (std::int64_t l = 0; i + l < m; ++l) pair(i, l);
  const double max_abs = *std::max_element(most_abs, most_abs + kWidth);
  const Ulps max_ulp = *std::max_element(most_ulp, most_ulp + kWidth);
  c.differing += differing;
  c.max_abs = std::max(c.max_abs, max_abs);
  if (c.first < 0) {
    std::int64_t at = 0;
    while (a[at] == b[at]) ++at;
    c.first = start + at;
  }
  if (max_ulp > c.max_ulp) {
    std::int64_t at = 0;
    while (narrow_ulps<T>(a[at], b[at]) != max_ulp) ++at;
    c.max_ulp = max_ulp;
    c.max_ulp_at = start + at;
  }
}

// a and a - b as doubles, pairs with a NaN or an infinity as zeros.
template <class A, class B>
void load_finite(const typename A::Bits* a, const typename B::Bits* b, double* xa, double* xd, std::int64_t m) {
  for (std::int64_t i = 0; i < m; ++i) {
    const double x = A::value(a[i]);
    const double y = B::value(b[i]);
    const bool finite = std::isfinite(x) && std::isfinite(y);
    xa[i] = finite ? x : 0.0;
    xd[i] = finite ? x - y : 0.0;
  }
}

template <class A, class B>
Comparison run(const void* pa, const void* pb, std::int64_t n, bool norm) {
  const auto* a = static_cast<const typename A::Bits*>(pa);
  const auto* b = static_cast<const typename B::Bits*>(pb);
  Comparison c;
  c.measured = true;
  const bool bytes_equal = std::is_same_v<A, B> && (n == 0 || std::memcmp(pa, pb, std::size_t(n) * sizeof(*a)) == 0);
  if (bytes_equal && !norm) {
    return c;
  }
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums_diff(std::size_t(blocks), 0.0);
  std::vector<double> sums_a(std::size_t(blocks), 0.0);
  std::vector<double> memory(2 * kBlock);
  double* xa = memory.data();
  double* xd = xa + kBlock;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t start = block * kBlock;
    const std::int64_t m = std::min(kBlock, n - start);
    const auto* ba = a + start;
    const auto* bb = b + start;
    for (std::int64_t i = 0; i < m; ++i) {
      xa[i] = A::value(ba[i]);
      xd[i] = xa[i] - B::value(bb[i]);
    }
    double squares_a = block_squares(xa, m);
    double squares_diff = block_squares(xd, m);
    // A NaN or an infinity anywhere makes a sum of squares one.
    const bool finite = std::isfinite(squares_a) && std::isfinite(squares_diff);
    if (!finite) {
      load_finite<A, B>(ba, bb, xa, xd, m);
      squares_a = block_squares(xa, m);
      squares_diff = block_squares(xd, m);
    }
    sums_a[std::size_t(block)] = squares_a;
    sums_diff[std::size_t(block)] = squares_diff;
    if constexpr (std::is_same_v<A, B>) {
      if (std::memcmp(ba, bb, std::size_t(m) * sizeof(*a)) == 0) continue;
      if (finite) {
        count_finite<A>(c, ba, bb, xd, m, start);
        continue;
      }
    }
    for (std::int64_t i = 0; i < m; ++i) {
      if (!same<A, B>(ba[i], bb[i])) {
        count_pair<A, B>(c, ba[i], bb[i], start + i);
      }
    }
  }
  c.squares_diff = fold_blocks(sums_diff.data(), blocks);
  c.squares_a = fold_blocks(sums_a.data(), blocks);
  return c;
}

template <class T>
Comparison run_bytes(const void* pa, const void* pb, std::int64_t n) {
  const auto* a = static_cast<const typename T::Bits*>(pa);
  const auto* b = static_cast<const typename T::Bits*>(pb);
  Comparison c;
  if (n == 0 || std::memcmp(pa, pb, std::size_t(n) * sizeof(*a)) == 0) {
    return c;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    if (a[i] != b[i]) {
      ++c.differing;
      if (c.first < 0) {
        c.first = i;
      }
    }
  }
  return c;
}

template <class A>
Comparison run_float(const void* a, const void* b, std::string_view dtype_b, std::int64_t n, bool norm) {
  if (dtype_b == "BF16") return run<A, BF16>(a, b, n, norm);
  if (dtype_b == "F16") return run<A, F16>(a, b, n, norm);
  if (dtype_b == "F32") return run<A, F32>(a, b, n, norm);
  return run<A, F64>(a, b, n, norm);
}

bool is_float(std::string_view dtype) { return dtype == "BF16" || dtype == "F16" || dtype == "F32" || dtype == "F64"; }

}  // namespace

bool comparable(std::string_view dtype_a, std::string_view dtype_b) {
  return dtype_a == dtype_b || (is_float(dtype_a) && is_float(dtype_b));
}

Comparison compare(const void* a, std::string_view dtype_a, const void* b, std::string_view dtype_b, std::int64_t n,
                   bool norm) {
  if (dtype_a == "BF16") return run_float<BF16>(a, b, dtype_b, n, norm);
  if (dtype_a == "F16") return run_float<F16>(a, b, dtype_b, n, norm);
  if (dtype_a == "F32") return run_float<F32>(a, b, dtype_b, n, norm);
  if (dtype_a == "F64") return run_float<F64>(a, b, dtype_b, n, norm);
  using I8 = Integer<std::int8_t>;
  using U8 = Integer<std::uint8_t>;
  using I16 = Integer<std::int16_t>;
  using U16 = Integer<std::uint16_t>;
  using I32 = Integer<std::int32_t>;
  using U32 = Integer<std::uint32_t>;
  using I64 = Integer<std::int64_t>;
  using U64 = Integer<std::uint64_t>;
  if (dtype_a == "I8") return run<I8, I8>(a, b, n, norm);
  if (dtype_a == "U8" || dtype_a == "BOOL") return run<U8, U8>(a, b, n, norm);
  if (dtype_a == "I16") return run<I16, I16>(a, b, n, norm);
  if (dtype_a == "U16") return run<U16, U16>(a, b, n, norm);
  if (dtype_a == "I32") return run<I32, I32>(a, b, n, norm);
  if (dtype_a == "U32") return run<U32, U32>(a, b, n, norm);
  if (dtype_a == "I64") return run<I64, I64>(a, b, n, norm);
  if (dtype_a == "U64") return run<U64, U64>(a, b, n, norm);
  if (dtype_a == "C64") return run_bytes<Opaque<std::uint64_t>>(a, b, n);
  return run_bytes<Opaque<std::uint8_t>>(a, b, n);
}

}  // namespace mergekernels
