// Alternating least squares on the cores of a stack: what a call is given, and the memory that one problem needs.
//
//   X[t] = b_t a_t^T ~ sum_k C[t, k] u_k v_k^T,     F <- (M + prox g F)(G + (prox + ridge) g I)^-1
//
// for F = C, U, V in turn. M is the product of the stack with the two other factors, G the product of their Grams, g
// its mean diagonal. All in float64. The CPU backend runs a problem in one thread, a GPU in one block of threads.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace mergekernels {

// Tasks, stacked columns, rows of both cores, terms.
struct AlsShape {
  std::int32_t tasks, ranks, p, q, width;
  // Rows of a state: C, U, V, b^T U, a^T V one after another, `width` numbers each.
  MK_HD int rows() const { return tasks + p + q + 2 * ranks; }
  MK_HD int most() const {
    const int sides = p > q ? p : q;
    return tasks > sides ? tasks : sides;
  }
};

// What is known of a problem; numbers of its report.
enum AlsReport : int {
  kAlsLast = 0,    // err / ||X|| of the last sweep
  kAlsDone = 1,    // 0: goes on; 1: has ended; 2: its out factor has to be kept orthonormal, which is not done here
  kAlsSweeps = 2,  // done so far
  kAlsLonger = 3,  // of these, steps that were lengthened
  kAlsLevel = 4,   // alarms so far
  kAlsRidge = 5,
  kAlsNumbers = 6
};

// One start of one module. b: p x ranks, a: q x ranks, dense. state: read (C, U, V) and written. history: err / ||X||
// of the sweeps of this call.
struct AlsItem {
  const double *b, *a;
  double *state, *history, *report;
  double norm2;
};

// One call, by value. owner: the task of each stacked column; ends: where each task's columns begin, and their number.
// search: whether steps may be lengthened. far: the cores are read where they are, not copied next to the factors.
struct AlsArgs {
  const AlsItem* items;
  const std::int32_t *owner, *ends;
  std::int64_t count;
  AlsShape shape;
  double tol, prox;
  std::int32_t sweeps, search, far;
};

// Lengths of a step that are tried, less one: STEPS in ops/tensor/_sweeps.py.
constexpr int kAlsSteps = 6;
MK_HD double als_length(int i) {
  return i == 0 ? 0.25 : i == 1 ? 0.5 : i == 2 ? 1.0 : i == 3 ? 2.0 : i == 4 ? 4.0 : 7.0;
}

// RIDGES in ops/tensor/_als.py; beyond the last the out factor has to be orthonormal.
constexpr int kAlsRidges = 5;
MK_HD double als_ridge(int level) { return level == 1 ? 1e-6 : level == 2 ? 1e-5 : level == 3 ? 1e-4 : 1e-3; }

constexpr int kAlsWatchEvery = 5;

// The memory of a problem; rows of all matrices are `pitch` apart. c .. sv: the state; m: right sides; gc, gu, gv:
// Grams; h: what is inverted; row: two rows; part: sums on their way; sum: their results; b, a: the cores.
struct AlsRoom {
  double *c, *u, *v, *su, *sv, *m, *gc, *gu, *gv, *h, *row, *part, *sum;
  const double *b, *a;
  int pitch, b_pitch, a_pitch;

  // Neighbouring rows of a core begin in different banks of memory.
  static MK_HD int core_pitch(const AlsShape& s) { return s.ranks | 1; }
  static MK_HD std::int64_t numbers(const AlsShape& s, int pitch, int threads, bool far) {
    const std::int64_t cores = far ? 0 : std::int64_t(s.p + s.q) * core_pitch(s);
    const std::int64_t rows = std::int64_t(s.rows()) + s.most() + 4 * s.width + 2;
    return cores + rows * pitch + kAlsSteps * threads + s.width + 8;
  }
  MK_HD AlsRoom(double* memory, const AlsShape& s, int row_pitch, int threads, const AlsItem& item, bool far) {
    pitch = row_pitch;
    c = memory;
    u = c + s.tasks * pitch;
    v = u + s.p * pitch;
    su = v + s.q * pitch;
    sv = su + s.ranks * pitch;
    m = sv + s.ranks * pitch;
    gc = m + s.most() * pitch;
    gu = gc + s.width * pitch;
    gv = gu + s.width * pitch;
    h = gv + s.width * pitch;
    row = h + s.width * pitch;
    part = row + 2 * pitch;
    sum = part + kAlsSteps * threads + s.width;
    b = far ? item.b : sum + 8;
    a = far ? item.a : b + s.p * core_pitch(s);
    b_pitch = a_pitch = far ? s.ranks : core_pitch(s);
  }
};

}  // namespace mergekernels
