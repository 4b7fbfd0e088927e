// The launches of csrc/cuda/launch.h on the host: the same per-thread code, one group after the other. For tests only.

#include <cstring>
#include <stdexcept>
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
  void bad(unsigned long long* count, unsigned mask) {
    if (mask == 0) return;
    add_bad(count, first_of(a, count), count_bits(mask), flat_index(a.piece, first + lowest_bit(mask)) + a.offset);
  }
  void base(unsigned mask) { bad(bad_of_base(a), mask); }
  void operator()(int s, const Verdict& v) {
    *ahead_of(a, s) += unsigned(count_bits(v.ahead));
    bad(bad_of(a, s), v.bad);
    for (int j = 0; j < kGroup; ++j) {
      if ((v.inside >> j & 1u) == 0) continue;
      const std::int64_t place = static_cast<std::int64_t>((*inside_of(a, s))++);
      if (place >= a.capacity) continue;
      a.ordinals[(a.begin + s) * a.capacity + place] = static_cast<std::int64_t>(v.ordinal[j]);
      a.indices[(a.begin + s) * a.capacity + place] = flat_index(a.piece, first + j) + a.offset;
    }
  }
};

template <int kDType, bool kJoint, class C>
void sweep_on_host(const SweepArgs& a) {
  for (std::int64_t first = 0; first <= a.n; first += kGroup) {
    const int n = group_count(a.n, first);
    if (a.bins == nullptr) {
      HostCollect collect{a, first};
      sweep_group<kDType, kJoint, C>(a, first, n, collect);
      continue;
    }
    for (int s = 0; s < a.count; ++s) {
      if (a.stage[s] == kStageLeftOut) continue;
      const Verdict v = judge_one<kDType, kJoint, C>(a, s, first, n);
      for (int j = 0; j < kGroup; ++j)
        if ((v.inside >> j & 1u) != 0) ++a.bins[(a.begin + s) * kSelectBins + ((v.ordinal[j] - a.lo[s]) >> a.shift[s])];
    }
  }
}

// A team of one thread.
struct HostTeam {
  template <class F>
  void each(std::int64_t n, const F& f) {
    for (std::int64_t i = 0; i < n; ++i) f(i);
  }
  std::uint32_t add(std::uint32_t* at, std::uint32_t value) {
    *at += value;
    return *at - value;
  }
  template <class Key>
  void max(Key* at, Key value) {
    *at = value > *at ? value : *at;
  }
  void scan(std::uint32_t* counts, std::int64_t n) {
    std::uint32_t before = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint32_t count = counts[i];
      counts[i] = before;
      before += count;
    }
  }
};

template <int kDType, class C, class Index>
void rank_on_host(const RankArgs& a, std::uint8_t* memory) {
  HostTeam team;
  const Room<C, Index> room(memory, a.length);
  for (std::int64_t row = 0; row < a.rows; ++row) rank_row<kDType>(a, room, row, team);
}

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
void launch_list(const ListArgs<C>& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    std::uint8_t kept[kMaxModels];
    for (std::int64_t tile = 0; tile < a.num_tiles; ++tile)
      for (int thread = 0; thread < kTileThreads; ++thread) list_group<code.value>(a, tile, thread, kept, 1);
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
void launch_gram(const GramArgs& a, int dtype, const Queue&) {
  const std::int64_t segments = num_segments(a), length = a.columns ? a.rows : a.cols;
  by_dtype<C>(dtype, [&](auto code) {
    for (int t = 0; t < num_tiles(a.num_models); ++t) {
      const Tile tile = tile_at(a.num_models, t);
      for (std::int64_t segment = 0; segment < segments; segment += a.columns ? kGroup : 1) {
        const int n = a.columns ? group_count(a.cols, segment) : 1;
        for (std::int64_t block = 0; block < a.blocks; ++block) {
          // [pair][column of the group][lane]
          std::vector<double> lanes(kTilePairs * kGroup * kLanes);
          const auto at = [&](int p, int c, int lane) -> double& {
            return lanes[std::size_t((p * kGroup + c) * kLanes + lane)];
          };
          for (int i = 0; i < kCanonicalBlock; i += a.columns ? 1 : kGroup) {
            const std::int64_t place = block * kCanonicalBlock + i;
            double sums[kTilePairs][kGroup];
            for (int p = 0; p < kTilePairs; ++p)
              for (int j = 0; j < kGroup; ++j) sums[p][j] = a.columns ? at(p, j, i % kLanes) : at(p, 0, i % kLanes + j);
            if (a.columns) {
              add_products<code.value, C>(a, tile, place * a.cols + segment, place < length ? n : 0, sums);
            } else {
              add_products<code.value, C>(a, tile, segment * a.cols + place, group_count(length, place), sums);
            }
            for (int p = 0; p < kTilePairs; ++p)
              for (int j = 0; j < kGroup; ++j)
                (a.columns ? at(p, j, i % kLanes) : at(p, 0, i % kLanes + j)) = sums[p][j];
          }
          for (int p = 0; p < kTilePairs; ++p) {
            const std::int64_t slot = pair_slot(a.num_models, tile, p);
            for (int c = 0; slot >= 0 && c < n; ++c)
              a.sums[(slot * segments + segment + c) * a.blocks + block] = fold_lanes(&at(p, c, 0));
          }
        }
      }
    }
  });
}

template <class C>
void launch_divergence(const DivergenceArgs<C>& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    for (int side = 0; side < (a.totals == nullptr ? 2 : 1); ++side) {
      for (std::int64_t work = 0; work < a.rows * a.blocks; ++work) {
        double lanes[kLanes] = {};
        for (int i = 0; i < kCanonicalBlock; i += kGroup) {
          const std::int64_t at = work % a.blocks * kCanonicalBlock + i;
          add_terms<code.value>(a, side, work / a.blocks, at, group_count(a.cols, at), lanes + i % kLanes);
        }
        a.sums[side * a.rows * a.blocks + work] = fold_lanes(lanes);
      }
    }
  });
}

