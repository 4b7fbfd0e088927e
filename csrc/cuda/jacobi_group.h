// small_svd and small_eigh: one block of threads per matrix, in shared memory; the arithmetic is in common/jacobi.h.
//
// The work is a row of steps, each done by all threads, with a barrier after it; every sum has a fixed order that
// depends on the shape only. So a matrix has the same result in any batch, and a host that runs the steps thread after
// thread has the same bits.
#pragma once

#include "cuda/jacobi_qr.h"

namespace mergekernels {

// One-sided Jacobi on R^T of A P = Q R: rotations J from the right make the columns of G = P R^T orthogonal. Their
// lengths are sigma, V = G / sigma, U = Q J. Values below eps squared of the largest entry become zeros, with zeros for
// the right vector.
template <class C, class Team>
MK_BLOCK void jacobi_svd(const JacobiItem<C>& item, const JacobiRoom<C>& room, Team& team) {
  Jacobi<C, Team> work(item, room, team);
  const int lanes = work.lanes, pairs = work.pairs, teams = team.size / lanes, num = pairs * lanes, side = item.s;
  if (!work.template load<false>()) return work.refuse();
  pivoted_qr(work);
  const bool vectors = item.left.at != nullptr;
  if (vectors) form_q(work);
  for (int sweep = 1; sweep <= kMaxSweeps; ++sweep) {
    for (int round = 0; round < work.rounds; ++round) {
      team.all([&](int thread) {
        const int lane = thread % lanes;
        for (int k = thread / lanes; k < pairs; k += teams) {
          const Meeting at = meeting(side, round, k);
          if (at.second >= side) continue;
          const C *x = room.g + at.first * room.g_stride, *y = room.g + at.second * room.g_stride;
          C alpha = C(0), beta = C(0), gamma = C(0);
          for (int i = lane; i < side; i += lanes) {
            const C a = x[i], b = y[i];
            alpha = alpha + a * a;
            beta = beta + b * b;
            gamma = gamma + a * b;
          }
          room.part[k * lanes + lane] = alpha;
          room.part[num + k * lanes + lane] = beta;
          room.part[2 * num + k * lanes + lane] = gamma;
        }
      });
      team.all([&](int thread) {
        if (thread >= pairs) return;
        room.s[thread] = C(0);
        if (meeting(side, round, thread).second >= side) return;
        const C alpha = work.fold_lanes(room.part + thread * lanes);
        const C beta = work.fold_lanes(room.part + num + thread * lanes);
        const C gamma = work.fold_lanes(room.part + 2 * num + thread * lanes);
        const C met = cosine(alpha, beta, gamma);
        room.worst[thread] = met > room.worst[thread] ? met : room.worst[thread];
        if (!needs_rotation(met)) return;
        const Rotation<C> r = smaller_rotation(alpha, beta, gamma);
        room.c[thread] = r.c;
        room.s[thread] = r.s;
      });
      team.all([&](int thread) {
        for (int k = thread / lanes; k < pairs; k += teams) {
          if (room.s[k] == C(0)) continue;
          const Meeting at = meeting(side, round, k);
          work.turn(room.g, room.g_stride, side, at, k, thread % lanes);
          if (vectors) work.turn(room.v, room.v_stride, item.p, at, k, thread % lanes);
        }
      });
    }
    if (work.finish_sweep(sweep)) break;
  }
  team.all([&](int thread) {
    for (int j = thread / lanes; j < side; j += teams) {
      C squares = C(0);
      for (int i = thread % lanes; i < side; i += lanes) {
        const C x = room.g[j * room.g_stride + i];
        squares = squares + x * x;
      }
      room.part[j * lanes + thread % lanes] = squares;
    }
  });
  team.all([&](int thread) {
    if (thread >= side) return;
    const C length = root(work.fold_lanes(room.part + thread * lanes));
    room.values[thread] = length > Precision<C>::kEps * Precision<C>::kEps ? length : C(0);
  });
  work.order_values();
  if (!vectors) return;
  work.write_v(item.left);
  team.all([&](int thread) {
    const bool down = item.right.rows <= item.right.columns;
    for (int e = thread; e < side * side; e += team.size) {
      const int i = down ? e % side : e / side, j = down ? e / side : e % side;
      const C value = room.values[j];
      item.right(i, room.place[j]) = value > C(0) ? room.g[j * room.g_stride + i] / value : C(0);
    }
  });
}

// Two-sided Jacobi on G = Q^T A Q, Q of A P = Q R, which is nearly in order: G becomes diagonal, V = Q J. The lower
// triangle of G is held.
template <class C, class Team>
MK_BLOCK void jacobi_eigh(const JacobiItem<C>& item, const JacobiRoom<C>& room, Team& team) {
  Jacobi<C, Team> work(item, room, team);
  const int lanes = work.lanes, pairs = work.pairs, teams = team.size / lanes, side = item.s;
  const auto at = [&](int i, int j) -> C& {
    return i > j ? room.g[j * room.g_stride + i] : room.g[i * room.g_stride + j];
  };
  if (!work.template load<true>()) return work.refuse();
  pivoted_qr(work);
  form_q(work);
  transform(work);
  // Entries below 8 eps / s of the norm sum to 8 eps of it.
  const C floor = root(room.sum[2]) / C(side);
  for (int sweep = 1; sweep <= kMaxSweeps; ++sweep) {
    for (int round = 0; round < work.rounds; ++round) {
      team.all([&](int thread) {
        if (thread >= pairs) return;
        room.c[thread] = C(1);
        room.s[thread] = room.t[thread] = C(0);
        const Meeting m = meeting(side, round, thread);
        if (m.second >= side) return;
        const C alpha = at(m.first, m.first), beta = at(m.second, m.second), gamma = at(m.first, m.second);
        const C met = coupling(alpha, beta, gamma, floor);
        room.worst[thread] = met > room.worst[thread] ? met : room.worst[thread];
        if (!needs_rotation(met)) return;
        const Rotation<C> r = smaller_rotation(alpha, beta, gamma);
        room.c[thread] = r.c;
        room.s[thread] = r.s;
        room.t[thread] = r.t;
      });
      team.all([&](int thread) {
        // Blocks (k, k + further), the circle of pairs: each two pairs once.
        const int step = team.size % pairs, leap = team.size / pairs;
        for (int k = thread % pairs, further = thread / pairs; 2 * further <= pairs;) {
          const int other = k + further < pairs ? k + further : k + further - pairs;
          const C ca = room.c[k], sa = room.s[k], cb = room.c[other], sb = room.s[other];
          const Meeting a = meeting(side, round, k), b = meeting(side, round, other);
          if (further == 0) {
            if (sa != C(0)) {
              const C gamma = at(a.first, a.second);
              at(a.first, a.first) = at(a.first, a.first) - room.t[k] * gamma;
              at(a.second, a.second) = at(a.second, a.second) + room.t[k] * gamma;
              at(a.first, a.second) = C(0);
            }
          } else if ((2 * further < pairs || k < further) && (sa != C(0) || sb != C(0))) {
            const bool two_a = a.second < side, two_b = b.second < side;
            const C x11 = at(a.first, b.first), x12 = two_b ? at(a.first, b.second) : C(0);
            const C x21 = two_a ? at(a.second, b.first) : C(0), x22 = two_a && two_b ? at(a.second, b.second) : C(0);
            const C y11 = ca * x11 - sa * x21, y12 = ca * x12 - sa * x22;
            const C y21 = sa * x11 + ca * x21, y22 = sa * x12 + ca * x22;
            at(a.first, b.first) = cb * y11 - sb * y12;
            if (two_b) at(a.first, b.second) = sb * y11 + cb * y12;
            if (two_a) at(a.second, b.first) = cb * y21 - sb * y22;
            if (two_a && two_b) at(a.second, b.second) = sb * y21 + cb * y22;
          }
          k += step;
          further += leap;
          if (k >= pairs) {
            k -= pairs;
            ++further;
          }
        }
        for (int k = thread / lanes; k < pairs; k += teams)
          if (room.s[k] != C(0)) work.turn(room.v, room.v_stride, side, meeting(side, round, k), k, thread % lanes);
      });
    }
    if (work.finish_sweep(sweep)) break;
  }
  team.all([&](int thread) {
    if (thread < side) room.values[thread] = at(thread, thread);
  });
  work.order_values();
  work.write_v(item.right);
}

template <class C, class Team>
MK_BLOCK void jacobi_item(bool eigh, const JacobiItem<C>& item, std::uint8_t* memory, Team& team) {
  const JacobiRoom<C> room(memory, item.p, item.s, item.far);
  if (eigh) {
    jacobi_eigh(item, room, team);
  } else {
    jacobi_svd(item, room, team);
  }
}

}  // namespace mergekernels
