// gram: products of pairs of models, summed over canonical blocks; a tile of two models by two at a time.
// Reads the models once for each tile that they are in (neighbouring tiles share the cache), writes 8 bytes per pair
// and block.
#pragma once

#include "common/program.h"
#include "cuda/group.h"

namespace mergekernels {

// One call, by value. The inputs are a dense box of rows x cols. A segment is a row, or with `columns` a column.
// sums: double [pairs i <= j][segments][blocks]. base: what is taken off, or nullptr.
struct GramArgs {
  std::int64_t rows, cols, blocks;
  const void* base;
  double* sums;
  std::int32_t num_models;
  bool columns, aligned;
  const void* models[kMaxModels];
};

MK_HD std::int64_t num_segments(const GramArgs& a) { return a.columns ? a.cols : a.rows; }

// Tiles of the upper triangle, row by row, as pairs (row, col) of pairs of models.
MK_HD int num_tiles(int num_models) {
  const int side = (num_models + 1) / 2;
  return side * (side + 1) / 2;
}
struct Tile {
  int row, col;
};
MK_HD Tile tile_at(int num_models, int number) {
  const int side = (num_models + 1) / 2;
  int row = 0;
  while (number >= side - row) number -= side - row++;
  return {row, row + number};
}

constexpr int kTilePairs = 4;

// The models of pair p of a tile, and where its sums lie; negative for a pair that is no pair, or the mirror of one.
MK_HD std::int64_t pair_slot(int num_models, const Tile& tile, int p) {
  const std::int64_t i = 2 * tile.row + p / 2, j = 2 * tile.col + p % 2;
  if (j >= num_models || i > j) return -1;
  return i * num_models - i * (i - 1) / 2 + j - i;
}

// The vectors of two models at elements first .. first + n - 1 of the box, +0 where there is none.
template <int kDType, class C>
MK_HD void load_two(const GramArgs& a, int pair, std::int64_t first, int n, C v[2][kGroup]) {
  C x0[kGroup] = {};
  if (a.base != nullptr) widen(load_packed<kDType>(a.base, first, n, a.aligned), x0);
  MK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool there = 2 * pair + i < a.num_models;
    Packed<kDType> packed{};
    if (there) packed = load_packed<kDType>(a.models[2 * pair + i], first, n, a.aligned);
    widen(packed, v[i]);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) v[i][j] = there && j < n ? v[i][j] - x0[j] : C(0);
  }
}

// Adds the products of eight elements to eight sums of each pair of a tile.
template <int kDType, class C>
MK_HD void add_products(const GramArgs& a, const Tile& tile, std::int64_t first, int n,
                        double sums[kTilePairs][kGroup]) {
  C left[2][kGroup], right[2][kGroup];
  load_two<kDType>(a, tile.row, first, n, left);
  if (tile.row != tile.col) load_two<kDType>(a, tile.col, first, n, right);
  MK_UNROLL
  for (int p = 0; p < kTilePairs; ++p) {
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const C other = tile.row == tile.col ? left[p % 2][j] : right[p % 2][j];
      sums[p][j] = sums[p][j] + double(left[p / 2][j]) * double(other);
    }
  }
}

}  // namespace mergekernels