// A chip that holds rows of some hundred entries, so that both routes are taken.
template <class C>
RankRoom rank_room(std::int64_t, std::int64_t length, int) {
  if (Room<C, std::uint16_t>::size(length) <= 16384) return {0, 0};
  return {Room<C, std::uint32_t>::size(length), 1};
}

template <class C>
void launch_rank(const RankArgs& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    if (a.room != nullptr) {
      rank_on_host<code.value, C, std::uint32_t>(a, a.room);
    } else {
      std::vector<std::uint64_t> chip(std::size_t(Room<C, std::uint16_t>::size(a.length) / 8));
      rank_on_host<code.value, C, std::uint16_t>(a, reinterpret_cast<std::uint8_t*>(chip.data()));
    }
  });
}

template RankRoom rank_room<float>(std::int64_t, std::int64_t, int);
template RankRoom rank_room<double>(std::int64_t, std::int64_t, int);
template void launch_rank<float>(const RankArgs&, int, const Queue&);
template void launch_rank<double>(const RankArgs&, int, const Queue&);

template <class C>
void launch_sweep(const SweepArgs& a, int dtype, const Queue&) {
  by_dtype<C>(dtype, [&](auto code) {
    if (is_joint(a)) {
      sweep_on_host<code.value, true, C>(a);
    } else {
      sweep_on_host<code.value, false, C>(a);
    }
  });
}

template void launch_stream(const StreamArgs<float>&, int, const Queue&);
template void launch_stream(const StreamArgs<double>&, int, const Queue&);
template void launch_program(const ProgramArgs<float>&, int, const Queue&);
template void launch_program(const ProgramArgs<double>&, int, const Queue&);
template void launch_list(const ListArgs<float>&, int, const Queue&);
template void launch_list(const ListArgs<double>&, int, const Queue&);
template void launch_reduce(const ReduceArgs<float>&, int, const Queue&);
template void launch_reduce(const ReduceArgs<double>&, int, const Queue&);
template void launch_block_sums(const NormArgs<float>&, int, const Queue&);
template void launch_block_sums(const NormArgs<double>&, int, const Queue&);
template void launch_gram<float>(const GramArgs&, int, const Queue&);
template void launch_gram<double>(const GramArgs&, int, const Queue&);
template void launch_divergence(const DivergenceArgs<float>&, int, const Queue&);
template void launch_divergence(const DivergenceArgs<double>&, int, const Queue&);
template void launch_sweep<float>(const SweepArgs&, int, const Queue&);
template void launch_sweep<double>(const SweepArgs&, int, const Queue&);

int num_devices(char* reason, int size) {
  std::strncpy(reason, "this is the host build", static_cast<std::size_t>(size));
  return 0;
}

const char* toolkit() { return "host"; }

}  // namespace mergekernels
