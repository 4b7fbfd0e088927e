// Sums over a canonical block by a warp, and the size of blocks whose threads need many registers.
#pragma once

#include "cuda/launch.cuh"

namespace mergekernels {

constexpr int kSmallBlock = 128;

// Folds the 256 lanes of a canonical block, eight in each thread of a warp, into lanes[0] of the first: strides 128 to
// 8 are other threads', 4 to 1 this one's.
__device__ __forceinline__ void fold_warp(double* lanes) {
  for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) lanes[j] = lanes[j] + __shfl_down_sync(kWholeWarp, lanes[j], unsigned(offset));
  }
#pragma unroll
  for (int stride = kGroup / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int j = 0; j < stride; ++j) lanes[j] = lanes[j] + lanes[j + stride];
  }
}

}  // namespace mergekernels
