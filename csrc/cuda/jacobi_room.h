// Small decompositions: what a call is given, and the memory of a block of threads.
#pragma once

#include "common/jacobi.h"
#include "cuda/group.h"

namespace mergekernels {

// A matrix in memory, elements at row * rows + column * columns.
template <class T>
struct Strided {
  T* at;
  std::int64_t rows, columns;
  MK_HD T& operator()(int i, int j) const { return at[i * rows + j * columns]; }
};

// One matrix of p x s, p >= s. left: p x s; right: s x s, of columns; at = nullptr for both leaves them out. An
// eigenproblem has p = s, reads the lower triangle and writes no left. far: room for p x s numbers in global memory
// where they do not fit on the chip, else nullptr. report: sweeps done (0: not converged; -1: NaN or Inf in the
// matrix), and the largest cosine met in the last sweep.
template <class C>
struct JacobiItem {
  Strided<const C> matrix;
  Strided<C> left, right;
  C* values;
  C* far;
  double* report;
  std::int32_t p, s;
};

// One call, by value. items: in device memory.
template <class C>
struct JacobiArgs {
  const JacobiItem<C>* items;
  std::int64_t count;
};

// Threads of a block, and threads that share the rows of one pair: a warp has the pairs of 32 columns.
MK_HD int jacobi_threads(int s) { return s <= 32 ? 32 : s <= 64 ? 256 : 512; }
MK_HD int jacobi_lanes(int s) {
  if (s > 32) return 8;
  int lanes = 32;
  for (int pairs = 1; pairs < num_meetings(s); pairs *= 2) lanes /= 2;
  return lanes;
}

// Numbers from one column to the next: neighbouring pairs then meet no shared bank of memory twice.
template <class C>
MK_HD int jacobi_stride(int rows, int lanes) {
  constexpr int kBanks = int(128 / sizeof(C));
  return rows + ((lanes - rows) % kBanks + kBanks) % kBanks;
}

// The memory of a block. g: what is to become orthogonal or diagonal; v: the product of all that is done to it; part:
// sums on their way; c, s, t: of the round's rotations; worst: the largest cosine of a pair in this sweep; sum: results
// that all threads need; diagonal, weight: of reflections; column: where a column of the input went.
template <class C>
struct JacobiRoom {
  C *g, *v, *part, *c, *s, *t, *worst, *sum, *values, *diagonal, *weight;
  int *place, *column, *best, *done;
  int g_stride, v_stride;

  static MK_HD int num_parts(int s) {
    const int parts = 3 * num_meetings(s) * jacobi_lanes(s), threads = jacobi_threads(s);
    return parts > threads ? parts : threads;
  }
  static MK_HD std::int64_t size(int p, int s, bool far) {
    const std::int64_t g = std::int64_t(jacobi_stride<C>(s, jacobi_lanes(s))) * s;
    const std::int64_t v = far ? 0 : std::int64_t(jacobi_stride<C>(p, jacobi_lanes(s))) * s;
    const std::int64_t numbers = g + v + num_parts(s) + 4 * num_meetings(s) + 4 + 3 * s;
    return (numbers * std::int64_t(sizeof(C)) + 4 * (2 * s + 32 + 1) + 15) / 16 * 16;
  }
  MK_BLOCK JacobiRoom(std::uint8_t* memory, int p, int side, C* far) {
    const int lanes = jacobi_lanes(side), pairs = num_meetings(side);
    g_stride = jacobi_stride<C>(side, lanes);
    v_stride = far != nullptr ? p : jacobi_stride<C>(p, lanes);
    g = reinterpret_cast<C*>(memory);
    C* next = g + g_stride * side;
    v = far != nullptr ? far : next;
    part = far != nullptr ? next : next + v_stride * side;
    c = part + num_parts(side);
    s = c + pairs;
    t = s + pairs;
    worst = t + pairs;
    sum = worst + pairs;
    values = sum + 4;
    diagonal = values + side;
    weight = diagonal + side;
    place = reinterpret_cast<int*>(weight + side);
    column = place + side;
    best = column + side;
    done = best + 32;
  }
};

}  // namespace mergekernels
