// exp, log, tanh and sigmoid from IEEE operations and integers alone, so that every backend gives the same bits: the
// same operations in the same order, in double, without contraction. Errors stay within a few units in the last place.
#pragma once

#include "common/hd.h"

namespace mergekernels {

constexpr double kLn2High = 6.93147180369123816490e-01;  // 0x3FE62E42FEE00000: products with |k| < 2^20 are exact
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kInverseLn2 = 1.44269504088896338700e+00;

// 2^k for -1022 <= k <= 1023.
MK_HD double power_of_two(std::int64_t k) { return bits_as<double>(std::uint64_t(k + 1023) << 52); }

// exp(x): x = k ln 2 + r, |r| <= ln 2 / 2; exp(r) by its Taylor polynomial of degree 13 (Horner); 2^k in two factors.
// Above 710 infinity, below -746 +0, NaN stays.
MK_HD double exact_exp(double x) {
  const double clamped = x < -746.0 ? -746.0 : (x > 710.0 ? 710.0 : (x == x ? x : 0.0));
  const double scaled = clamped * kInverseLn2;
  // Rounded to nearest even: 1.5 * 2^52 pushes the fraction out.
  const double k = (scaled + 6755399441055744.0) - 6755399441055744.0;
  const double r = (clamped - k * kLn2High) - k * kLn2Low;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const std::int64_t whole = std::int64_t(k);
  const std::int64_t half = whole >> 1;
  const double y = (p * power_of_two(half)) * power_of_two(whole - half);
  return x == x ? y : x;
}

// log(x): x = 2^e m, m in [sqrt(1/2), sqrt(2)); with s = (m - 1) / (m + 1), log m = 2 s (1 + z/3 + z^2/5 + ...), z =
// s^2. -infinity at 0, NaN below, infinity and NaN stay.
MK_HD double exact_log(double x) {
  const bool tiny = x < 2.2250738585072014e-308;
  const double normal = tiny ? x * 18014398509481984.0 : x;  // 2^54
  const std::int64_t bits = bits_as<std::int64_t>(normal);
  const std::int64_t e = (bits - 0x3FE6A09E667F3BCDll) >> 52;
  const double m = bits_as<double>(bits - (e << 52));
  const double f = m - 1.0;
  const double s = f / (m + 1.0);
  const double z = s * s;
  double p = 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  p = p * z + 1.0;
  const double k = double(e - (tiny ? 54 : 0));
  const double y = k * kLn2High + ((s + s) * p + k * kLn2Low);
  if (!(x > 0.0)) return x == 0.0 ? bits_as<double>(0xFFF0000000000000ull) : bits_as<double>(0x7FF8000000000000ull);
  return x <= 1.7976931348623157e308 ? y : x;
}

// tanh(x): near 0 its continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ... x^2 / 17))), else 1 - 2 / (exp(2 |x|) + 1)
// with the sign of x.
MK_HD double exact_tanh(double x) {
  const double a = x < 0.0 ? -x : x;
  const double t = 1.0 - 2.0 / (exact_exp(a + a) + 1.0);
  const double z = x * x;
  double q = 17.0;
  q = 15.0 + z / q;
  q = 13.0 + z / q;
  q = 11.0 + z / q;
  q = 9.0 + z / q;
  q = 7.0 + z / q;
  q = 5.0 + z / q;
  q = 3.0 + z / q;
  q = 1.0 + z / q;
  if (a < 0.5) return x / q;
  return x < 0.0 ? -t : t;
}

// 1 / (1 + exp(-x)).
MK_HD double exact_sigmoid(double x) { return 1.0 / (1.0 + exact_exp(-x)); }

}  // namespace mergekernels
