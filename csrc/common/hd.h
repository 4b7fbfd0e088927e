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

// Functions of a team of threads, which a host and a device compile.
#if defined(__CUDACC__)
#define MK_BLOCK __device__ __forceinline__
#else
#define MK_BLOCK inline
#endif

// Loops that must be unrolled (so that arrays live in registers), loops whose next step is to be read ahead, and loops
// that must not be unrolled.
#if defined(__CUDACC__)
#define MK_UNROLL _Pragma("unroll")
#define MK_TWICE _Pragma("unroll 2")
#define MK_ROLLED _Pragma("unroll 1")
#else
#define MK_UNROLL
#define MK_TWICE
#define MK_ROLLED
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
