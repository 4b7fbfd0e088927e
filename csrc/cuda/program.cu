// program: the general fused pass, for every feature of ops/program.py; plain programs run in stream.cu.
// CUDA C++ because a program is data here: one kernel per dtype walks rules, votes and merges by uniform branches,
// where a kernel with compile-time switches would be compiled anew for each of thousands of combinations; masks of up
// to 64 models wait in shared memory between the walks.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/tally.cuh"

namespace mergekernels {

namespace {

template <int kDType, class C>
__global__ void __launch_bounds__(kSmallBlock, 2) program_kernel(const __grid_constant__ ProgramArgs<C> a) {
  __shared__ std::uint8_t kept[kMaxModels * kSmallBlock];
  __shared__ unsigned counts[kMaxModels + 3];
  BlockTally<true> tally(counts, a.counters, a.slots, a.num_inputs);
  tally.begin();
  const std::int64_t step = std::int64_t(gridDim.x) * kSmallBlock * kGroup;
  for (std::int64_t start = std::int64_t(blockIdx.x) * kSmallBlock * kGroup; start < a.n; start += step) {
    const std::int64_t first = start + std::int64_t(threadIdx.x) * kGroup;
    program_group<kDType>(a, first, group_count(a.n, first), kept + threadIdx.x, kSmallBlock, tally);
  }
  tally.end();
}

}  // namespace

template <class C>
void launch_program(const ProgramArgs<C>& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int grid = grid_size((a.n + kSmallBlock * kGroup - 1) / (kSmallBlock * kGroup), queue.device);
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  by_dtype<C>(dtype, [&](auto code) { program_kernel<code.value, C><<<grid, kSmallBlock, 0, stream>>>(a); });
  after_launch("launching a program", queue);
}

template void launch_program(const ProgramArgs<float>&, int, const Queue&);
template void launch_program(const ProgramArgs<double>&, int, const Queue&);

}  // namespace mergekernels
