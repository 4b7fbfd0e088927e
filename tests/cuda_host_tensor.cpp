// Least squares and products of stacks of csrc/cuda/launch.h on the host: the same steps, thread after thread. For
// tests only.

#include <cstddef>
#include <stdexcept>
#include <vector>

#include "cuda/launch.h"

namespace mergekernels {

namespace {

// Forwards or backwards: where a barrier is missing, the two have different results.
bool forwards = false;

struct Threads {
  int size;
  bool forwards;
  template <class F>
  void all(const F& f) {
    for (int thread = 0; thread < size; ++thread) f(forwards ? thread : size - 1 - thread);
  }
};

template <class C>
struct OwnThreads {
  int size;
  std::vector<ThinOwn<C>> owns;
  template <class F>
  void all(const F& f) {
    for (int i = 0; i < size; ++i) {
      const int thread = forwards ? i : size - 1 - i;
      f(thread, owns[std::size_t(thread)]);
    }
  }
};

}  // namespace

void launch_als(const AlsArgs& a, const Queue&) {
  forwards = !forwards;
  const std::int64_t bytes = als_room(a.shape, a.far != 0);
  if (bytes > jacobi_limit(0)) throw std::runtime_error("the launch asks for more memory than the chip has");
  for (std::int64_t i = 0; i < a.count; ++i) {
    // Exactly the memory that is asked for, filled with what memory holds that nobody set.
    std::vector<double> chip(std::size_t(bytes) / sizeof(double),
                             bits_as<double>(std::uint64_t(0xFFF7DEADFFF7DEADull)));
    als_item(a, a.items[i], chip.data(), Threads{als_threads(a.shape), forwards});
  }
}

template <class C>
void launch_thin(const ThinArgs<C>& a, const Queue&) {
  forwards = !forwards;
  const int threads = kThinRows / 4 * thin_across(a.width);
  for (int tile = 0; tile < a.tiles; ++tile) {
    const ThinItem<C>& item = a.items[item_of(a.items, a.count, tile)];
    ThinRoom<C> room;
    OwnThreads<C> team{threads, std::vector<ThinOwn<C>>(std::size_t(threads))};
    thin_tile(a, item, tile - item.first, room, team);
  }
}

template void launch_thin(const ThinArgs<float>&, const Queue&);
template void launch_thin(const ThinArgs<double>&, const Queue&);

void launch_task_sums(const TaskArgs& a, const Queue&) {
  for (std::int64_t e = 0; e < a.elements; ++e) task_sum(a, e);
}

}  // namespace mergekernels
