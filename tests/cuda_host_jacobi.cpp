// The small decompositions of csrc/cuda/launch.h on the host: the same steps, thread after thread. For tests only.

#include <stdexcept>
#include <vector>

#include "cuda/launch.h"

namespace mergekernels {

namespace {

// Forwards or backwards: where a barrier is missing, the two have different results.
struct ThreadAfterThread {
  int size;
  bool forwards;
  template <class F>
  void all(const F& f) {
    for (int thread = 0; thread < size; ++thread) f(forwards ? thread : size - 1 - thread);
  }
};

bool forwards = false;

}  // namespace

// A chip on which 128 x 64 doubles fit, but of 128 x 128 only one matrix of the two.
int jacobi_limit(int) { return 166912; }

template <class C>
void launch_jacobi(bool eigh, const JacobiArgs<C>& a, int threads, int bytes, const Queue&) {
  forwards = !forwards;
  for (std::int64_t i = 0; i < a.count; ++i) {
    const JacobiItem<C>& item = a.items[i];
    if (jacobi_threads(item.s) != threads ||
        JacobiRoom<C>::size(item.p, item.s, item.far != nullptr) > bytes)
      throw std::runtime_error("the launch does not suit its items");
    // Exactly the memory that is asked for, filled with what memory holds that nobody set.
    std::vector<std::uint64_t> chip(std::size_t(bytes / 8), 0xFFF7DEADFFF7DEADull);
    ThreadAfterThread team{threads, forwards};
    jacobi_item(eigh, item, reinterpret_cast<std::uint8_t*>(chip.data()), team);
  }
}

template void launch_jacobi(bool, const JacobiArgs<float>&, int, int, const Queue&);
template void launch_jacobi(bool, const JacobiArgs<double>&, int, int, const Queue&);

}  // namespace mergekernels
