// A short-lived team of threads: no pool, no global state, safe after fork.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mergekernels {

// Runs body(begin, end) over [0, n) in `threads` contiguous chunks that start at multiples of `grain`. The caller takes
// the first chunk. Rethrows the first exception after all threads have ended.
template <class Body>
void parallel_ranges(std::int64_t n, std::int64_t grain, int threads, const Body& body) {
  const std::int64_t grains = (n + grain - 1) / grain;
  const std::int64_t team = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, grains));
  if (team == 1) {
    if (n > 0) body(std::int64_t(0), n);
    return;
  }
  std::mutex mutex;
  std::exception_ptr failure;
  const auto run = [&](std::int64_t t) {
    const std::int64_t begin = grains * t / team * grain;
    const std::int64_t end = std::min(n, grains * (t + 1) / team * grain);
    try {
      if (begin < end) body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(team - 1));
  for (std::int64_t t = 1; t < team; ++t) {
    try {
      others.emplace_back(run, t);
    } catch (const std::system_error&) {
      run(t);  // no thread to be had: the work is done here instead
    }
  }
  run(0);
  for (std::thread& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace mergekernels
