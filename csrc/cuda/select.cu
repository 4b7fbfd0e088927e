// select: one counting pass of all searches. Reads each input once (of joint keys twice, from the cache) and writes
// counts and the few entries inside the intervals. CUDA C++ because entries are appended by warp-wide offsets and one
// atomic per warp, and bins are counted in shared memory; Triton has neither.
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

// Counts what is ahead, and appends what is inside: one atomic per warp and model that has any. The order of the
// entries varies from run to run, their set does not.
struct Collect {
  const SweepArgs& a;
  unsigned* ahead;  // [count], shared
  std::int64_t first;

  __device__ __forceinline__ void bad(unsigned long long* count, unsigned mask) {
    if (mask == 0) return;
    add_bad(count, first_of(a, count), count_bits(mask), flat_index(a.piece, first + lowest_bit(mask)) + a.offset);
  }
  __device__ __forceinline__ void base(unsigned mask) { bad(bad_of_base(a), mask); }
  __device__ __forceinline__ void operator()(int s, const Verdict& v) {
    const unsigned before = warp_sum(unsigned(count_bits(v.ahead)));
    if (lane_id() == 0 && before != 0) atomicAdd(ahead + s, before);
    bad(bad_of(a, s), v.bad);
    if (__any_sync(kWholeWarp, v.inside != 0) == 0) return;
    const unsigned mine = unsigned(count_bits(v.inside));
    unsigned upto = mine;
    for (int offset = 1; offset < 32; offset *= 2) {
      const unsigned other = __shfl_up_sync(kWholeWarp, upto, unsigned(offset));
      if (lane_id() >= offset) upto += other;
    }
    unsigned long long place = 0;
    if (lane_id() == 31) place = atomicAdd(inside_of(a, s), static_cast<unsigned long long>(upto));
    place = __shfl_sync(kWholeWarp, place, 31) + upto - mine;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if ((v.inside >> j & 1u) == 0) continue;
      if (place < static_cast<unsigned long long>(a.capacity)) {
        const std::int64_t at = (a.begin + s) * a.capacity + static_cast<std::int64_t>(place);
        a.ordinals[at] = static_cast<std::int64_t>(v.ordinal[j]);
        a.indices[at] = flat_index(a.piece, first + j) + a.offset;
      }
      ++place;
    }
  }
};

template <int kDType, bool kJoint, class C>
__global__ void __launch_bounds__(kThreads, kJoint && sizeof(C) == 8 ? 1 : 2)
    sweep_kernel(const __grid_constant__ SweepArgs a) {
  __shared__ unsigned ahead[kMaxSearches];
  for (int s = int(threadIdx.x); s < a.count; s += kThreads) ahead[s] = 0;
  __syncthreads();
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads * kGroup;
  for (std::int64_t start = std::int64_t(blockIdx.x) * kThreads * kGroup; start < a.n; start += step) {
    const std::int64_t first = start + std::int64_t(threadIdx.x) * kGroup;
    Collect collect{a, ahead, first};
    sweep_group<kDType, kJoint, C>(a, first, group_count(a.n, first), collect);
  }
  __syncthreads();
  for (int s = int(threadIdx.x); s < a.count; s += kThreads)
    if (ahead[s] != 0) atomicAdd(ahead_of(a, s), static_cast<unsigned long long>(ahead[s]));
}

// One search per grid row: 4,096 bins in shared memory.
template <int kDType, bool kJoint, class C>
__global__ void __launch_bounds__(kThreads, kJoint ? 2 : 4) bins_kernel(const __grid_constant__ SweepArgs a) {
  __shared__ unsigned bins[kSelectBins];
  const int s = int(blockIdx.y);
  if (a.stage[s] == kStageLeftOut) return;
  for (int b = int(threadIdx.x); b < kSelectBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads * kGroup;
  for (std::int64_t start = std::int64_t(blockIdx.x) * kThreads * kGroup; start < a.n; start += step) {
    const std::int64_t first = start + std::int64_t(threadIdx.x) * kGroup;
    const Verdict v = judge_one<kDType, kJoint, C>(a, s, first, group_count(a.n, first));
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if ((v.inside >> j & 1u) != 0) atomicAdd(bins + ((v.ordinal[j] - a.lo[s]) >> a.shift[s]), 1u);
  }
  __syncthreads();
  for (int b = int(threadIdx.x); b < kSelectBins; b += kThreads)
    if (bins[b] != 0) atomicAdd(a.bins + (a.begin + s) * kSelectBins + b, static_cast<unsigned long long>(bins[b]));
}

template <int kDType, bool kJoint, class C>
void start_sweep(const SweepArgs& a, const Queue& queue) {
  const int grid = grid_size((a.n + kThreads * kGroup - 1) / (kThreads * kGroup), queue.device);
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  if (a.bins != nullptr) {
    const dim3 blocks(unsigned(grid), unsigned(a.count));
    bins_kernel<kDType, kJoint, C><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    sweep_kernel<kDType, kJoint, C><<<grid, kThreads, 0, stream>>>(a);
  }
}

}  // namespace

template <class C>
void launch_sweep(const SweepArgs& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  by_dtype<C>(dtype, [&](auto code) {
    if (is_joint(a)) {
      start_sweep<code.value, true, C>(a, queue);
    } else {
      start_sweep<code.value, false, C>(a, queue);
    }
  });
  after_launch("launching select", queue);
}

template void launch_sweep<float>(const SweepArgs&, int, const Queue&);
template void launch_sweep<double>(const SweepArgs&, int, const Queue&);

int num_devices(char* reason, int size) {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (size > 0) reason[0] = '\0';
  if (code == cudaSuccess) return count;
  cudaGetLastError();
  const std::string text = cudaGetErrorString(code);
  const std::size_t used = std::min<std::size_t>(text.size(), std::size_t(size) - 1);
  memcpy(reason, text.data(), used);
  reason[used] = '\0';
  return 0;
}

#define MK_TEXT_OF(x) #x
#define MK_TEXT(x) MK_TEXT_OF(x)
const char* toolkit() { return "CUDA " MK_TEXT(__CUDACC_VER_MAJOR__) "." MK_TEXT(__CUDACC_VER_MINOR__); }

}  // namespace mergekernels
