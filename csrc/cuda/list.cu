// stream over a list: see list_group.h. CUDA C++ because hundreds of norms and biases, each with a program and pointers
// of its own, become one launch over a table; in Triton every tensor would be a launch, which takes longer than its
// work.
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

template <int kDType, class C>
__global__ void __launch_bounds__(kTileThreads, 2) list_kernel(const __grid_constant__ ListArgs<C> a) {
  __shared__ std::uint8_t kept[kMaxModels * kTileThreads];
  for (std::int64_t tile = blockIdx.x; tile < a.num_tiles; tile += gridDim.x)
    list_group<kDType>(a, tile, int(threadIdx.x), kept + threadIdx.x, kTileThreads);
}

}  // namespace

template <class C>
void launch_list(const ListArgs<C>& a, int dtype, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int grid = grid_size(a.num_tiles, queue.device);
  by_dtype<C>(dtype, [&](auto code) {
    list_kernel<code.value><<<grid, kTileThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(a);
  });
  after_launch("launching a list of tensors", queue);
}

template void launch_list(const ListArgs<float>&, int, const Queue&);
template void launch_list(const ListArgs<double>&, int, const Queue&);

}  // namespace mergekernels
