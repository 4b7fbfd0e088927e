// mttkrp: see mttkrp_group.h. P = A V and S = B^T U of all modules in one launch, then the products with B or A, into
// which the gather of C by task is fused, or the sums over tasks. Reads a stack once for every 64 columns of the
// factors, 2 R c (m + n) flops. CUDA C++ because modules of unequal shapes share a launch and sums of 16 products go on
// in double, for a bound that does not grow with the sizes.
#include "cuda/launch.cuh"

namespace mergekernels {

namespace {

template <class C>
struct OwnBlock {
  int size;
  ThinOwn<C> own;
  template <class F>
  __device__ __forceinline__ void all(const F& f) {
    f(int(threadIdx.x), own);
    __syncthreads();
  }
};

template <class C>
__global__ void __launch_bounds__(256) mttkrp_thin_kernel(const __grid_constant__ ThinArgs<C> a) {
  __shared__ ThinRoom<C> room;
  const int tile = int(blockIdx.x);
  const ThinItem<C> item = a.items[item_of(a.items, a.count, tile)];
  OwnBlock<C> team;
  team.size = int(blockDim.x);
  thin_tile(a, item, tile - item.first, room, team);
}

__global__ void mttkrp_task_kernel(const __grid_constant__ TaskArgs a) {
  const std::int64_t e = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e < a.elements) task_sum(a, e);
}

}  // namespace

template <class C>
void launch_thin(const ThinArgs<C>& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int threads = kThinRows / 4 * thin_across(a.width);
  mttkrp_thin_kernel<C><<<unsigned(a.tiles), unsigned(threads), 0, static_cast<cudaStream_t>(queue.stream)>>>(a);
  after_launch("launching thin products", queue);
}

template void launch_thin(const ThinArgs<float>&, const Queue&);
template void launch_thin(const ThinArgs<double>&, const Queue&);

void launch_task_sums(const TaskArgs& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const std::int64_t blocks = (a.elements + kThreads - 1) / kThreads;
  mttkrp_task_kernel<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(a);
  after_launch("launching sums over tasks", queue);
}

}  // namespace mergekernels
