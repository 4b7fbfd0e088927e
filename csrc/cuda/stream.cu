#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/tally.cuh"

namespace mergekernels {

namespace {

template <int kDType, class C, bool kStats>
__global__ void __launch_bounds__(kThreads, sizeof(C) == 8 ? 1 : 2)
    stream_kernel(const __grid_constant__ StreamArgs<C> a) {
  __shared__ unsigned counts[kMaxModels + 3];
  BlockTally<!kStats> tally(counts, kStats ? a.counters : nullptr, a.slots, a.num_models);
  tally.begin();
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads * kGroup;
  for (std::int64_t start = std::int64_t(blockIdx.x) * kThreads * kGroup; start < a.n; start += step) {
    const std::int64_t first = start + std::int64_t(threadIdx.x) * kGroup;
    stream_group<kDType, kStats>(a, first, group_count(a.n, first), tally);
  }
  tally.end();
}

// A warp takes a canonical block: a thread owns eight neighbouring lanes, a row of 256 elements is one step.
template <int kDType, class C>
__global__ void __launch_bounds__(kThreads) block_sums_kernel(const __grid_constant__ NormArgs<C> a) {
  const int m = int(blockIdx.y);
  const std::int64_t step = std::int64_t(gridDim.x) * (kThreads / 32);
  for (std::int64_t block = std::int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; block < a.blocks;
       block += step) {
    double lanes[kGroup] = {};
    for (int row = 0; row < kCanonicalBlock / kLanes; ++row) {
      const std::int64_t first = block * kCanonicalBlock + row * kLanes + lane_id() * kGroup;
      add_squares<kDType>(a, m, first, group_count(a.n, first), lanes);
    }
    fold_warp(lanes);
    if (lane_id() == 0) a.sums[m * a.blocks + block] = lanes[0];
  }
}

template <int kDType, class C>
void start_stream(const StreamArgs<C>& a, const Queue& queue) {
  const int grid = grid_size((a.n + kThreads * kGroup - 1) / (kThreads * kGroup), queue.device);
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  if (a.counters != nullptr) {
    stream_kernel<kDType, C, true><<<grid, kThreads, 0, stream>>>(a);
  } else {
    stream_kernel<kDType, C, false><<<grid, kThreads, 0, stream>>>(a);
  }
}

template <int kDType, class C>
void start_sums(const NormArgs<C>& a, const Queue& queue) {
  const int grid = grid_size((a.blocks + kThreads / 32 - 1) / (kThreads / 32), queue.device);
  const dim3 blocks(unsigned(grid), unsigned(a.num_models));
  block_sums_kernel<kDType, C><<<blocks, kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(a);
}

}  // namespace

template <class C>
void launch_stream(const StreamArgs<C>& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  by_dtype<C>(dtype, [&](auto code) { start_stream<code.value>(a, queue); });
  after_launch("launching stream", queue);
}

template <class C>
void launch_block_sums(const NormArgs<C>& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  by_dtype<C>(dtype, [&](auto code) { start_sums<code.value>(a, queue); });
  after_launch("launching the sums of squares", queue);
}

template void launch_stream(const StreamArgs<float>&, int, const Queue&);
template void launch_stream(const StreamArgs<double>&, int, const Queue&);
template void launch_block_sums(const NormArgs<float>&, int, const Queue&);
template void launch_block_sums(const NormArgs<double>&, int, const Queue&);

}  // namespace mergekernels
