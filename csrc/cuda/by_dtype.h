// From a dtype code at run time to one at compile time, for the launches on the device and their stand-ins on the host.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/dtype.h"

namespace mergekernels {

// Calls `start` with the dtype code as a constant. float64 is computed in float64, everything else in float32.
template <class C, class Start>
void by_dtype(int dtype, const Start& start) {
  if constexpr (sizeof(C) == 8) {
    if (dtype != kF64) throw std::invalid_argument("float64 arithmetic takes float64 inputs");
    start(std::integral_constant<int, kF64>{});
  } else {
    switch (dtype) {
      case kBF16:
        start(std::integral_constant<int, kBF16>{});
        break;
      case kF16:
        start(std::integral_constant<int, kF16>{});
        break;
      case kF32:
        start(std::integral_constant<int, kF32>{});
        break;
      default:
        throw std::invalid_argument("float64 inputs are computed in float64");
    }
  }
}

}  // namespace mergekernels
