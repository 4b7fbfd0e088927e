// row_rank: see rank_group.h. CUDA C++ because a row is ordered in shared memory by atomics and scans of its own size,
// up to what an SM holds (about 16,000 bfloat16 or float32 entries on an H100); Triton would sort it as a power of two.
// Longer rows take the same steps in global memory.
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

constexpr int kRankThreads = 512;
constexpr int kBlocksInMemory = 264;

struct BlockTeam {
  unsigned* sums;  // [kRankThreads / 32], shared

  template <class F>
  __device__ __forceinline__ void each(std::int64_t n, const F& f) {
    for (std::int64_t i = threadIdx.x; i < n; i += kRankThreads) f(i);
    __syncthreads();
  }
  __device__ __forceinline__ std::uint32_t add(std::uint32_t* at, std::uint32_t value) { return atomicAdd(at, value); }
  __device__ __forceinline__ void max(std::uint32_t* at, std::uint32_t value) {
    if (*at < value) atomicMax(at, value);
  }
  __device__ __forceinline__ void max(std::uint64_t* at, std::uint64_t value) {
    atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
  }
  __device__ __forceinline__ void scan(std::uint32_t* counts, std::int64_t n) {
    // Odd, so that threads that walk side by side meet no shared bank.
    const std::int64_t each = ((n + kRankThreads - 1) / kRankThreads) | 1;
    const std::int64_t begin = min(n, threadIdx.x * each), end = min(n, begin + each);
    unsigned own = 0;
    for (std::int64_t i = begin; i < end; ++i) own += counts[i];
    unsigned upto = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const unsigned other = __shfl_up_sync(kWholeWarp, upto, unsigned(offset));
      if (lane_id() >= offset) upto += other;
    }
    if (lane_id() == 31) sums[threadIdx.x / 32] = upto;
    __syncthreads();
    unsigned before = upto - own;
    for (unsigned w = 0; w < threadIdx.x / 32; ++w) before += sums[w];
    for (std::int64_t i = begin; i < end; ++i) {
      const unsigned count = counts[i];
      counts[i] = before;
      before += count;
    }
    __syncthreads();
  }
};

template <int kDType, class C, class Index>
__global__ void __launch_bounds__(kRankThreads, 1) rank_kernel(const __grid_constant__ RankArgs a) {
  extern __shared__ __align__(16) std::uint8_t chip[];
  __shared__ unsigned sums[kRankThreads / 32];
  BlockTeam team{sums};
  const Room<C, Index> room(a.room == nullptr ? chip : a.room + blockIdx.x * a.room_size, a.length);
  for (std::int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    rank_row<kDType>(a, room, row, team);
    __syncthreads();
  }
}

template <int kDType, class C>
void start_rank(const RankArgs& a, const Queue& queue) {
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  if (a.room != nullptr) {
    const unsigned grid = unsigned(std::min<std::int64_t>(a.rows, a.blocks));
    rank_kernel<kDType, C, std::uint32_t><<<grid, kRankThreads, 0, stream>>>(a);
    return;
  }
  const auto kernel = rank_kernel<kDType, C, std::uint16_t>;
  const int bytes = int(Room<C, std::uint16_t>::size(a.length));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "asking for shared memory",
        queue.device);
  kernel<<<unsigned(grid_size(a.rows, queue.device)), kRankThreads, std::size_t(bytes), stream>>>(a);
}

}  // namespace

template <class C>
RankRoom rank_room(std::int64_t rows, std::int64_t length, int device) {
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking for its memory",
        device);
  // What is static is taken off.
  if (length <= 65536 && Room<C, std::uint16_t>::size(length) + 256 <= limit) return {0, 0};
  return {Room<C, std::uint32_t>::size(length), int(std::min<std::int64_t>(rows, kBlocksInMemory))};
}

template <class C>
void launch_rank(const RankArgs& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  by_dtype<C>(dtype, [&](auto code) { start_rank<code.value, C>(a, queue); });
  after_launch("launching the ranks of rows", queue);
}

template RankRoom rank_room<float>(std::int64_t, std::int64_t, int);
template RankRoom rank_room<double>(std::int64_t, std::int64_t, int);
template void launch_rank<float>(const RankArgs&, int, const Queue&);
template void launch_rank<double>(const RankArgs&, int, const Queue&);

}  // namespace mergekernels
