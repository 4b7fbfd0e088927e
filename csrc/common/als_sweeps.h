// Alternating least squares on cores: the sweeps of one problem, for any team of threads.
//
// Team: size; all(f) calls f(thread) by each thread and waits for them; grid(rows, columns, f) calls f(i, k) for each
// element, by any thread; reduce<n>(rows, columns, sums, f) has f(i, k, sums) add to n sums; inner and outer are thin
// products x^T f and x f; pivot is a step of an inversion; along are the sums of a line search. All of them wait. Every
// sum has an order that depends on the shape and the team alone.
#pragma once

#include <cmath>

#include "common/als.h"

namespace mergekernels {

template <class Team>
struct Als {
  const AlsArgs& args;
  const AlsItem& item;
  const AlsRoom& room;
  Team& team;
  AlsShape shape;
  double size, ridge, error;

  MK_BLOCK Als(const AlsArgs& a, const AlsItem& i, const AlsRoom& r, Team& t)
      : args(a),
        item(i),
        room(r),
        team(t),
        shape(a.shape),
        size(i.norm2 > 0.0 ? sqrt(i.norm2) : 1.0),
        ridge(i.report[kAlsRidge]),
        error(0.0) {}

  // Factor, rows and Gram of a mode: 0 tasks, 1 out, 2 in.
  MK_BLOCK double* factor(int mode) const { return mode == 0 ? room.c : mode == 1 ? room.u : room.v; }
  MK_BLOCK int height(int mode) const { return mode == 0 ? shape.tasks : mode == 1 ? shape.p : shape.q; }
  MK_BLOCK double* gram(int mode) const { return mode == 0 ? room.gc : mode == 1 ? room.gu : room.gv; }

  MK_BLOCK void take_gram(int mode) {
    const double* f = factor(mode);
    team.inner(f, room.pitch, height(mode), shape.width, f, gram(mode), room);
  }
  // b^T U or a^T V.
  MK_BLOCK void take_product(int mode) {
    team.inner(mode == 1 ? room.b : room.a, room.b_pitch, height(mode), shape.ranks, factor(mode),
               mode == 1 ? room.su : room.sv, room);
  }

  // h becomes -(G + weight I)^-1, by the sweep operator: symmetric throughout, so a row is a column. False: it is not
  // positive definite.
  MK_BLOCK bool invert(const double* one, const double* two, double weight) {
    const int width = shape.width, pitch = room.pitch;
    team.grid(width, width, [&](int i, int k) {
      const double x = one[i * pitch + k] * two[i * pitch + k] + (i == k ? weight : 0.0);
      room.h[i * pitch + k] = x;
      if (i == 0) room.row[k] = x;
    });
    for (int j = 0; j < width; ++j) {
      const double* row = room.row + (j % 2) * pitch;
      const double pivot = row[j];
      if (!(pivot > 0.0)) {
        team.all([](int) {});  // the next trial writes what is read here
        return false;
      }
      team.pivot(room.h, pitch, width, j, row, room.row + (1 - j % 2) * pitch, 1.0 / pivot);
    }
    return true;
  }

  // One factor. False: its Gram is not finite, or not positive definite whatever the proximal weight.
  MK_BLOCK bool update(int mode) {
    const int width = shape.width, pitch = room.pitch, rows = height(mode);
    const double *one = gram(mode == 0 ? 1 : 0), *two = gram(mode == 2 ? 1 : 2);
    team.template reduce<1>(width, 1, room.sum, [&](int i, int, double* sums) {
      sums[0] = sums[0] + one[i * pitch + i] * two[i * pitch + i];
    });
    double mean = room.sum[0] / double(width);
    if (!(mean - mean == 0.0)) return false;
    mean = mean > 0.0 ? mean : 1.0;
    double weight = args.prox;
    bool sound = false;
    for (int trial = 0; trial < 40; ++trial) {
      sound = invert(one, two, (weight + ridge) * mean);
      if (sound) break;
      weight = 2.0 * weight > 1e-14 ? 2.0 * weight : 1e-14;
    }
    if (!sound) return false;
    double* f = factor(mode);
    const double held = weight * mean;
    if (mode == 0) {
      team.grid(rows, width, [&](int t, int k) {
        double sum = 0.0;
        for (int r = args.ends[t]; r < args.ends[t + 1]; ++r)
          sum = sum + room.su[r * pitch + k] * room.sv[r * pitch + k];
        room.m[t * pitch + k] = -(sum + held * f[t * pitch + k]);
      });
    } else {
      // The product with the other core is not needed any more; what it is multiplied to takes its place.
      const double* from = mode == 1 ? room.sv : room.su;
      double* to = mode == 1 ? room.su : room.sv;
      team.grid(shape.ranks, width,
                [&](int r, int k) { to[r * pitch + k] = from[r * pitch + k] * room.c[args.owner[r] * pitch + k]; });
      team.outer(mode == 1 ? room.b : room.a, room.b_pitch, rows, shape.ranks, to, room.m, room);
      team.grid(rows, width,
                [&](int i, int k) { room.m[i * pitch + k] = -(room.m[i * pitch + k] + held * f[i * pitch + k]); });
    }
    team.outer(room.m, pitch, rows, width, room.h, f, room);
    take_gram(mode);
    if (mode != 0) take_product(mode);
    return true;
  }

