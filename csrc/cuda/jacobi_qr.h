// Small decompositions: the orthogonal factor that puts a matrix nearly in order, so that few sweeps are left.
#pragma once

#include "cuda/jacobi_steps.h"

namespace mergekernels {

// A P = Q R by reflections, the longest of the columns that are left first: v holds the reflections below and at its
// diagonal and R above, `diagonal` the diagonal of R, `column` the permutation. Rotations of R^T, whose columns fall in
// length and are nearly orthogonal, then need few sweeps whatever the spectrum.
template <class C, class Team>
MK_BLOCK void pivoted_qr(Jacobi<C, Team>& work) {
  const JacobiItem<C>& item = work.item;
  const JacobiRoom<C>& room = work.room;
  Team& team = work.team;
  const int lanes = work.lanes, teams = team.size / lanes, p = item.p, s = item.s;
  const auto at = [&](int j) { return room.v + j * room.v_stride; };
  team.all([&](int thread) {
    const int lane = thread % lanes;
    for (int j = thread / lanes; j < s; j += teams) {
      C squares = C(0);
      for (int i = lane; i < p; i += lanes) squares = squares + at(j)[i] * at(j)[i];
      room.part[j * lanes + lane] = squares;
    }
  });
  for (int k = 0; k < s; ++k) {
    team.all([&](int thread) {
      if (thread >= k && thread < s) room.values[thread] = work.fold_lanes(room.part + thread * lanes);
    });
    team.all([&](int thread) {
      if (thread >= 32) return;
      int best = k + thread < s ? k + thread : k;
      for (int j = best + 32; j < s; j += 32) best = room.values[j] > room.values[best] ? j : best;
      room.best[thread] = best;
    });
    team.all([&](int thread) {
      int best = room.best[0];
      for (int i = 1; i < 32; ++i) {
        const int other = room.best[i];
        const C longest = room.values[best], length = room.values[other];
        best = length > longest || (length == longest && other < best) ? other : best;
      }
      for (int i = thread; i < p; i += team.size) {
        C x = at(best)[i];
        if (i == k) {
          const Reflection<C> r = reflection(x, room.values[best]);
          room.diagonal[k] = r.diagonal;
          room.weight[k] = r.weight;
          x = r.pivot;
          const int column = room.column[best];
          room.column[best] = room.column[k];
          room.column[k] = column;
        }
        if (best != k) at(best)[i] = at(k)[i];
        at(k)[i] = x;
      }
    });
    team.all([&](int thread) {
      const int lane = thread % lanes;
      for (int j = k + 1 + thread / lanes; j < s; j += teams) {
        C dot = C(0);
        for (int i = k + lane; i < p; i += lanes) dot = dot + at(k)[i] * at(j)[i];
        room.part[j * lanes + lane] = dot;
      }
    });
    team.all([&](int thread) {
      if (thread > k && thread < s) room.values[thread] = room.weight[k] * work.fold_lanes(room.part + thread * lanes);
    });
    team.all([&](int thread) {
      const int lane = thread % lanes;
      for (int j = k + 1 + thread / lanes; j < s; j += teams) {
        const C factor = room.values[j];
        C squares = C(0);
        for (int i = k + lane; i < p; i += lanes) {
          const C x = at(j)[i] - factor * at(k)[i];
          at(j)[i] = x;
          squares = i == k ? squares : squares + x * x;
        }
        room.part[j * lanes + lane] = squares;
      }
    });
  }
  // g = P R^T: the rows of g are the columns of the input.
  team.all([&](int thread) {
    for (int e = thread; e < s * s; e += team.size) {
      const int j = e % s, k = e / s;
      const C x = j == k ? room.diagonal[k] : j > k ? at(j)[k] : C(0);
      room.g[k * room.g_stride + room.column[j]] = room.weight[k] == C(0) ? C(0) : x;
    }
  });
}

// Makes v the first s columns of Q, from its reflections.
template <class C, class Team>
MK_BLOCK void form_q(Jacobi<C, Team>& work) {
  const JacobiItem<C>& item = work.item;
  const JacobiRoom<C>& room = work.room;
  Team& team = work.team;
  const int lanes = work.lanes, teams = team.size / lanes, p = item.p, s = item.s;
  const auto at = [&](int j) { return room.v + j * room.v_stride; };
  for (int k = s - 1; k >= 0; --k) {
    // Column j > k is zero in row k and above.
    team.all([&](int thread) {
      const int lane = thread % lanes;
      for (int j = k + 1 + thread / lanes; j < s; j += teams) {
        C dot = C(0);
        for (int i = k + 1 + lane; i < p; i += lanes) dot = dot + at(k)[i] * at(j)[i];
        room.part[j * lanes + lane] = dot;
      }
    });
    team.all([&](int thread) {
      if (thread > k && thread < s) room.values[thread] = room.weight[k] * work.fold_lanes(room.part + thread * lanes);
    });
    team.all([&](int thread) {
      for (int j = k + 1 + thread / lanes; j < s; j += teams) {
        const C factor = room.values[j];
        for (int i = k + thread % lanes; i < p; i += lanes) at(j)[i] = (i == k ? C(0) : at(j)[i]) - factor * at(k)[i];
      }
    });
    team.all([&](int thread) {
      // The thread of row k alone reads and writes it; the others have it from `sum`.
      if (thread == 0) room.sum[3] = room.weight[k] * at(k)[k];
    });
    team.all([&](int thread) {
      const C factor = room.sum[3];
      for (int i = k + thread; i < p; i += team.size)
        at(k)[i] = i == k ? C(1) - factor * at(k)[i] : C(0) - factor * at(k)[i];
    });
  }
}

// g = Q^T A Q, the lower triangle, of the Q in v.
template <class C, class Team>
MK_BLOCK void transform(Jacobi<C, Team>& work) {
  const JacobiRoom<C>& room = work.room;
  Team& team = work.team;
  const int lanes = work.lanes, teams = team.size / lanes, side = work.item.s;
  team.all([&](int thread) {
    const C scale = room.sum[1];
    for (int e = thread; e < side * side; e += team.size) {
      const int i = e % side, j = e / side;
      C dot = C(0);
      for (int k = 0; k < side; ++k)
        dot = dot + scale * work.template input<true>(i, k) * room.v[j * room.v_stride + k];
      room.g[j * room.g_stride + i] = dot;
    }
  });
  for (int j = 0; j < side; ++j) {
    C* column = room.g + j * room.g_stride;
    team.all([&](int thread) {
      const int lane = thread % lanes;
      for (int i = j + thread / lanes; i < side; i += teams) {
        C dot = C(0);
        for (int k = lane; k < side; k += lanes) dot = dot + room.v[i * room.v_stride + k] * column[k];
        room.part[i * lanes + lane] = dot;
      }
    });
    team.all([&](int thread) {
      if (thread >= j && thread < side) column[thread] = work.fold_lanes(room.part + thread * lanes);
    });
  }
}

}  // namespace mergekernels
