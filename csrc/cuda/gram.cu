// gram: see gram_group.h. CUDA C++ because the order of every addition is fixed (lanes, then trees), which Triton's dot
// products and reductions do not promise, and because no multiplication and addition may be fused.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

// Rows: a warp takes a canonical block of a row and one tile; a thread owns eight neighbouring lanes.
template <int kDType, class C>
__global__ void __launch_bounds__(kSmallBlock) gram_rows_kernel(const __grid_constant__ GramArgs a) {
  const unsigned tiles = unsigned(num_tiles(a.num_models));
  const Tile tile = tile_at(a.num_models, int(blockIdx.x % tiles));
  const std::int64_t step = std::int64_t(gridDim.x / tiles) * (kSmallBlock / 32);
  std::int64_t work = std::int64_t(blockIdx.x / tiles) * (kSmallBlock / 32) + threadIdx.x / 32;
  for (; work < a.rows * a.blocks; work += step) {
    const std::int64_t row = work / a.blocks, block = work % a.blocks;
    double lanes[kTilePairs][kGroup] = {};
#pragma unroll 1
    for (int i = 0; i < kCanonicalBlock / kLanes; ++i) {
      const std::int64_t at = block * kCanonicalBlock + i * kLanes + lane_id() * kGroup;
      add_products<kDType, C>(a, tile, row * a.cols + at, group_count(a.cols, at), lanes);
    }
#pragma unroll
    for (int p = 0; p < kTilePairs; ++p) {
      fold_warp(lanes[p]);
      const std::int64_t slot = pair_slot(a.num_models, tile, p);
      if (lane_id() == 0 && slot >= 0) a.sums[slot * a.rows * a.blocks + work] = lanes[p][0];
    }
  }
}

// Columns: a block of 256 threads takes 4,096 rows of eight columns and one tile; a thread is a lane.
template <int kDType, class C>
__global__ void __launch_bounds__(kLanes) gram_columns_kernel(const __grid_constant__ GramArgs a) {
  __shared__ double shared[kGroup][kLanes];
  const unsigned tiles = unsigned(num_tiles(a.num_models));
  const Tile tile = tile_at(a.num_models, int(blockIdx.x % tiles));
  const std::int64_t groups = (a.cols + kGroup - 1) / kGroup;
  for (std::int64_t work = blockIdx.x / tiles; work < groups * a.blocks; work += gridDim.x / tiles) {
    const std::int64_t block = work / groups, column = work % groups * kGroup;
    const int n = group_count(a.cols, column);
    double sums[kTilePairs][kGroup] = {};
#pragma unroll 1
    for (int i = 0; i < kCanonicalBlock / kLanes; ++i) {
      const std::int64_t row = block * kCanonicalBlock + i * kLanes + threadIdx.x;
      add_products<kDType, C>(a, tile, row * a.cols + column, row < a.rows ? n : 0, sums);
    }
#pragma unroll
    for (int p = 0; p < kTilePairs; ++p) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kGroup; ++j) shared[j][threadIdx.x] = sums[p][j];
      __syncthreads();
      // Warp w folds column w: strides 128, 64, 32 in a thread, the rest between threads.
      const int w = int(threadIdx.x / 32);
      double v[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) v[k] = shared[w][lane_id() + 32 * k];
#pragma unroll
      for (int stride = kGroup / 2; stride > 0; stride /= 2) {
#pragma unroll
        for (int k = 0; k < stride; ++k) v[k] = v[k] + v[k + stride];
      }
      for (int offset = 16; offset > 0; offset /= 2) v[0] = v[0] + __shfl_down_sync(kWholeWarp, v[0], unsigned(offset));
      const std::int64_t slot = pair_slot(a.num_models, tile, p);
      if (lane_id() == 0 && slot >= 0 && w < n) a.sums[(slot * a.cols + column + w) * a.blocks + block] = v[0];
    }
  }
}

template <int kDType, class C>
void start_gram(const GramArgs& a, const Queue& queue) {
  const unsigned tiles = unsigned(num_tiles(a.num_models));
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  if (a.columns) {
    const int chunks = grid_size((a.cols + kGroup - 1) / kGroup * a.blocks, queue.device);
    gram_columns_kernel<kDType, C><<<unsigned(chunks) * tiles, kLanes, 0, stream>>>(a);
  } else {
    const int chunks = grid_size((a.rows * a.blocks + kSmallBlock / 32 - 1) / (kSmallBlock / 32), queue.device);
    gram_rows_kernel<kDType, C><<<unsigned(chunks) * tiles, kSmallBlock, 0, stream>>>(a);
  }
}

}  // namespace

template <class C>
void launch_gram(const GramArgs& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  by_dtype<C>(dtype, [&](auto code) { start_gram<code.value, C>(a, queue); });
  after_launch("launching gram", queue);
}

template void launch_gram<float>(const GramArgs&, int, const Queue&);
template void launch_gram<double>(const GramArgs&, int, const Queue&);

}  // namespace mergekernels
