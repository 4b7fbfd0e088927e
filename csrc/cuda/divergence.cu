// divergence: see divergence_group.h. CUDA C++ because exp and log must be the same operations as everywhere, in
// float64 and without contraction, and their sums have a fixed order.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

// A warp takes a canonical block of a row; a thread owns eight neighbouring lanes.
template <int kDType, class C>
__global__ void __launch_bounds__(kSmallBlock) divergence_kernel(const __grid_constant__ DivergenceArgs<C> a) {
  const int side = int(blockIdx.y);
  const std::int64_t step = std::int64_t(gridDim.x) * (kSmallBlock / 32);
  std::int64_t work = std::int64_t(blockIdx.x) * (kSmallBlock / 32) + threadIdx.x / 32;
  for (; work < a.rows * a.blocks; work += step) {
    const std::int64_t row = work / a.blocks, block = work % a.blocks;
    double lanes[kGroup] = {};
#pragma unroll 1
    for (int i = 0; i < kCanonicalBlock / kLanes; ++i) {
      const std::int64_t at = block * kCanonicalBlock + i * kLanes + lane_id() * kGroup;
      add_terms<kDType>(a, side, row, at, group_count(a.cols, at), lanes);
    }
    fold_warp(lanes);
    if (lane_id() == 0) a.sums[side * a.rows * a.blocks + work] = lanes[0];
  }
}

}  // namespace

template <class C>
void launch_divergence(const DivergenceArgs<C>& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int chunks = grid_size((a.rows * a.blocks + kSmallBlock / 32 - 1) / (kSmallBlock / 32), queue.device);
  const dim3 grid(unsigned(chunks), a.totals == nullptr ? 2u : 1u);
  by_dtype<C>(dtype, [&](auto code) {
    divergence_kernel<code.value><<<grid, kSmallBlock, 0, static_cast<cudaStream_t>(queue.stream)>>>(a);
  });
  after_launch("launching the divergence", queue);
}

template void launch_divergence(const DivergenceArgs<float>&, int, const Queue&);
template void launch_divergence(const DivergenceArgs<double>&, int, const Queue&);

}  // namespace mergekernels
