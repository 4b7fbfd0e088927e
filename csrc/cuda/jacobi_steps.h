// Small decompositions: the steps that SVD and eigenproblem share.
#pragma once

#include "cuda/jacobi_room.h"

namespace mergekernels {

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

  // Entry of the input, as it is; of an eigenproblem the upper triangle is that below.
  template <bool kEigh>
  MK_BLOCK C input(int i, int j) const {
    return kEigh && i < j ? item.matrix(j, i) : item.matrix(i, j);
  }

  // Reads the matrix into v, scaled by the power of two room.sum[1]; an eigenproblem's squared norm is in room.sum[2].
  // False: it has NaN or Inf.
  template <bool kEigh>
  MK_BLOCK bool load() {
    team.all([&](int thread) {
      C largest = C(0);
      for (int e = thread; e < item.p * item.s; e += team.size) {
        int i, j;
        element(e, &i, &j);
        const C x = input<kEigh>(i, j);
        room.v[j * room.v_stride + i] = x;
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
        C& x = room.v[e / item.p * room.v_stride + e % item.p];
        x = x * scale;
        squares = squares + x * x;
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

}  // namespace mergekernels
