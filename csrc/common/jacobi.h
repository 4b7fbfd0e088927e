// Jacobi rotations for small SVDs and symmetric eigenproblems: which columns meet when, the angle of a rotation, when a
// pair needs none, and powers of two for scaling. Host and device run the same operations in the same order.
#pragma once

#include <cmath>

#include "common/hd.h"

namespace mergekernels {

// Sides of a matrix at most. Pairs whose cosine is at or below kSmallCosine * eps need no rotation; a sweep in which
// no pair needs one is the last.
constexpr int kMaxSide = 128;
constexpr int kSmallCosine = 8;
constexpr int kMaxSweeps = 30;

// eps: the distance from 1 to the next number. Exponents beyond +-limit are not undone by scaling, so that the scale
// and its inverse are normal numbers.
template <class C>
struct Precision;
template <>
struct Precision<double> {
  static constexpr double kEps = 0x1p-52;
  static constexpr int kLimit = 1000, kBias = 1023, kMantissa = 52;
  using Bits = std::uint64_t;
};
template <>
struct Precision<float> {
  static constexpr float kEps = 0x1p-23f;
  static constexpr int kLimit = 120, kBias = 127, kMantissa = 23;
  using Bits = std::uint32_t;
};

template <class C>
MK_HD C root(C x) {
  using std::sqrt;
  return sqrt(x);
}

template <class C>
MK_HD bool needs_rotation(C cosine) {
  return cosine > C(kSmallCosine) * Precision<C>::kEps;
}

// The power of two that brings a finite largest magnitude to [1, 2), as far as it is a normal number; 1 for zero.
template <class C>
MK_HD C scale_for(C largest) {
  using P = Precision<C>;
  if (largest == C(0)) return C(1);
  const auto bits = bits_as<typename P::Bits>(largest);
  int exponent = int(bits >> P::kMantissa) - P::kBias;
  exponent = exponent > P::kLimit ? P::kLimit : exponent < -P::kLimit ? -P::kLimit : exponent;
  return bits_as<C>(typename P::Bits(P::kBias - exponent) << P::kMantissa);
}

// Columns first < second of a pair; second is `sides` (one past the last) where first meets nobody.
struct Meeting {
  int first, second;
};

// Pairs of a round, and rounds of a sweep, over `sides` columns. In a sweep every two meet once, and nobody meets two
// in a round: the tournament of the circle, in which the last stays and the others move on.
MK_HD int num_meetings(int sides) { return (sides + 1) / 2; }
MK_HD int num_rounds(int sides) { return 2 * num_meetings(sides) - 1; }

MK_HD Meeting meeting(int sides, int round, int k) {
  const int circle = num_rounds(sides);
  if (k == 0) return {round, circle};
  int a = round + k, b = round - k;
  a = a >= circle ? a - circle : a;
  b = b < 0 ? b + circle : b;
  return a < b ? Meeting{a, b} : Meeting{b, a};
}

// (x, y) becomes (c x - s y, s x + c y); s = 0 leaves them alone. t = s / c.
template <class C>
struct Rotation {
  C c, s, t;
};

// The smaller of the two angles that make [[alpha, gamma], [gamma, beta]] diagonal; the diagonal becomes alpha - t
// gamma, beta + t gamma.
template <class C>
MK_HD Rotation<C> smaller_rotation(C alpha, C beta, C gamma) {
  const C zeta = (beta - alpha) / (C(2) * gamma);
  const C size = zeta < C(0) ? -zeta : zeta;
  // Where 1 is lost beside its square the root is the number itself; the square could overflow.
  const C t = size > C(1) / Precision<C>::kEps ? C(0.5) / size : C(1) / (size + root(C(1) + size * size));
  const C signed_t = zeta < C(0) ? -t : t;
  const C c = C(1) / root(C(1) + t * t);
  return {c, c * signed_t, signed_t};
}

// |cosine| of two columns of squared lengths alpha and beta; 0 where one of them is nothing beside a largest entry of
// 1 to 2: below eps squared.
template <class C>
MK_HD C cosine(C alpha, C beta, C gamma) {
  constexpr C kNothing = Precision<C>::kEps * Precision<C>::kEps;
  if (!(alpha > kNothing * kNothing) || !(beta > kNothing * kNothing)) return C(0);
  return (gamma < C(0) ? -gamma : gamma) / (root(alpha) * root(beta));
}

// The same measure of an off-diagonal entry of a symmetric matrix: its size beside the geometric mean of the two
// diagonal entries, or beside `floor` if that is larger.
template <class C>
MK_HD C coupling(C alpha, C beta, C gamma, C floor) {
  const C mean = root(alpha < C(0) ? -alpha : alpha) * root(beta < C(0) ? -beta : beta);
  const C bound = mean > floor ? mean : floor;
  return bound > C(0) ? (gamma < C(0) ? -gamma : gamma) / bound : C(0);
}

// The reflection I - weight v v^T that takes a column (first, ...) of length `length` to (diagonal, 0, ...); v is the
// column but for its first entry, `pivot`. weight = 0: the column is nothing, as above.
template <class C>
struct Reflection {
  C pivot, diagonal, weight;
};

template <class C>
MK_HD Reflection<C> reflection(C first, C squared_length) {
  constexpr C kNothing = Precision<C>::kEps * Precision<C>::kEps;
  if (!(squared_length > kNothing * kNothing)) return {first, C(0), C(0)};
  const C length = root(squared_length), size = first < C(0) ? -first : first;
  const C diagonal = first < C(0) ? length : -length;
  return {first - diagonal, diagonal, C(1) / (length * (length + size))};
}

}  // namespace mergekernels
