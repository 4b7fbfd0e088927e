#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

// Counts in shared memory, one addition per warp; flushed once per block.
struct BlockTally {
  unsigned* counts;  // [K + 3]
  unsigned long long* slot;
  int num_models;

  __device__ __forceinline__ void add(int i, unsigned count) {
    if (lane_id() == 0 && count != 0) atomicAdd(counts + i, count);
  }
  __device__ __forceinline__ void kept(int m, int count) { add(m, warp_sum(unsigned(count))); }
  __device__ __forceinline__ void votes(int conflicts, int positive, int negative) {
    // At most 256 each in a warp: three sums in one.
    const unsigned sum = warp_sum(unsigned(conflicts) | unsigned(positive) << 10 | unsigned(negative) << 20);
    add(counter_conflicts(num_models), sum & 0x3FFu);
    add(counter_conflicts(num_models) + 1, sum >> 10 & 0x3FFu);
    add(counter_conflicts(num_models) + 2, sum >> 20);
  }
  __device__ __forceinline__ void nonfinite(int source, int count, std::int64_t first) {
    add_bad(slot + counter_bad(num_models, source), slot + counter_first(num_models, source), count, first);
  }
};

template <int kDType, class C, bool kStats>
__global__ void __launch_bounds__(kThreads) stream_kernel(const __grid_constant__ StreamArgs<C> a) {
  __shared__ unsigned counts[kMaxModels + 3];
  const int used = a.num_models + 3;
  BlockTally tally{counts, nullptr, a.num_models};
  if (kStats) {
    tally.slot = a.counters + std::int64_t(blockIdx.x % unsigned(a.slots)) * num_counters(a.num_models);
    for (int i = int(threadIdx.x); i < used; i += kThreads) counts[i] = 0;
    __syncthreads();
  }
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads * kGroup;
  for (std::int64_t start = std::int64_t(blockIdx.x) * kThreads * kGroup; start < a.n; start += step) {
    const std::int64_t first = start + std::int64_t(threadIdx.x) * kGroup;
    stream_group<kDType, kStats>(a, first, group_count(a.n, first), tally);
  }
  if (kStats) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < used; i += kThreads)
      if (counts[i] != 0) atomicAdd(tally.slot + i, static_cast<unsigned long long>(counts[i]));
  }
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
    // Strides 128 to 8 are other threads', 4 to 1 this one's.
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) lanes[j] = lanes[j] + __shfl_down_sync(kWholeWarp, lanes[j], unsigned(offset));
    }
#pragma unroll
    for (int stride = kGroup / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int j = 0; j < stride; ++j) lanes[j] = lanes[j] + lanes[j + stride];
    }
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
