// cp_als on the chip: one block of threads for each start of each module, all sweeps in one launch. What a block does
// with the loop of common/als_sweeps.h: products in tiles of registers, sums folded in a fixed order.
#pragma once

#include "common/als_sweeps.h"

namespace mergekernels {

constexpr int kAlsMostThreads = 256;

// Threads that a problem keeps busy.
MK_HD int als_threads(const AlsShape& s) {
  const std::int64_t sides = s.ranks > s.p ? s.ranks : s.p, work = (sides > s.q ? sides : s.q) * s.width;
  return work >= 2048 ? kAlsMostThreads : work >= 512 ? 128 : 64;
}

// Bytes on the chip.
MK_HD std::int64_t als_room(const AlsShape& s, bool far) {
  return AlsRoom::numbers(s, s.width, als_threads(s), far) * std::int64_t(sizeof(double));
}

// Threads: size; all(f), see als_sweeps.h.
template <class Threads>
struct AlsBlock : Threads {
  double* part;

  MK_BLOCK AlsBlock(const Threads& threads, double* room_part) : Threads(threads), part(room_part) {}

  // f(i, k) of the elements of one thread, without a division for each.
  template <class F>
  MK_BLOCK void walk(int thread, int rows, int columns, const F& f) const {
    int i = thread / columns, k = thread % columns;
    const int down = this->size / columns, along = this->size % columns;
    MK_ROLLED
    while (i < rows) {
      f(i, k);
      i += down;
      k += along;
      if (k >= columns) {
        k -= columns;
        ++i;
      }
    }
  }

  template <class F>
  MK_BLOCK void grid(int rows, int columns, const F& f) {
    this->all([&](int thread) { walk(thread, rows, columns, f); });
  }

  // The sums of all threads, in `part`, to `to`.
  template <int kSums>
  MK_BLOCK void fold(double* to) {
    const int threads = this->size;
    this->all([&](int thread) {
      if (thread >= 32) return;
      MK_UNROLL
      for (int n = 0; n < kSums; ++n) {
        double x = part[n * threads + thread];
        for (int i = thread + 32; i < threads; i += 32) x = x + part[n * threads + i];
        part[n * threads + thread] = x;
      }
    });
    this->all([&](int thread) {
      if (thread >= kSums) return;
      double x = part[thread * threads];
      for (int i = 1; i < 32; ++i) x = x + part[thread * threads + i];
      to[thread] = x;
    });
  }

  template <int kSums, class F>
  MK_BLOCK void reduce(int rows, int columns, double* to, const F& f) {
    this->all([&](int thread) {
      double sums[kSums] = {};
      walk(thread, rows, columns, [&](int i, int k) { f(i, k, sums); });
      MK_UNROLL
      for (int n = 0; n < kSums; ++n) part[n * this->size + thread] = sums[n];
    });
    fold<kSums>(to);
  }

  // out[i, k] = sum over `depth` of left(i, d) f[d, k]: tiles whose rows and columns are far apart, so that
  // neighbouring threads read neighbouring numbers.
  template <int kTile, class Left>
  MK_BLOCK void tiles(int rows, int depth, int width, const Left& left, const double* f, double* out, int pitch) {
    const int down = (rows + kTile - 1) / kTile, across = (width + kTile - 1) / kTile;
    this->all([&](int thread) {
      MK_ROLLED
      for (int tile = thread; tile < down * across; tile += this->size) {
        const int i0 = tile / across, k0 = tile % across;
        int row[kTile], column[kTile];
        double sums[kTile][kTile] = {};
        MK_UNROLL
        for (int t = 0; t < kTile; ++t) {
          // Beyond the end the last one again, which is not written twice.
          row[t] = i0 + t * down < rows ? i0 + t * down : rows - 1;
          column[t] = k0 + t * across < width ? k0 + t * across : width - 1;
        }
        MK_TWICE
        for (int d = 0; d < depth; ++d) {
          double x[kTile], y[kTile];
          MK_UNROLL
          for (int t = 0; t < kTile; ++t) {
            x[t] = left(row[t], d);
            y[t] = f[d * pitch + column[t]];
          }
          MK_UNROLL
          for (int t = 0; t < kTile; ++t) {
            MK_UNROLL
            for (int j = 0; j < kTile; ++j) sums[t][j] = sums[t][j] + x[t] * y[j];
          }
        }
        MK_UNROLL
        for (int t = 0; t < kTile; ++t) {
          MK_UNROLL
          for (int j = 0; j < kTile; ++j)
            if (i0 + t * down < rows && k0 + j * across < width) out[row[t] * pitch + column[j]] = sums[t][j];
        }
      }
    });
  }

