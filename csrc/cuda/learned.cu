// Learned coefficients and masks: see learned_group.h. CUDA C++ for the sums: a tile of models shares one reading of
// the gradient, the base and the mask, and random groups are added up where their words are at hand, where Triton runs
// a program for each slot; the order of every addition is fixed. The merge inside a mask is bound by its exact
// functions on either; it is here so that a tensor on this backend needs no other.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

// Of the kernel whose sums lie in shared memory.
constexpr int kGroupedThreads = 64;

// A warp takes a canonical block and a tile; a thread owns eight neighbouring lanes.
template <int kDType, bool kMasked, class C>
__global__ void __launch_bounds__(kSmallBlock) seg_dot_kernel(const __grid_constant__ LearnedArgs<C> a) {
  const unsigned tiles = unsigned(num_dot_tiles(a.num_models));
  const int tile = int(blockIdx.x % tiles);
  const std::int64_t step = std::int64_t(gridDim.x / tiles) * (kSmallBlock / 32);
  std::int64_t block = std::int64_t(blockIdx.x / tiles) * (kSmallBlock / 32) + threadIdx.x / 32;
  for (; block < a.blocks; block += step) {
    double lanes[kDotModels][kGroup] = {};
#pragma unroll 1
    for (int row = 0; row < kCanonicalBlock / kLanes; ++row) {
      const std::int64_t first = block * kCanonicalBlock + row * kLanes + lane_id() * kGroup;
      add_dots<kDType, kMasked>(a, tile, first, group_count(a.n, first), lanes);
    }
#pragma unroll
    for (int t = 0; t < kDotModels; ++t) {
      fold_warp(lanes[t]);
      const int m = tile * kDotModels + t;
      if (lane_id() == 0 && m < a.num_models) a.sums[m * a.blocks + block] = lanes[t][0];
    }
  }
}

