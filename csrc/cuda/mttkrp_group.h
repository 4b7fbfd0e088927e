// mttkrp: thin products of the stacks of many modules in one launch, and sums over the columns of a task.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace mergekernels {

// A tile is kThinRows rows of a result and 4 columns for each of `across` threads; each thread has 4 x 4 of its
// numbers. Sums are added up in the type of the stack over kThinDepth steps, these in double.
constexpr int kThinRows = 64, kThinDepth = 16, kThinPitch = kThinRows + 1;

// One product: out (rows x width) = x f, or x^T f with `inner`, of f (depth x width) or, where there is a scale, of
// f[d] * scale[owner[d]]. x: rows x_pitch apart; f, scale, out: dense. first: number of its first tile in the launch.
template <class C>
struct ThinItem {
  const C* x;
  const double *f, *scale;
  const std::int32_t* owner;
  double* out;
  std::int64_t x_pitch;
  std::int32_t first, rows, depth, inner;
};

template <class C>
struct ThinArgs {
  const ThinItem<C>* items;
  std::int32_t count, width, tiles;
};

// out[t] (tasks x width) = sum of p[r] s[r] over the columns ends[t] .. ends[t + 1] - 1. first: number of the first
// element in the launch.
struct TaskItem {
  const double *p, *s;
  const std::int32_t* ends;
  double* out;
  std::int64_t first;
};

struct TaskArgs {
  const TaskItem* items;
  std::int64_t elements;
  std::int32_t count, width;
};

MK_HD int thin_across(int width) { return width <= 16 ? 4 : 16; }
MK_HD int thin_tiles(int rows, int width) {
  const int columns = 4 * thin_across(width);
  return (rows + kThinRows - 1) / kThinRows * ((width + columns - 1) / columns);
}

// The item that number `number` belongs to.
template <class Item>
MK_HD int item_of(const Item* items, int count, std::int64_t number) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (std::int64_t(items[middle].first) <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// What a thread keeps from one step to the next.
template <class C>
struct ThinOwn {
  C part[4][4];
  double sums[4][4];
};

// Memory that the threads of a tile share.
template <class C>
struct ThinRoom {
  C x[kThinDepth][kThinPitch], f[kThinDepth][kThinPitch];
};

// One tile. Team: size; all(f) calls f(thread, own) by each thread, with what it owns, and waits for them.
template <class C, class Team>
MK_BLOCK void thin_tile(const ThinArgs<C>& args, const ThinItem<C>& item, int tile, ThinRoom<C>& room, Team& team) {
  const int across = thin_across(args.width), columns = 4 * across, width = args.width;
  const int stretches = (width + columns - 1) / columns;
  const int row0 = tile / stretches * kThinRows, column0 = tile % stretches * columns;
  team.all([&](int, ThinOwn<C>& own) {
    MK_UNROLL
    for (int i = 0; i < 4; ++i) {
      MK_UNROLL
      for (int j = 0; j < 4; ++j) own.sums[i][j] = 0.0;
    }
  });
  MK_ROLLED
  for (int first = 0; first < item.depth; first += kThinDepth) {
    team.all([&](int thread, ThinOwn<C>&) {
      // Neighbouring threads read neighbouring numbers.
      for (int e = thread; e < kThinDepth * kThinRows; e += team.size) {
        const int d = item.inner != 0 ? e / kThinRows : e % kThinDepth;
        const int i = item.inner != 0 ? e % kThinRows : e / kThinDepth;
        const bool there = first + d < item.depth && row0 + i < item.rows;
        const std::int64_t at =
            item.inner != 0 ? (first + d) * item.x_pitch + row0 + i : (row0 + i) * item.x_pitch + first + d;
        room.x[d][i] = there ? item.x[at] : C(0);
      }
      for (int e = thread; e < kThinDepth * columns; e += team.size) {
        const int d = e / columns, k = e % columns;
        const bool there = first + d < item.depth && column0 + k < width;
        double value = there ? item.f[std::int64_t(first + d) * width + column0 + k] : 0.0;
        if (there && item.scale != nullptr)
          value = value * item.scale[std::int64_t(item.owner[first + d]) * width + column0 + k];
        room.f[d][k] = C(value);
      }
    });
    team.all([&](int thread, ThinOwn<C>& own) {
      const int i0 = thread / across, k0 = thread % across;
      MK_UNROLL
      for (int i = 0; i < 4; ++i) {
        MK_UNROLL
        for (int j = 0; j < 4; ++j) own.part[i][j] = C(0);
      }
      MK_UNROLL
      for (int d = 0; d < kThinDepth; ++d) {
        C x[4], y[4];
        MK_UNROLL
        for (int i = 0; i < 4; ++i) {
          x[i] = room.x[d][i0 + i * (kThinRows / 4)];
          y[i] = room.f[d][k0 + i * across];
        }
        MK_UNROLL
        for (int i = 0; i < 4; ++i) {
          MK_UNROLL
          for (int j = 0; j < 4; ++j) own.part[i][j] = own.part[i][j] + x[i] * y[j];
        }
      }
      MK_UNROLL
      for (int i = 0; i < 4; ++i) {
        MK_UNROLL
        for (int j = 0; j < 4; ++j) own.sums[i][j] = own.sums[i][j] + double(own.part[i][j]);
      }
    });
  }
  team.all([&](int thread, ThinOwn<C>& own) {
    MK_UNROLL
    for (int i = 0; i < 4; ++i) {
      MK_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int row = row0 + thread / across + i * (kThinRows / 4), k = column0 + thread % across + j * across;
        if (row < item.rows && k < width) item.out[std::int64_t(row) * width + k] = own.sums[i][j];
      }
    }
  });
}

// Element `number` of the sums over tasks.
MK_HD void task_sum(const TaskArgs& args, std::int64_t number) {
  const TaskItem& item = args.items[item_of(args.items, args.count, number)];
  const std::int64_t e = number - item.first, width = args.width, k = e % width;
  double sum = 0.0;
  for (std::int64_t r = item.ends[e / width]; r < item.ends[e / width + 1]; ++r)
    sum = sum + item.p[r * width + k] * item.s[r * width + k];
  item.out[e] = sum;
}

}  // namespace mergekernels