  // err^2 of the state.
  MK_BLOCK double squared_error() {
    const int pitch = room.pitch;
    team.template reduce<1>(shape.width, shape.width, room.sum, [&](int i, int k, double* sums) {
      const int at = i * pitch + k;
      sums[0] = sums[0] + room.gc[at] * room.gu[at] * room.gv[at];
    });
    team.template reduce<1>(shape.ranks, shape.width, room.sum + 1, [&](int r, int k, double* sums) {
      const int at = r * pitch + k;
      sums[0] = sums[0] + room.su[at] * room.c[args.owner[r] * pitch + k] * room.sv[at];
    });
    return item.norm2 + room.sum[0] - 2.0 * room.sum[1];
  }

  // The same model with columns of u and v of norm 1 and their size in c; the Grams follow.
  MK_BLOCK void normalise() {
    const int pitch = room.pitch, first_u = shape.tasks, first_v = first_u + shape.p, first_su = first_v + shape.q,
              first_sv = first_su + shape.ranks;
    double *nu = room.row, *nv = room.row + pitch;
    team.grid(2, shape.width, [&](int which, int k) {
      const double square = (which == 0 ? room.gu : room.gv)[k * pitch + k];
      room.row[which * pitch + k] = square > 0.0 ? sqrt(square) : 1.0;
    });
    team.grid(shape.rows(), shape.width, [&](int i, int k) {
      double& x = room.c[i * pitch + k];
      if (i < first_u) {
        x = x * (nu[k] * nv[k]);
      } else {
        x = x / (i < first_v || (i >= first_su && i < first_sv) ? nu[k] : nv[k]);
      }
    });
    team.grid(shape.width, shape.width, [&](int i, int k) {
      const int at = i * pitch + k;
      const double both = (nu[i] * nv[i]) * (nu[k] * nv[k]);
      room.gc[at] = room.gc[at] * both;
      room.gu[at] = room.gu[at] / (nu[i] * nu[k]);
      room.gv[at] = room.gv[at] / (nv[i] * nv[k]);
    });
  }

  // Goes on along the last step, from item.state to what the room holds, as far as the error falls. True: it went on.
  MK_BLOCK bool lengthen() {
    const int pitch = room.pitch, width = shape.width, tasks = shape.tasks;
    const double* const before = item.state;
    const double* const su0 = before + (tasks + shape.p + shape.q) * width;
    const double* const sv0 = su0 + shape.ranks * width;
    team.along(room, shape, before, room.sum);
    double grams[kAlsSteps];
    MK_UNROLL
    for (int i = 0; i < kAlsSteps; ++i) grams[i] = room.sum[i];
    team.template reduce<4>(shape.ranks, width, room.sum, [&](int r, int k, double* sums) {
      const int at = r * pitch + k, old = r * width + k, task = args.owner[r];
      const double c = room.c[task * pitch + k], dc = c - before[task * width + k];
      const double x = room.su[at], y = room.sv[at], dx = x - su0[old], dy = y - sv0[old];
      const double s0 = x * y, s1 = dx * y + x * dy, s2 = dx * dy;
      sums[0] = sums[0] + c * s0;
      sums[1] = sums[1] + (c * s1 + dc * s0);
      sums[2] = sums[2] + (c * s2 + dc * s1);
      sums[3] = sums[3] + dc * s2;
    });
    double found = 0.0, best = 0.0;
    MK_UNROLL
    for (int i = 0; i < kAlsSteps; ++i) {
      const double t = als_length(i);
      const double inner = room.sum[0] + t * (room.sum[1] + t * (room.sum[2] + t * room.sum[3]));
      const double here = item.norm2 + grams[i] - 2.0 * inner;
      if (i == 0 || here < found) {
        found = here;
        best = t;
      }
    }
    if (!(found < error)) return false;
    error = found;
    team.grid(shape.rows(), width, [&](int i, int k) {
      double& x = room.c[i * pitch + k];
      x = x + best * (x - before[i * width + k]);
    });
    return true;
  }

