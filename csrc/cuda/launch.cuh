// What the kernels' files share: errors, the current device, grids, sums over a warp.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/by_dtype.h"
#include "cuda/launch.h"

namespace mergekernels {

constexpr int kThreads = 256;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

inline void check(cudaError_t code, const char* what, int device) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed on CUDA device " + std::to_string(device) + ": " +
                           cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")");
}

// Makes a device current for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "asking for the current device", device);
    if (previous_ != device) check(cudaSetDevice(device), "choosing the device", device);
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Blocks for `work` units of one block each: enough to fill the device a few times over, so that counters are flushed
// rarely.
inline int grid_size(std::int64_t work, int device) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking for its size", device);
  return int(std::max<std::int64_t>(1, std::min<std::int64_t>(work, std::int64_t(processors) * 16)));
}

inline void after_launch(const char* what, const Queue& queue) { check(cudaGetLastError(), what, queue.device); }

__device__ __forceinline__ unsigned warp_sum(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kWholeWarp, value);
#else
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kWholeWarp, value, offset);
  return value;
#endif
}

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32); }

// Elements of the group that begins at `first` which exist.
__device__ __forceinline__ int group_count(std::int64_t n, std::int64_t first) {
  const std::int64_t left = n - first;
  return left >= kGroup ? kGroup : left > 0 ? int(left) : 0;
}

__device__ __forceinline__ void add_bad(unsigned long long* count, unsigned long long* first, int number,
                                        std::int64_t index) {
  atomicAdd(count, static_cast<unsigned long long>(number));
  atomicMin(reinterpret_cast<long long*>(first), static_cast<long long>(index));
}

}  // namespace mergekernels
