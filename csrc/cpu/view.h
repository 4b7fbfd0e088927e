// Strided tensors: contiguous ones are used in place, others are gathered and scattered in small runs.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace mergekernels {

struct View {
  char* data = nullptr;
  int dtype = 0;
  int cast = -1;
  std::vector<std::int64_t> shape, strides;  // strides in elements
};

class Reader {
 public:
  explicit Reader(const View& view);

  bool contiguous() const { return contiguous_; }
  int item() const { return item_; }
  char* at(std::int64_t i) const { return data_ + i * item_; }

  // Copies elements i .. i + n - 1 of the row-major order to or from `dense`.
  void gather(std::int64_t i, std::int64_t n, void* dense) const;
  void scatter(std::int64_t i, std::int64_t n, const void* dense) const;

 private:
  template <class Move>
  void walk(std::int64_t i, std::int64_t n, const Move& move) const;

  char* data_;
  int item_;
  bool contiguous_;
  std::vector<std::int64_t> shape_, strides_;  // dimensions merged where they can be; never empty
};

}  // namespace mergekernels
