// The launches of learned coefficients and masks on the host, as in cuda_host.cpp. For tests only.

#include <vector>

#include "common/tree.h"
#include "cuda/by_dtype.h"
#include "cuda/launch.h"

namespace mergekernels {

namespace {

int group_count(std::int64_t n, std::int64_t first) {
  const std::int64_t left = n - first;
  return left >= kGroup ? kGroup : left > 0 ? int(left) : 0;
}

// Calls add(first, n, lane) for the groups of a canonical block in order, those past the end too.
template <class Add>
void each_group(std::int64_t total, std::int64_t block, const Add& add) {
  for (int i = 0; i < kCanonicalBlock; i += kGroup) {
    const std::int64_t first = block * kCanonicalBlock + i;
    add(first, group_count(total, first), i % kLanes);
  }
}

template <int kDType, bool kMasked, class C>
void dots_on_host(const LearnedArgs<C>& a) {
  for (int tile = 0; tile < num_dot_tiles(a.num_models); ++tile) {
    for (std::int64_t block = 0; block < a.blocks; ++block) {
      double lanes[kDotModels][kLanes] = {};
      each_group(a.n, block, [&](std::int64_t first, int n, int lane) {
        double sums[kDotModels][kGroup];
        for (int t = 0; t < kDotModels; ++t)
          for (int j = 0; j < kGroup; ++j) sums[t][j] = lanes[t][lane + j];
        add_dots<kDType, kMasked>(a, tile, first, n, sums);
        for (int t = 0; t < kDotModels; ++t)
          for (int j = 0; j < kGroup; ++j) lanes[t][lane + j] = sums[t][j];
      });
      for (int t = 0; t < kDotModels && tile * kDotModels + t < a.num_models; ++t)
        a.sums[(tile * kDotModels + t) * a.blocks + block] = fold_lanes(lanes[t]);
    }
  }
}

template <int kDType, bool kMasked, class C>
void grouped_dots_on_host(const LearnedArgs<C>& a) {
  constexpr int kOwners = kLanes / kGroup;
  for (int number = 0; number < num_slot_tiles(a.num_models, a.groups); ++number) {
    const SlotTile tile = slot_tile_at(a.num_models, a.groups, number);
    const int slots = tile.models * tile.groups;
    if (slots > kTileSlots) throw std::logic_error("a tile has more slots than there is room");
    for (std::int64_t block = 0; block < a.blocks; ++block) {
      // [slot][element of the group][thread], as in shared memory.
      std::vector<double> waiting(kTileSlots * kGroup * kOwners);
      each_group(a.n, block, [&](std::int64_t first, int n, int lane) {
        add_grouped_dots<kDType, kMasked>(a, tile, first, n, waiting.data() + lane / kGroup, kOwners);
      });
      for (int slot = 0; slot < slots; ++slot) {
        double lanes[kLanes];
        for (int i = 0; i < kLanes; ++i)
          lanes[i] = waiting[std::size_t((slot * kGroup + i % kGroup) * kOwners + i / kGroup)];
        a.sums[slot_of(a, tile, slot) * a.blocks + block] = fold_lanes(lanes);
      }
    }
  }
}

}  // namespace

template <class C>
void launch_seg_dot(const LearnedArgs<C>& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    if (a.logits != nullptr) {
      a.groups == 1 ? dots_on_host<code.value, true>(a) : grouped_dots_on_host<code.value, true>(a);
    } else {
      a.groups == 1 ? dots_on_host<code.value, false>(a) : grouped_dots_on_host<code.value, false>(a);
    }
  });
}

template <class C>
void launch_mask_sum(const LearnedArgs<C>& a, const Queue&) {
  for (std::int64_t block = 0; block < a.blocks; ++block) {
    double lanes[kLanes] = {};
    each_group(a.n, block, [&](std::int64_t first, int n, int lane) { add_mask(a, first, n, lanes + lane); });
    a.sums[block] = fold_lanes(lanes);
  }
}

template <class C>
void launch_mask_merge(const LearnedArgs<C>& a, bool slope, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    // A group past the end, as an idle thread has it.
    for (std::int64_t first = 0; first <= a.n + kGroup; first += kGroup) {
      const int n = group_count(a.n, first);
      slope ? mask_group<code.value, true>(a, first, n) : mask_group<code.value, false>(a, first, n);
    }
  });
}

template void launch_seg_dot(const LearnedArgs<float>&, int, const Queue&);
template void launch_seg_dot(const LearnedArgs<double>&, int, const Queue&);
template void launch_mask_sum(const LearnedArgs<float>&, const Queue&);
template void launch_mask_sum(const LearnedArgs<double>&, const Queue&);
template void launch_mask_merge(const LearnedArgs<float>&, bool, int, const Queue&);
template void launch_mask_merge(const LearnedArgs<double>&, bool, int, const Queue&);

}  // namespace mergekernels
