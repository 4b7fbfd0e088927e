// row_rank: which entries of a row a rank rule keeps, by a team of threads per row. Reads a row once, writes a byte
// (and four, for rules that divide) per element.
//
// The order is (key, Philox word descending, index descending). Entries are put into bins that grow with |delta|, bins
// into cells that grow with their place in the bin, and cells of equal keys by their words; what shares a cell is
// compared in pairs. Every step grows with the order, so that the result does not depend on how the values lie; cells
// hold one or two entries where values or words are spread.
#pragma once

#include "common/program.h"
#include "cuda/group.h"

#if defined(__CUDACC__)
#define MK_TEAM __device__ __forceinline__
#else
#define MK_TEAM inline
#endif

namespace mergekernels {

// One call on one model, by value. x, base: the elements of a flat piece of whole slabs of length * stride, which
// begins at flat index g0. masks: a byte per element. thresholds: less one, or nullptr. draw: RankDraw, else RankBand.
// room: memory of `room_size` bytes for each block of threads where a row does not fit on the chip, else nullptr.
struct RankArgs {
  std::int64_t rows, g0, length, stride, room_size;
  const void* x;
  const void* base;
  std::uint8_t* masks;
  std::uint32_t* thresholds;
  std::uint8_t* room;
  std::uint64_t seed, low, span, single;
  std::int64_t first, last;
  std::uint32_t tensor;
  std::int32_t model, blocks;
  bool draw;
};

constexpr std::uint32_t kManyCells = 4;

MK_HD int num_bins(std::int64_t length) { return length < 256 ? 64 : length < 4096 ? 512 : 2048; }

// The memory that a team works in. highest: of a cell; order: takes its place later.
template <class C, class Index>
struct Room {
  using Key = typename KeyOf<C>::Key;
  Key* top;
  Key* keys;
  Key* highest;
  std::uint32_t* cells;
  std::uint32_t* bins;
  Index* place;
  Index* order;

  static MK_HD std::int64_t size(std::int64_t length) {
    const std::int64_t bytes = 8 + 2 * length * std::int64_t(sizeof(Key)) + 4 * (length + 1) +
                               4 * (num_bins(length) + 1) + length * std::int64_t(sizeof(Index));
    return (bytes + 15) / 16 * 16;
  }

