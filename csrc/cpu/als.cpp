#include <atomic>
#include <cstring>
#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

void als(const AlsArgs& args, int threads, const Kernels& kernels) {
  const AlsShape& s = args.shape;
  if (args.count < 0 || s.tasks < 1 || s.ranks < 1 || s.p < 1 || s.q < 1 || s.width < 1 || args.sweeps < 1)
    throw std::invalid_argument("a problem has sizes of 1 and more");
  AlsArgs each = args;
  each.far = 1;
  const std::int64_t size = als_numbers(s) * std::int64_t(sizeof(double));
  if (size >= std::int64_t(1) << 33) throw std::invalid_argument("a problem is too large for indices of 32 bits");
  // Problems end after unequal numbers of sweeps: a thread that is free takes the next.
  std::atomic<std::int64_t> next{0};
  parallel_ranges(std::min<std::int64_t>(threads, args.count), 1, threads, [&](std::int64_t begin, std::int64_t end) {
    const DefaultFloatEnvironment environment;
    const Scratch scratch(size);
    for (; begin < end; ++begin) {
      for (std::int64_t item = next++; item < each.count; item = next++) {
        std::memset(scratch.data(), 0, static_cast<std::size_t>(size));
        kernels.als(&each, item, reinterpret_cast<double*>(scratch.data()));
      }
    }
  });
}

}  // namespace mergekernels
