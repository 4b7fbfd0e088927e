// stream over a list: the general pass over many small tensors in one launch, a tile of one of them at a time.
#pragma once

#include "cuda/program_group.h"

namespace mergekernels {

// Elements of a tile: one pass of a block of threads.
constexpr int kTileThreads = 128;
constexpr int kTileElements = kTileThreads * kGroup;

// Tile `number` of item `item`.
struct TileOf {
  std::int32_t item, number;
};

// One call, by value. items, tiles: in device memory; the items have one input dtype. bad: for each item, set to 1
// where an input or the result is not finite; nullptr if nobody asks.
template <class C>
struct ListArgs {
  const ProgramArgs<C>* items;
  const TileOf* tiles;
  std::uint32_t* bad;
  std::int64_t num_tiles;
};

// Notes that something is not finite, and counts nothing.
struct FlagTally {
  std::uint32_t* flag;
  MK_HD void kept(int, int) {}
  MK_HD void votes(int, int, int) {}
  MK_HD void nonfinite(int, int, std::int64_t) {
    if (flag != nullptr) *flag = 1;
  }
};

// The part of a tile that thread `thread` of kTileThreads works on.
template <int kDType, class C>
MK_HD void list_group(const ListArgs<C>& a, std::int64_t tile, int thread, std::uint8_t* kept, int stride) {
  const TileOf at = a.tiles[tile];
  const ProgramArgs<C>& item = a.items[at.item];
  const std::int64_t first = std::int64_t(at.number) * kTileElements + thread * kGroup, left = item.n - first;
  FlagTally tally{a.bad == nullptr ? nullptr : a.bad + at.item};
  program_group<kDType>(item, first, left >= kGroup ? kGroup : left > 0 ? int(left) : 0, kept, stride, tally);
}

}  // namespace mergekernels