// The same with groups. Each thread reads and writes sums of its own, 8 bytes apart from its neighbour's: no conflicts,
// whatever the groups, and nothing to wait for.
template <int kDType, bool kMasked, class C>
__global__ void __launch_bounds__(kGroupedThreads, 6) grouped_dot_kernel(const __grid_constant__ LearnedArgs<C> a) {
  __shared__ double waiting[kTileSlots * kGroup * kGroupedThreads];
  double* const mine = waiting + threadIdx.x;
  const unsigned tiles = unsigned(num_slot_tiles(a.num_models, a.groups));
  const SlotTile tile = slot_tile_at(a.num_models, a.groups, int(blockIdx.x % tiles));
  const int slots = tile.models * tile.groups;
  const std::int64_t step = std::int64_t(gridDim.x / tiles) * (kGroupedThreads / 32);
  std::int64_t block = std::int64_t(blockIdx.x / tiles) * (kGroupedThreads / 32) + threadIdx.x / 32;
  for (; block < a.blocks; block += step) {
    for (int i = 0; i < slots * kGroup; ++i) mine[i * kGroupedThreads] = 0.0;
#pragma unroll 1
    for (int row = 0; row < kCanonicalBlock / kLanes; ++row) {
      const std::int64_t first = block * kCanonicalBlock + row * kLanes + lane_id() * kGroup;
      add_grouped_dots<kDType, kMasked>(a, tile, first, group_count(a.n, first), mine, kGroupedThreads);
    }
#pragma unroll 1
    for (int slot = 0; slot < slots; ++slot) {
      double lanes[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) lanes[j] = mine[(slot * kGroup + j) * kGroupedThreads];
      fold_warp(lanes);
      if (lane_id() == 0) a.sums[slot_of(a, tile, slot) * a.blocks + block] = lanes[0];
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kSmallBlock, 4) mask_sum_kernel(const __grid_constant__ LearnedArgs<C> a) {
  const std::int64_t step = std::int64_t(gridDim.x) * (kSmallBlock / 32);
  std::int64_t block = std::int64_t(blockIdx.x) * (kSmallBlock / 32) + threadIdx.x / 32;
  for (; block < a.blocks; block += step) {
    double lanes[kGroup] = {};
#pragma unroll 1
    for (int row = 0; row < kCanonicalBlock / kLanes; ++row) {
      const std::int64_t first = block * kCanonicalBlock + row * kLanes + lane_id() * kGroup;
      add_mask(a, first, group_count(a.n, first), lanes);
    }
    fold_warp(lanes);
    if (lane_id() == 0) a.sums[block] = lanes[0];
  }
}

template <int kDType, bool kSlope, class C>
__global__ void __launch_bounds__(kSmallBlock, sizeof(C) == 8 ? 3 : 4)
    mask_merge_kernel(const __grid_constant__ LearnedArgs<C> a) {
  const std::int64_t step = std::int64_t(gridDim.x) * kSmallBlock * kGroup;
  std::int64_t first = (std::int64_t(blockIdx.x) * kSmallBlock + threadIdx.x) * kGroup;
  for (; first < a.n; first += step) mask_group<kDType, kSlope>(a, first, group_count(a.n, first));
}

// Blocks of `threads` whose warps take a canonical block each.
unsigned chunks(std::int64_t blocks, int threads, const Queue& queue) {
  return unsigned(grid_size((blocks + threads / 32 - 1) / (threads / 32), queue.device));
}

template <int kDType, bool kMasked, class C>
void start_dots(const LearnedArgs<C>& a, const Queue& queue) {
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  if (a.groups == 1) {
    const unsigned grid = chunks(a.blocks, kSmallBlock, queue) * unsigned(num_dot_tiles(a.num_models));
    seg_dot_kernel<kDType, kMasked><<<grid, kSmallBlock, 0, stream>>>(a);
  } else {
    const unsigned tiles = unsigned(num_slot_tiles(a.num_models, a.groups));
    const unsigned grid = chunks(a.blocks, kGroupedThreads, queue) * tiles;
    grouped_dot_kernel<kDType, kMasked><<<grid, kGroupedThreads, 0, stream>>>(a);
  }
}

}  // namespace

template <class C>
void launch_seg_dot(const LearnedArgs<C>& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  by_dtype<C>(dtype, [&](auto code) {
    if (a.logits != nullptr) {
      start_dots<code.value, true>(a, queue);
    } else {
      start_dots<code.value, false>(a, queue);
    }
  });
  after_launch("launching seg_dot", queue);
}

template <class C>
void launch_mask_sum(const LearnedArgs<C>& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  mask_sum_kernel<<<chunks(a.blocks, kSmallBlock, queue), kSmallBlock, 0, static_cast<cudaStream_t>(queue.stream)>>>(a);
  after_launch("launching the sum of a mask", queue);
}

template <class C>
void launch_mask_merge(const LearnedArgs<C>& a, bool slope, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const auto grid = unsigned(grid_size((a.n + kSmallBlock * kGroup - 1) / (kSmallBlock * kGroup), queue.device));
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  by_dtype<C>(dtype, [&](auto code) {
    if (slope) {
      mask_merge_kernel<code.value, true><<<grid, kSmallBlock, 0, stream>>>(a);
    } else {
      mask_merge_kernel<code.value, false><<<grid, kSmallBlock, 0, stream>>>(a);
    }
  });
  after_launch("launching a merge inside a mask", queue);
}

template void launch_seg_dot(const LearnedArgs<float>&, int, const Queue&);
template void launch_seg_dot(const LearnedArgs<double>&, int, const Queue&);
template void launch_mask_sum(const LearnedArgs<float>&, const Queue&);
template void launch_mask_sum(const LearnedArgs<double>&, const Queue&);
template void launch_mask_merge(const LearnedArgs<float>&, bool, int, const Queue&);
template void launch_mask_merge(const LearnedArgs<double>&, bool, int, const Queue&);

}  // namespace mergekernels
