// small_svd, small_eigh: see jacobi_group.h. A = U diag(sigma) V^T by one-sided, A = V diag(lambda) V^T by two-sided
// Jacobi, after a pivoted QR. Reads p s numbers and writes p s + s s + s for an SVD, reads and writes s s (and reads
// them again from the cache) for an eigenproblem; about 6 s^2 (p + s) flops a sweep.
// CUDA C++ because a matrix stays in shared memory over hundreds of dependent rounds of disjoint pairs, and because
// matrices of unequal shapes come in one launch; neither can be said in Triton.
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

constexpr int kMostThreads = 512;

struct WholeBlock {
  int size;
  template <class F>
  __device__ __forceinline__ void all(const F& f) {
    f(int(threadIdx.x));
    __syncthreads();
  }
};

template <bool kEigh, class C>
__global__ void __launch_bounds__(kMostThreads, 1) jacobi_kernel(const __grid_constant__ JacobiArgs<C> a) {
  extern __shared__ __align__(16) std::uint8_t chip[];
  WholeBlock team{int(blockDim.x)};
  const JacobiItem<C> item = a.items[blockIdx.x];
  jacobi_item(kEigh, item, chip, team);
}

template <bool kEigh, class C>
void start_jacobi(const JacobiArgs<C>& a, int threads, int bytes, const Queue& queue) {
  const auto kernel = jacobi_kernel<kEigh, C>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "asking for shared memory",
        queue.device);
  kernel<<<unsigned(a.count), unsigned(threads), std::size_t(bytes), static_cast<cudaStream_t>(queue.stream)>>>(a);
}

}  // namespace

int jacobi_limit(int device) {
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking for its memory",
        device);
  return limit;
}

template <class C>
void launch_jacobi(bool eigh, const JacobiArgs<C>& a, int threads, int bytes, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  if (eigh) {
    start_jacobi<true>(a, threads, bytes, queue);
  } else {
    start_jacobi<false>(a, threads, bytes, queue);
  }
  after_launch("launching small decompositions", queue);
}

template void launch_jacobi(bool, const JacobiArgs<float>&, int, int, const Queue&);
template void launch_jacobi(bool, const JacobiArgs<double>&, int, int, const Queue&);

}  // namespace mergekernels
