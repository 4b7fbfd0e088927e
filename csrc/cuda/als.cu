// cp_als: see als_group.h and common/als_sweeps.h. One block for each start of each module; a sweep reads the cores
// twice, from shared memory or from the cache, and takes 4 R c (p + q) flops, and about 3 (p + q) c^2 for Grams and
// solutions.
// CUDA C++ because the state of a problem stays in shared memory over hundreds of dependent steps, with decisions of
// its own in between, which cannot be said in Triton.
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

struct WholeBlock {
  int size;
  template <class F>
  __device__ __forceinline__ void all(const F& f) {
    f(int(threadIdx.x));
    __syncthreads();
  }
};

__global__ void __launch_bounds__(kAlsMostThreads, 1) als_kernel(const __grid_constant__ AlsArgs a) {
  extern __shared__ __align__(16) double als_chip[];
  const AlsItem item = a.items[blockIdx.x];
  als_item(a, item, als_chip, WholeBlock{int(blockDim.x)});
}

}  // namespace

void launch_als(const AlsArgs& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const auto bytes = std::size_t(als_room(a.shape, a.far != 0));
  check(cudaFuncSetAttribute(als_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "asking for shared memory", queue.device);
  als_kernel<<<unsigned(a.count), unsigned(als_threads(a.shape)), bytes, static_cast<cudaStream_t>(queue.stream)>>>(a);
  after_launch("launching least squares", queue);
}

}  // namespace mergekernels
