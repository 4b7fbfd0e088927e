// The fixed order of sums: lanes inside a canonical block, and the tree over block numbers.
#pragma once

#include "common/hd.h"

namespace mergekernels {

// Folds 256 lane sums into lanes[0], stride 128, 64, ... 1.
MK_HD double fold_lanes(double* lanes) {
  for (int stride = 128; stride > 0; stride /= 2)
    for (int i = 0; i < stride; ++i) lanes[i] += lanes[i + stride];
  return lanes[0];
}

// The tree over n block sums, adjacent pairs first; a missing right child passes the left through. `sums` is consumed.
MK_HD double fold_blocks(double* sums, std::int64_t n) {
  if (n == 0) return 0.0;
  for (; n > 1; n = (n + 1) / 2) {
    for (std::int64_t j = 0; j < n / 2; ++j) sums[j] = sums[2 * j] + sums[2 * j + 1];
    if (n % 2 != 0) sums[n / 2] = sums[n - 1];
  }
  return sums[0];
}

}  // namespace mergekernels
