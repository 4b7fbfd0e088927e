// What every thread of a call needs: aligned scratch, and the default floating-point environment.
#pragma once

#include <cfenv>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mergekernels {

class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) {
    const std::int64_t align = bytes < kHugePage * 2 ? 64 : kHugePage;
    const auto size = static_cast<std::size_t>((bytes + 64 + align - 1) / align * align);
    data_ = std::aligned_alloc(static_cast<std::size_t>(align), size);
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
    // Of so much memory most of the time would go into faults of small pages. Advice: that it fails is no matter.
    if (align == kHugePage) madvise(data_, size, MADV_HUGEPAGE);
#endif
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  static constexpr std::int64_t kHugePage = 2 << 20;
  void* data_;
};

// Rounding to nearest, subnormals kept, whatever the calling thread has set.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace mergekernels
