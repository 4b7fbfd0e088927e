// small_svd and small_eigh: one block of threads per matrix, in shared memory; the arithmetic is in common/jacobi.h.
//
// The work is a row of steps, each done by all threads, with a barrier after it; every sum has a fixed order that
// depends on the shape only. So a matrix has the same result in any batch, and a host that runs the steps thread after
// thread has the same bits.
#pragma once

#include "common/jacobi.h"
#include "cuda/group.h"

#if defined(__CUDACC__)
#define MK_BLOCK __device__ __forceinline__
#else
#define MK_BLOCK inline
#endif

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

  static MK_HD std::int64_t num_g(bool eigh, int s) {
    return eigh ? std::int64_t(s) * (s + 1) / 2 : std::int64_t(jacobi_stride<C>(s, jacobi_lanes(s))) * s;
  }
  static MK_HD int num_parts(int s) {
    const int parts = 3 * num_meetings(s) * jacobi_lanes(s), threads = jacobi_threads(s);
    return parts > threads ? parts : threads;
  }
  static MK_HD std::int64_t size(bool eigh, int p, int s, bool far) {
    const std::int64_t v = far ? 0 : std::int64_t(jacobi_stride<C>(p, jacobi_lanes(s))) * s;
    const std::int64_t numbers = num_g(eigh, s) + v + num_parts(s) + 4 * num_meetings(s) + 4 + 3 * s;
    return (numbers * std::int64_t(sizeof(C)) + 4 * (2 * s + 32 + 1) + 15) / 16 * 16;
  }
  MK_BLOCK JacobiRoom(std::uint8_t* memory, bool eigh, int p, int side, C* far) {
    const int lanes = jacobi_lanes(side), pairs = num_meetings(side);
    g_stride = jacobi_stride<C>(side, lanes);
    v_stride = far != nullptr ? p : jacobi_stride<C>(p, lanes);
    g = reinterpret_cast<C*>(memory);
    C* next = g + num_g(eigh, side);
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

// What both share. Team: all(f) calls f(thread) by each of `size` threads and waits for them.
template <class C, class Team>
struct Jacobi {
  const JacobiItem<C>& item;
  const JacobiRoom<C>& room;
  Team& team;
  int lanes, pairs, rounds;

  MK_BLOCK Jacobi(const JacobiItem<C>& i, const JacobiRoom<C>& r, Team& t)
      : item(i), room(r), team(t), lanes(jacobi_lanes(i.s)), pairs(num_meetings(i.s)), rounds(num_rounds(i.s)) {}

  // The parts of all threads folded to their largest or their sum, into room.sum[slot].
  template <class Fold>
  MK_BLOCK void fold_parts(int slot, const Fold& fold) {
    team.all([&](int thread) {
      if (thread >= 32) return;
      C x = room.part[thread];
      for (int i = thread + 32; i < team.size; i += 32) x = fold(x, room.part[i]);
      room.part[thread] = x;
    });
    team.all([&](int thread) {
      if (thread != 0) return;
      C x = room.part[0];
      for (int i = 1; i < 32; ++i) x = fold(x, room.part[i]);
      room.sum[slot] = x;
    });
  }

  // Row and column of element e of the input: neighbouring threads read neighbouring addresses.
  MK_BLOCK void element(int e, int* row, int* column) const {
    const bool down = item.matrix.rows <= item.matrix.columns;
    *row = down ? e % item.p : e / item.s;
    *column = down ? e / item.p : e % item.s;
  }

  MK_BLOCK C& entry(int i, int j) const { return room.g[i > j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i]; }

  // Reads the matrix, scaled by the power of two room.sum[1]: an SVD's into v, of an eigenproblem the lower triangle
  // into g, with its squared norm in room.sum[2] and v = I. False: it has NaN or Inf.
  template <bool kEigh>
  MK_BLOCK bool load() {
    team.all([&](int thread) {
      C largest = C(0);
      for (int e = thread; e < item.p * item.s; e += team.size) {
        int i, j;
        element(e, &i, &j);
        if (kEigh) room.v[j * room.v_stride + i] = i == j ? C(1) : C(0);
        if (kEigh && i < j) continue;
        const C x = item.matrix(i, j);
        (kEigh ? entry(i, j) : room.v[j * room.v_stride + i]) = x;
        const C size = x < C(0) ? -x : x;
        // NaN counts as infinite.
        largest = size <= largest ? largest : size == size ? size : C(INFINITY);
      }
      room.part[thread] = largest;
    });
    fold_parts(0, [](C a, C b) { return a < b ? b : a; });
    const C largest = room.sum[0];
    if (largest == C(INFINITY)) return false;
    const C scale = scale_for(largest);
    team.all([&](int thread) {
      C squares = C(0);
      for (int e = thread; e < item.p * item.s; e += team.size) {
        int i, j;
        element(e, &i, &j);
        if (kEigh && i < j) continue;
        C& x = kEigh ? entry(i, j) : room.v[j * room.v_stride + i];
        x = x * scale;
        // Those below the diagonal stand for two.
        squares = squares + (i == j ? x * x : C(2) * (x * x));
      }
      room.part[thread] = squares;
      if (thread == 0) room.sum[1] = scale;
      if (thread < pairs) room.worst[thread] = C(0);
      if (thread < item.s) room.column[thread] = thread;
    });
    if (kEigh) fold_parts(2, [](C a, C b) { return a + b; });
    return true;
  }

  // Ends a sweep: whether it was the last one.
  MK_BLOCK bool finish_sweep(int sweep) {
    team.all([&](int thread) {
      if (thread != 0) return;
      C worst = C(0);
      for (int k = 0; k < pairs; ++k) {
        worst = room.worst[k] > worst ? room.worst[k] : worst;
        room.worst[k] = C(0);
      }
      const bool converged = !needs_rotation(worst);
      *room.done = converged || sweep == kMaxSweeps;
      item.report[0] = converged ? double(sweep) : 0.0;
      item.report[1] = double(worst);
    });
    return *room.done != 0;
  }

  MK_BLOCK void refuse() {
    team.all([&](int thread) {
      if (thread == 0) {
        item.report[0] = -1.0;
        item.report[1] = 0.0;
      }
    });
  }

  // Turns columns of a matrix of `rows` rows by the rotation of pair k, the rows that are lane's.
  MK_BLOCK void turn(C* columns, int stride, int rows, const Meeting& at, int k, int lane) const {
    const C c = room.c[k], s = room.s[k];
    C *x = columns + at.first * stride, *y = columns + at.second * stride;
    for (int i = lane; i < rows; i += lanes) {
      const C a = x[i], b = y[i];
      x[i] = c * a - s * b;
      y[i] = s * a + c * b;
    }
  }

  // The place of each value in falling order, ties by column; then writes the values.
  MK_BLOCK void order_values() {
    team.all([&](int thread) {
      if (thread >= item.s) return;
      const C mine = room.values[thread];
      int place = 0;
      for (int j = 0; j < item.s; ++j) {
        const C other = room.values[j];
        place += other > mine || (other == mine && j < thread);
      }
      room.place[thread] = place;
      item.values[place] = mine / room.sum[1];
    });
  }

  // Writes columns of v, of p rows, in the order of their values.
  MK_BLOCK void write_v(const Strided<C>& to) {
    team.all([&](int thread) {
      const bool down = to.rows <= to.columns;
      for (int e = thread; e < item.p * item.s; e += team.size) {
        const int i = down ? e % item.p : e / item.s, j = down ? e / item.p : e % item.s;
        to(i, room.place[j]) = room.v[j * room.v_stride + i];
      }
    });
  }

  // The sum of one number's parts, one of each lane, from `from`.
  MK_BLOCK C fold_lanes(const C* from) const {
    C sum = from[0];
    for (int l = 1; l < lanes; ++l) sum = sum + from[l];
    return sum;
  }
};

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
        for (int i = k + thread % lanes; i < p; i += lanes)
          at(j)[i] = (i == k ? C(0) : at(j)[i]) - factor * at(k)[i];
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

// Two-sided Jacobi: G = V^T A V becomes diagonal, of which the lower triangle is held.
template <class C, class Team>
MK_BLOCK void jacobi_eigh(const JacobiItem<C>& item, const JacobiRoom<C>& room, Team& team) {
  Jacobi<C, Team> work(item, room, team);
  const int lanes = work.lanes, pairs = work.pairs, teams = team.size / lanes, side = item.s;
  const auto at = [&](int i, int j) -> C& { return work.entry(i, j); };
  if (!work.template load<true>()) return work.refuse();
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
  const JacobiRoom<C> room(memory, eigh, item.p, item.s, item.far);
  if (eigh) {
    jacobi_eigh(item, room, team);
  } else {
    jacobi_svd(item, room, team);
  }
}

}  // namespace mergekernels