  MK_TEAM Room(std::uint8_t* memory, std::int64_t length) {
    top = reinterpret_cast<Key*>(memory);
    keys = reinterpret_cast<Key*>(memory + 8);
    highest = keys + length;
    cells = reinterpret_cast<std::uint32_t*>(highest + length);
    bins = cells + length + 1;
    place = reinterpret_cast<Index*>(bins + num_bins(length) + 1);
    order = reinterpret_cast<Index*>(highest);
  }
};

// Where element i of a row lies in the piece.
MK_TEAM std::int64_t row_place(const RankArgs& a, std::int64_t row, std::int64_t i) {
  return (row / a.stride * a.length + i) * a.stride + row % a.stride;
}

MK_TEAM std::uint32_t row_word(const RankArgs& a, std::uint32_t purpose, std::int64_t row, std::int64_t i) {
  const std::int64_t g = a.g0 + row_place(a, row, i);
  return lane_of(philox_group(a.seed, a.tensor, philox_stream(a.model, purpose), std::uint64_t(g) >> 2), g);
}

// The cell of a key by its value alone: the bin that its share of the largest finite key falls into, and its place
// there.
template <class C, class Index>
MK_TEAM std::uint32_t value_cell(const Room<C, Index>& room, std::int64_t length, typename KeyOf<C>::Key key,
                                 bool bin_only) {
  const std::uint32_t last = std::uint32_t(num_bins(length) - 1);
  const auto top = *room.top;
  std::uint32_t bin = 0;
  C rest = C(0);
  if (key >= KeyOf<C>::kInf) {
    bin = last;
    rest = C(1);
  } else if (top != 0) {
    const C at = bits_as<C>(key) / bits_as<C>(top) * C(last);
    bin = std::uint32_t(at);
    rest = at - C(bin);
  }
  if (bin_only) return bin;
  const std::uint32_t start = room.bins[bin], count = room.bins[bin + 1] - start;
  const std::uint32_t place = std::uint32_t(rest * C(count));
  return start + (place < count ? place : count - 1);
}

// Whether entry k of the row comes before entry i.
template <class C, class Index>
MK_TEAM bool ranks_below(const RankArgs& a, const Room<C, Index>& room, std::int64_t row, std::int64_t k,
                         std::int64_t i) {
  if (room.keys[k] != room.keys[i]) return room.keys[k] < room.keys[i];
  const std::uint32_t mine = row_word(a, kPurposeTie, row, i), other = row_word(a, kPurposeTie, row, k);
  return other != mine ? other > mine : k > i;
}

// Writes whether the rule keeps element i, whose rank is given.
MK_TEAM void write_rank(const RankArgs& a, std::int64_t row, std::int64_t i, std::int64_t rank) {
  const std::int64_t at = row_place(a, row, i);
  if (!a.draw) {
    const std::int64_t place = a.length + 1 - rank;
    a.masks[at] = place > a.first && place <= a.last;
    return;
  }
  const std::uint64_t threshold =
      a.length == 1 ? a.single : a.low + std::uint64_t(rank - 1) * a.span / std::uint64_t(a.length - 1);
  a.masks[at] = std::uint64_t(row_word(a, kPurposeDraw, row, i)) < threshold;
  if (a.thresholds != nullptr) a.thresholds[at] = std::uint32_t(threshold - 1);
}

// One row. Team: each(n, f) calls f(0) .. f(n - 1) by all threads and waits for them; add and max are atomic; scan
// makes counts to sums of those before them.
template <int kDType, class C, class Index, class Team>
MK_TEAM void rank_row(const RankArgs& a, const Room<C, Index>& room, std::int64_t row, Team& team) {
  using Bits = typename Element<kDType>::Bits;
  const std::int64_t length = a.length;
  const int bins = num_bins(length);
  team.each(bins + 1, [&](std::int64_t b) {
    room.bins[b] = 0;
    if (b == 0) *room.top = 0;
  });
  team.each(length, [&](std::int64_t i) {
    const std::int64_t at = row_place(a, row, i);
    C d = Element<kDType>::template load<C>(static_cast<const Bits*>(a.x)[at]);
    if (a.base != nullptr) d = d - Element<kDType>::template load<C>(static_cast<const Bits*>(a.base)[at]);
    const auto key = key_of(d);
    room.keys[i] = key;
    if (key < KeyOf<C>::kInf) team.max(room.top, key);
  });
  team.each(length, [&](std::int64_t i) { team.add(room.bins + value_cell(room, length, room.keys[i], true), 1u); });
  team.scan(room.bins, bins + 1);
  team.each(length + 1, [&](std::int64_t i) {
    room.cells[i] = 0;
    if (i < length) room.highest[i] = 0;
  });
  team.each(length, [&](std::int64_t i) {
    const std::uint32_t cell = value_cell(room, length, room.keys[i], false);
    room.place[i] = Index(cell);
    team.add(room.cells + cell, 1u);
    team.max(room.highest + cell, room.keys[i]);
  });
  team.scan(room.cells, length + 1);
  // Where many share a cell, those of its highest key are spread by their words.
  team.each(length, [&](std::int64_t i) {
    const std::uint32_t cell = room.place[i], start = room.cells[cell], count = room.cells[cell + 1] - start;
    std::uint32_t further = 0;
    if (count > kManyCells && room.keys[i] == room.highest[cell])
      further = std::uint32_t(std::uint64_t(~row_word(a, kPurposeTie, row, i)) * count >> 32);
    room.place[i] = Index(start + further);
  });
  team.each(length + 1, [&](std::int64_t i) { room.cells[i] = 0; });
  team.each(length, [&](std::int64_t i) { team.add(room.cells + room.place[i], 1u); });
  team.scan(room.cells, length + 1);
  team.each(length, [&](std::int64_t i) { room.order[team.add(room.cells + room.place[i], 1u)] = Index(i); });
  // Now a cell's number is where it ends.
  team.each(length, [&](std::int64_t i) {
    const std::int64_t cell = room.place[i];
    const std::uint32_t start = cell == 0 ? 0 : room.cells[cell - 1], end = room.cells[cell];
    std::int64_t rank = std::int64_t(start) + 1;
    for (std::uint32_t k = start; k < end; ++k) rank += ranks_below(a, room, row, room.order[k], i);
    write_rank(a, row, i, rank);
  });
}

}  // namespace mergekernels
