// Counts of a pass: in shared memory, one addition per warp; flushed once per block.
#pragma once

#include "cuda/launch.cuh"

namespace mergekernels {

// counters: [slots][3 K + 7], see counter_* in stream_group.h; nullptr for no statistics, where kOptional allows it.
template <bool kOptional>
class BlockTally {
 public:
  __device__ __forceinline__ BlockTally(unsigned* counts, unsigned long long* counters, int slots, int num_models)
      : counts_(counts), slot_(nullptr), num_models_(num_models) {
    if (counters != nullptr) slot_ = counters + std::int64_t(blockIdx.x % unsigned(slots)) * num_counters(num_models);
  }
  __device__ __forceinline__ void begin() {
    if (off()) return;
    for (int i = int(threadIdx.x); i < num_models_ + 3; i += int(blockDim.x)) counts_[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void end() {
    if (off()) return;
    __syncthreads();
    for (int i = int(threadIdx.x); i < num_models_ + 3; i += int(blockDim.x))
      if (counts_[i] != 0) atomicAdd(slot_ + i, static_cast<unsigned long long>(counts_[i]));
  }
  __device__ __forceinline__ void kept(int m, int count) {
    if (!off()) add(m, warp_sum(unsigned(count)));
  }
  __device__ __forceinline__ void votes(int conflicts, int positive, int negative) {
    if (off()) return;
    // At most 256 each in a warp: three sums in one.
    const unsigned sum = warp_sum(unsigned(conflicts) | unsigned(positive) << 10 | unsigned(negative) << 20);
    add(counter_conflicts(num_models_), sum & 0x3FFu);
    add(counter_conflicts(num_models_) + 1, sum >> 10 & 0x3FFu);
    add(counter_conflicts(num_models_) + 2, sum >> 20);
  }
  __device__ __forceinline__ void nonfinite(int source, int count, std::int64_t first) {
    if (off()) return;
    add_bad(slot_ + counter_bad(num_models_, source), slot_ + counter_first(num_models_, source), count, first);
  }

 private:
  __device__ __forceinline__ bool off() const { return kOptional && slot_ == nullptr; }
  __device__ __forceinline__ void add(int i, unsigned count) {
    if (lane_id() == 0 && count != 0) atomicAdd(counts_ + i, count);
  }
  unsigned* counts_;
  unsigned long long* slot_;
  int num_models_;
};

}  // namespace mergekernels
