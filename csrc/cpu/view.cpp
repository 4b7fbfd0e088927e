#include "cpu/view.h"

#include <algorithm>
#include <cstring>

namespace mergekernels {

Reader::Reader(const View& view) : data_(view.data), item_(itemsize(view.dtype)) {
  for (std::size_t k = 0; k < view.shape.size(); ++k) {
    const std::int64_t size = view.shape[k], stride = view.strides[k];
    if (size == 1) continue;
    if (!shape_.empty() && strides_.back() == size * stride) {
      shape_.back() *= size;
      strides_.back() = stride;
    } else {
      shape_.push_back(size);
      strides_.push_back(stride);
    }
  }
  if (shape_.empty()) {
    shape_.push_back(1);
    strides_.push_back(1);
  }
  contiguous_ = shape_.size() == 1 && strides_[0] == 1;
}

// Calls move(address, stride, dense offset, count) for each stretch along the last dimension.
template <class Move>
void Reader::walk(std::int64_t i, std::int64_t n, const Move& move) const {
  const std::size_t last = shape_.size() - 1;
  std::vector<std::int64_t> at(shape_.size());
  std::int64_t rest = i, offset = 0;
  for (std::size_t k = shape_.size(); k-- > 0;) {
    at[k] = rest % shape_[k];
    rest /= shape_[k];
    offset += at[k] * strides_[k];
  }
  for (std::int64_t done = 0; done < n;) {
    const std::int64_t count = std::min(n - done, shape_[last] - at[last]);
    move(data_ + offset * item_, strides_[last], done, count);
    done += count;
    at[last] += count;
    offset += count * strides_[last];
    for (std::size_t k = last; k > 0 && at[k] == shape_[k]; --k) {
      offset += strides_[k - 1] - shape_[k] * strides_[k];
      at[k] = 0;
      ++at[k - 1];
    }
  }
}

namespace {

template <class T>
void gather_stretch(const char* from, std::int64_t stride, char* dense, std::int64_t n) {
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(dense);
  for (std::int64_t j = 0; j < n; ++j) target[j] = source[j * stride];
}

template <class T>
void scatter_stretch(char* to, std::int64_t stride, const char* dense, std::int64_t n) {
  T* target = reinterpret_cast<T*>(to);
  const T* source = reinterpret_cast<const T*>(dense);
  for (std::int64_t j = 0; j < n; ++j) target[j * stride] = source[j];
}

}  // namespace

void Reader::gather(std::int64_t i, std::int64_t n, void* dense) const {
  char* target = static_cast<char*>(dense);
  walk(i, n, [&](const char* from, std::int64_t stride, std::int64_t done, std::int64_t count) {
    char* to = target + done * item_;
    if (stride == 1) {
      std::memcpy(to, from, static_cast<std::size_t>(count * item_));
    } else if (item_ == 2) {
      gather_stretch<std::uint16_t>(from, stride, to, count);
    } else if (item_ == 4) {
      gather_stretch<std::uint32_t>(from, stride, to, count);
    } else {
      gather_stretch<std::uint64_t>(from, stride, to, count);
    }
  });
}

void Reader::scatter(std::int64_t i, std::int64_t n, const void* dense) const {
  const char* source = static_cast<const char*>(dense);
  walk(i, n, [&](char* to, std::int64_t stride, std::int64_t done, std::int64_t count) {
    const char* from = source + done * item_;
    if (stride == 1) {
      std::memcpy(to, from, static_cast<std::size_t>(count * item_));
    } else if (item_ == 2) {
      scatter_stretch<std::uint16_t>(to, stride, from, count);
    } else if (item_ == 4) {
      scatter_stretch<std::uint32_t>(to, stride, from, count);
    } else {
      scatter_stretch<std::uint64_t>(to, stride, from, count);
    }
  });
}

}  // namespace mergekernels
