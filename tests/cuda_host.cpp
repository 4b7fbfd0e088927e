// The launches of csrc/cuda/launch.h on the host: the same per-thread code, one group after the other. For tests only.

#include <cstring>
#include <stdexcept>

#include "common/tree.h"
#include "cuda/by_dtype.h"
#include "cuda/launch.h"

namespace mergekernels {

namespace {

int group_count(std::int64_t n, std::int64_t first) {
  const std::int64_t left = n - first;
  return left >= kGroup ? kGroup : left > 0 ? int(left) : 0;
}

void add_bad(unsigned long long* count, unsigned long long* first, int number, std::int64_t index) {
  *count += static_cast<unsigned long long>(number);
  if (index < static_cast<std::int64_t>(*first)) *first = static_cast<unsigned long long>(index);
}

struct HostTally {
  unsigned long long* slot;
  int num_models;
  void kept(int m, int count) { slot[m] += unsigned(count); }
  void votes(int conflicts, int positive, int negative) {
    unsigned long long* at = slot + counter_conflicts(num_models);
    at[0] += unsigned(conflicts);
    at[1] += unsigned(positive);
    at[2] += unsigned(negative);
  }
  void nonfinite(int source, int count, std::int64_t first) {
    add_bad(slot + counter_bad(num_models, source), slot + counter_first(num_models, source), count, first);
  }
};

struct HostCollect {
  const SweepArgs& a;
  std::int64_t first;
  void bad(int source, unsigned mask) {
    if (mask == 0) return;
    unsigned long long* count = a.counters + 2 * a.num_models + source;
    add_bad(count, count + a.num_models + 1, count_bits(mask),
            flat_index(a.piece, first + lowest_bit(mask)) + a.offset);
  }
  void base(unsigned mask) { bad(a.num_models, mask); }
  void operator()(int m, const Verdict& v) {
    a.counters[m] += unsigned(count_bits(v.ahead));
    bad(m, v.bad);
    for (int j = 0; j < kGroup; ++j) {
      if ((v.inside >> j & 1u) == 0) continue;
      const std::int64_t place = static_cast<std::int64_t>(a.counters[a.num_models + m]++);
      if (place >= a.capacity) continue;
      a.ordinals[m * a.capacity + place] = static_cast<std::int64_t>(v.ordinal[j]);
      a.indices[m * a.capacity + place] = flat_index(a.piece, first + j) + a.offset;
    }
  }
};

}  // namespace

template <class C>
void launch_stream(const StreamArgs<C>& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    // A group past the end, as an idle thread has it, and each group in a slot of its own.
    for (std::int64_t first = 0, i = 0; first <= a.n + kGroup; first += kGroup, ++i) {
      HostTally tally{a.counters == nullptr ? nullptr : a.counters + i % a.slots * num_counters(a.num_models),
                      a.num_models};
      const int n = group_count(a.n, first);
      if (a.counters != nullptr) {
        stream_group<code.value, true>(a, first, n, tally);
      } else {
        stream_group<code.value, false>(a, first, n, tally);
      }
    }
  });
}

template <class C>
void launch_program(const ProgramArgs<C>& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    std::uint8_t kept[kMaxModels];
    unsigned long long nowhere[3 * kMaxModels + 7];
    for (std::int64_t first = 0, i = 0; first <= a.n + kGroup; first += kGroup, ++i) {
      HostTally tally{a.counters == nullptr ? nowhere : a.counters + i % a.slots * num_counters(a.num_inputs),
                      a.num_inputs};
      program_group<code.value>(a, first, group_count(a.n, first), kept, 1, tally);
    }
  });
}

template <class C>
void launch_reduce(const ReduceArgs<C>& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    std::uint8_t kept[kMaxModels];
    for (int slot = 0; slot < a.num_slots; ++slot) {
      for (std::int64_t block = 0; block < a.blocks; ++block) {
        double lanes[kLanes] = {};
        for (std::int64_t i = 0; i < kCanonicalBlock; i += kGroup) {
          const std::int64_t first = block * kCanonicalBlock + i;
          const int n = group_count(a.program.n, first);
          double v[kGroup];
          if (is_merged(a.quantity[slot])) {
            slot_numbers<code.value, true>(a, slot, first, n, kept, 1, v);
          } else {
            slot_numbers<code.value, false>(a, slot, first, n, kept, 1, v);
          }
          for (int j = 0; j < kGroup; ++j) lanes[i % kLanes + j] += v[j];
        }
        a.sums[slot * a.blocks + block] = fold_lanes(lanes);
      }
    }
  });
}

template <class C>
void launch_block_sums(const NormArgs<C>& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    for (int m = 0; m < a.num_models; ++m) {
      for (std::int64_t block = 0; block < a.blocks; ++block) {
        double lanes[kLanes] = {};
        for (std::int64_t i = 0; i < kCanonicalBlock; i += kGroup) {
          const std::int64_t first = block * kCanonicalBlock + i;
          add_squares<code.value>(a, m, first, group_count(a.n, first), lanes + i % kLanes);
        }
        a.sums[m * a.blocks + block] = fold_lanes(lanes);
      }
    }
  });
}

template <class C>
void launch_sweep(const SweepArgs& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    constexpr int kDType = code.value;
    for (std::int64_t first = 0; first <= a.n; first += kGroup) {
      const int n = group_count(a.n, first);
      if (a.bins == nullptr) {
        HostCollect collect{a, first};
        sweep_group<kDType, C>(a, first, n, collect);
        continue;
      }
      C x0[kGroup] = {};
      if (a.base != nullptr) widen(load_packed<kDType>(a.base, first, n, a.aligned), x0);
      for (int m = 0; m < a.num_models; ++m) {
        if (a.stage[m] == kStageLeftOut) continue;
        const Verdict v = judge<kDType>(a, m, load_packed<kDType>(a.models[m], first, n, a.aligned), x0, first, n);
        for (int j = 0; j < kGroup; ++j)
          if ((v.inside >> j & 1u) != 0) ++a.bins[m * kSelectBins + ((v.ordinal[j] - a.lo[m]) >> a.shift[m])];
      }
    }
  });
}

template void launch_stream(const StreamArgs<float>&, int, const Queue&);
template void launch_stream(const StreamArgs<double>&, int, const Queue&);
template void launch_program(const ProgramArgs<float>&, int, const Queue&);
template void launch_program(const ProgramArgs<double>&, int, const Queue&);
template void launch_reduce(const ReduceArgs<float>&, int, const Queue&);
template void launch_reduce(const ReduceArgs<double>&, int, const Queue&);
template void launch_block_sums(const NormArgs<float>&, int, const Queue&);
template void launch_block_sums(const NormArgs<double>&, int, const Queue&);
template void launch_sweep<float>(const SweepArgs&, int, const Queue&);
template void launch_sweep<double>(const SweepArgs&, int, const Queue&);

int num_devices(char* reason, int size) {
  std::strncpy(reason, "this is the host build", static_cast<std::size_t>(size));
  return 0;
}

const char* toolkit() { return "host"; }

}  // namespace mergekernels
