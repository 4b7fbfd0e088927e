// What every thread of a call needs: aligned scratch, and the default floating-point environment.
#pragma once

#include <cfenv>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace mergekernels {

class Scratch {
 public:
  explicit Scratch(std::int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64 + 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
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
