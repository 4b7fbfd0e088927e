// Functions that host and device code share.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MK_HD __host__ __device__ __forceinline__
#else
// Always inlined: an out-of-line copy compiled for one instruction set must not serve another.
#define MK_HD inline __attribute__((always_inline))
#endif

namespace mergekernels {

template <class To, class From>
MK_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace mergekernels
