// Page-aligned memory that is reused between tiles.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>

namespace mergekernels {

class Buffer {
 public:
  explicit Buffer(std::int64_t nbytes) : data_(nullptr), nbytes_(nbytes) {
    if (nbytes < 0) throw std::invalid_argument("a buffer of a negative size");
    constexpr std::int64_t page = 4096;
    data_ = std::aligned_alloc(page, static_cast<std::size_t>(((nbytes + page - 1) / page + (nbytes == 0)) * page));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::int64_t nbytes() const { return nbytes_; }

 private:
  void* data_;
  std::int64_t nbytes_;
};

}  // namespace mergekernels
