// reduce: exact sums over canonical blocks of what a program computes, in the fixed order of lanes and trees.
// CUDA C++ because the order is fixed to the addition: a warp owns a block, a thread eight neighbouring lanes with
// 16-byte loads, and the tree over lanes runs in registers; Triton's reductions promise no order.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

// A warp takes a canonical block of one slot; slots lie next to each other in the grid, so that they share the inputs
// in the cache.
template <int kDType, bool kMerged, class C>
__global__ void __launch_bounds__(kSmallBlock, kMerged || sizeof(C) == 8 ? 2 : 4)
    reduce_kernel(const __grid_constant__ ReduceArgs<C> a) {
  __shared__ std::uint8_t kept[kMaxModels * kSmallBlock];
  // Out of the way of the program's own registers.
  __shared__ double waiting[kGroup * kSmallBlock];
  const int slot = int(blockIdx.x % unsigned(a.num_slots));
  if (is_merged(a.quantity[slot]) != kMerged) return;
  const std::int64_t step = std::int64_t(gridDim.x / unsigned(a.num_slots)) * (kSmallBlock / 32);
  std::int64_t block = std::int64_t(blockIdx.x / unsigned(a.num_slots)) * (kSmallBlock / 32) + threadIdx.x / 32;
  for (; block < a.blocks; block += step) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) waiting[j * kSmallBlock + threadIdx.x] = 0.0;
#pragma unroll 1
    for (int row = 0; row < kCanonicalBlock / kLanes; ++row) {
      const std::int64_t first = block * kCanonicalBlock + row * kLanes + lane_id() * kGroup;
      double v[kGroup];
      slot_numbers<kDType, kMerged>(a, slot, first, group_count(a.program.n, first), kept + threadIdx.x, kSmallBlock,
                                    v);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) waiting[j * kSmallBlock + threadIdx.x] += v[j];
    }
    double lanes[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) lanes[j] = waiting[j * kSmallBlock + threadIdx.x];
    fold_warp(lanes);
    if (lane_id() == 0) a.sums[slot * a.blocks + block] = lanes[0];
  }
}

}  // namespace

template <class C>
void launch_reduce(const ReduceArgs<C>& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  bool merged = false, own = false;
  for (int s = 0; s < a.num_slots; ++s) (is_merged(a.quantity[s]) ? merged : own) = true;
  const int chunks = grid_size((a.blocks + kSmallBlock / 32 - 1) / (kSmallBlock / 32), queue.device);
  const unsigned grid = unsigned(chunks) * unsigned(a.num_slots);
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  by_dtype<C>(dtype, [&](auto code) {
    if (own) reduce_kernel<code.value, false><<<grid, kSmallBlock, 0, stream>>>(a);
    if (merged) reduce_kernel<code.value, true><<<grid, kSmallBlock, 0, stream>>>(a);
  });
  after_launch("launching reduce", queue);
}

template void launch_reduce(const ReduceArgs<float>&, int, const Queue&);
template void launch_reduce(const ReduceArgs<double>&, int, const Queue&);

}  // namespace mergekernels
