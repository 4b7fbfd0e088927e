// What backends share of passes: limits, the box that is a piece, and codes that cross from Python.
#pragma once

#include "common/key.h"

namespace mergekernels {

constexpr int kMaxModels = 64;
constexpr int kCanonicalBlock = 4096;
constexpr int kLanes = 256;

enum Consensus : int { kConsensusNone = 0, kConsensusSum = 1 };
enum Divisor : int {
  kDivisorNone = 0,
  kDivisorValue = 1,
  kDivisorAgreeingWeights = 2,
  kDivisorAgreeingCount = 3,
  kDivisorKeptCount = 4
};

// A box of a tensor: element i of the piece, in row-major order, has flat index flat_index(piece, i).
struct Piece {
  std::int64_t g0, rows, cols, ld;
};

MK_HD std::int64_t flat_index(const Piece& piece, std::int64_t i) {
  if (piece.rows <= 1 || piece.ld == piece.cols) return piece.g0 + i;
  return piece.g0 + (i / piece.cols) * piece.ld + i % piece.cols;
}

}  // namespace mergekernels