  // Whether two terms grow and cancel: some triple cosine below -0.95, and norms of 5 ||X|| together.
  MK_BLOCK bool degenerate() {
    const int pitch = room.pitch, width = shape.width;
    team.all([&](int thread) {
      for (int k = thread; k < width; k += team.size) {
        double least = 1.0;
        for (int l = 0; l < width; ++l) {
          const double lengths = room.gc[k * pitch + k] * room.gc[l * pitch + l];
          const double cosine = lengths > 0.0 ? room.gc[k * pitch + l] / sqrt(lengths) : 0.0;
          const double all = cosine * room.gu[k * pitch + l] * room.gv[k * pitch + l];
          least = all < least ? all : least;
        }
        room.part[k] = least;
      }
    });
    double least = 1.0, sum = 0.0;
    for (int k = 0; k < width; ++k) {
      least = room.part[k] < least ? room.part[k] : least;
      const double square = room.gc[k * pitch + k];
      sum = sum + (square > 0.0 ? sqrt(square) : 0.0);
    }
    return least < -0.95 && sum > 5.0 * size;
  }

  // The state goes back to memory.
  MK_BLOCK void store() {
    team.grid(shape.rows(), shape.width,
              [&](int i, int k) { item.state[i * shape.width + k] = room.c[i * room.pitch + k]; });
  }

  // Up to args.sweeps sweeps.
  MK_BLOCK void run() {
    const int width = shape.width, pitch = room.pitch;
    double last = item.report[kAlsLast], longer = item.report[kAlsLonger], level = item.report[kAlsLevel];
    int sweep = int(item.report[kAlsSweeps]), done = int(item.report[kAlsDone]);
    if (done != 0) return;
    if (room.b != item.b) {
      team.grid(shape.p + shape.q, shape.ranks, [&](int i, int k) {
        const_cast<double*>(room.b)[i * room.b_pitch + k] =
            i < shape.p ? item.b[i * shape.ranks + k] : item.a[(i - shape.p) * shape.ranks + k];
      });
    }
    team.grid(shape.tasks + shape.p + shape.q, width,
              [&](int i, int k) { room.c[i * pitch + k] = item.state[i * width + k]; });
    for (int mode = 1; mode < 3; ++mode) {
      take_gram(mode);
      take_product(mode);
    }
    for (int i = 0; i < args.sweeps && done == 0; ++i) {
      ++sweep;
      double relative = INFINITY;
      bool sound = true;
      for (int mode = 0; mode < 3 && sound; ++mode) sound = update(mode);
      if (sound) {
        error = squared_error();
        normalise();
        if (args.search != 0 && sweep > 2 && lengthen()) {
          longer = longer + 1.0;
          for (int mode = 0; mode < 3; ++mode) take_gram(mode);
          normalise();
        }
        const double root = sqrt(error > 0.0 ? error : 0.0) / size;
        relative = error == error ? root : relative;
      }
      const double change = last > relative ? last - relative : relative - last;
      const bool stops = relative == INFINITY || (sweep >= 2 && change < args.tol);
      done = stops ? 1 : 0;
      last = relative;
      if (relative < INFINITY && (stops || sweep % kAlsWatchEvery == 0) && degenerate()) {
        level = level + 1.0;
        if (level < double(kAlsRidges)) {
          const double raised = als_ridge(int(level));
          ridge = raised > ridge ? raised : ridge;
          done = 0;
        } else if (width <= shape.p) {
          done = 2;
        }
      }
      if (args.search != 0 || done != 0 || i + 1 == args.sweeps) store();
      team.all([&](int thread) {
        if (thread == 0) item.history[i] = relative;
      });
    }
    team.all([&](int thread) {
      if (thread != 0) return;
      item.report[kAlsLast] = last;
      item.report[kAlsDone] = double(done);
      item.report[kAlsSweeps] = double(sweep);
      item.report[kAlsLonger] = longer;
      item.report[kAlsLevel] = level;
      item.report[kAlsRidge] = ridge;
    });
  }
};

}  // namespace mergekernels