  template <class Left>
  MK_BLOCK void product(int rows, int depth, int width, const Left& left, const double* f, double* out, int pitch) {
    if (rows * width >= 16 * this->size) {
      tiles<4>(rows, depth, width, left, f, out, pitch);
    } else {
      tiles<2>(rows, depth, width, left, f, out, pitch);
    }
  }

  // out (columns x width) = x^T f, of x with `rows` rows x_pitch apart.
  MK_BLOCK void inner(const double* x, int x_pitch, int rows, int columns, const double* f, double* out,
                      const AlsRoom& room) {
    product(columns, rows, room.pitch, [&](int i, int d) { return x[d * x_pitch + i]; }, f, out, room.pitch);
  }

  // out (rows x width) = x f.
  MK_BLOCK void outer(const double* x, int x_pitch, int rows, int columns, const double* f, double* out,
                      const AlsRoom& room) {
    product(rows, columns, room.pitch, [&](int i, int d) { return x[i * x_pitch + d]; }, f, out, room.pitch);
  }

  // Sweeps row and column j of h, whose row is `row`; scale: 1 / row[j]. The row after it goes to `next`.
  MK_BLOCK void pivot(double* h, int pitch, int width, int j, const double* row, double* next, double scale) {
    grid(width, width, [&](int i, int k) {
      double& at = h[i * pitch + k];
      const double scaled = row[i] * scale;
      double x = at - scaled * row[k];
      x = k == j ? scaled : x;
      x = i == j ? (k == j ? -scale : row[k] * scale) : x;
      at = x;
      if (i == j + 1) next[k] = x;
    });
  }

  // sum over k, l of the product over the factors f of (G(f + t d))[k, l] for each length t, d = f - before.
  MK_BLOCK void along(const AlsRoom& room, const AlsShape& s, const double* before, double* to) {
    this->all([&](int thread) {
      double sums[kAlsSteps] = {};
      walk(thread, s.width, s.width, [&](int k, int l) {
        if (k < l) return;
        double products[kAlsSteps];
        MK_UNROLL
        for (int n = 0; n < kAlsSteps; ++n) products[n] = k == l ? 1.0 : 2.0;  // the Grams are symmetric
        const double *f = room.c, *old = before;
        MK_ROLLED
        for (int mode = 0; mode < 3; ++mode) {
          const int rows = mode == 0 ? s.tasks : mode == 1 ? s.p : s.q;
          double g0 = 0.0, g1 = 0.0, g2 = 0.0;
          MK_ROLLED
          for (int i = 0; i < rows; ++i) {
            const double x = f[i * room.pitch + k], y = f[i * room.pitch + l];
            const double dx = x - old[i * s.width + k], dy = y - old[i * s.width + l];
            g0 = g0 + x * y;
            g1 = g1 + (x * dy + dx * y);
            g2 = g2 + dx * dy;
          }
          MK_UNROLL
          for (int n = 0; n < kAlsSteps; ++n) {
            const double t = als_length(n);
            products[n] = products[n] * (g0 + t * (g1 + t * g2));
          }
          f += rows * room.pitch;
          old += rows * s.width;
        }
        MK_UNROLL
        for (int n = 0; n < kAlsSteps; ++n) sums[n] = sums[n] + products[n];
      });
      MK_UNROLL
      for (int n = 0; n < kAlsSteps; ++n) part[n * this->size + thread] = sums[n];
    });
    fold<kAlsSteps>(to);
  }
};

template <class Threads>
MK_BLOCK void als_item(const AlsArgs& args, const AlsItem& item, double* memory, const Threads& threads) {
  const AlsRoom room(memory, args.shape, args.shape.width, threads.size, item, args.far != 0);
  AlsBlock<Threads> team(threads, room.part);
  Als<AlsBlock<Threads>> als(args, item, room, team);
  als.run();
}

}  // namespace mergekernels
