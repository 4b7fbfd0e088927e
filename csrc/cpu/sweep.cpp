#include <algorithm>
#include <memory>
#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

constexpr std::int64_t kGather = kCanonicalBlock;
constexpr std::int64_t kLocalEntries = 2048;

struct Call {
  SweepStats* stats;
  const Piece& piece;
  const View* base;
  const std::vector<const View*>& models;
  int compute;
  std::uint64_t seed;
  std::uint32_t tensor;
  std::int64_t offset;
  const Kernels& kernels;
};

// What one thread holds besides the arguments of the kernel.
struct Worker {
  const Call* call;
  std::vector<Entry> entries;
  std::vector<std::int64_t> g;
  std::vector<std::uint32_t> words;
};

// Hands what a run has found for a model to the statistics.
void flush(SweepArgs* args, int m) {
  Worker& worker = *static_cast<Worker*>(args->context);
  const Call& call = *worker.call;
  const SweepModel& model = args->models[m];
  Found& found = args->found[m];
  const auto n = static_cast<std::size_t>(found.size);
  worker.g.resize(n);
  for (std::size_t i = 0; i < n; ++i) worker.g[i] = flat_index(args->piece, args->first + found.where[i]);
  worker.entries.clear();
  std::int64_t before = 0;
  if (model.stage == kStageKey) {
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint64_t key = call.compute == kF64 ? static_cast<const std::uint64_t*>(found.keys)[i]
                                                     : static_cast<const std::uint32_t*>(found.keys)[i];
      worker.entries.push_back({key, static_cast<std::uint64_t>(worker.g[i] + call.offset)});
    }
  } else {
    const bool hash = call.stats->order() == 0;
    worker.words.resize(n);
    if (hash)
      call.kernels.philox(call.seed, call.tensor, philox_stream(m, kPurposeTie), worker.g.data(), found.size,
                          worker.words.data());
    for (std::size_t i = 0; i < n; ++i) {
      const auto index = static_cast<std::uint64_t>(worker.g[i] + call.offset);
      const std::uint64_t ordinal = hash ? worker.words[i] : index;
      before += ordinal < model.lo;
      if (ordinal >= model.lo && ordinal <= model.hi) worker.entries.push_back({ordinal, index});
    }
  }
  found.size = 0;
  call.stats->add(m, before, worker.entries.data(), static_cast<std::int64_t>(worker.entries.size()));
}

void sweep_range(const Call& call, std::int64_t begin, std::int64_t end) {
  const DefaultFloatEnvironment environment;
  const int num_models = call.stats->num_models();
  SweepArgs args{};
  args.num_models = num_models;
  args.piece = call.piece;
  args.compute = call.compute;
  args.capacity = kLocalEntries;
  args.flush = &flush;
  Worker worker{&call, {}, {}, {}};
  args.context = &worker;
  args.nonfinite[num_models] = NonFinite{-1, 0};

  std::vector<Reader> readers;
  readers.reserve(static_cast<std::size_t>(num_models) + 1);
  bool dense = true;
  const View empty;
  int active = 0;
  for (int m = 0; m < num_models; ++m) {
    const View* view = call.models[static_cast<std::size_t>(m)];
    const SweepStats::Interval& interval = call.stats->interval(m);
    const int stage = view == nullptr ? int(kStageOut) : interval.stage;
    args.models[m] = SweepModel{{}, stage, interval.lo, interval.hi, interval.tau};
    args.nonfinite[m] = NonFinite{-1, 0};
    readers.emplace_back(stage == kStageOut ? empty : *view);
    if (stage == kStageOut) continue;
    ++active;
    dense = dense && readers.back().contiguous();
  }
  const Reader base(call.base == nullptr ? empty : *call.base);
  dense = dense && (call.base == nullptr || base.contiguous());

  // `where` counts inside a run in 32 bits.
  const std::int64_t run = dense ? std::min<std::int64_t>(end - begin, std::int64_t(1) << 30) : kGather;
  const std::int64_t buffer = dense ? 0 : kGather * 8;
  const std::int64_t room = kLocalEntries + 2 * kBlock;
  const Scratch scratch(sweep_scratch_bytes + active * room * 12 + buffer * (num_models + 1));
  char* free = scratch.data() + sweep_scratch_bytes;
  for (int m = 0; m < num_models; ++m) {
    if (args.models[m].stage == kStageOut) continue;
    args.found[m] = Found{free, reinterpret_cast<std::uint32_t*>(free + room * 8), 0};
    free += room * 12;
  }
  args.scratch = scratch.data();
  const auto source = [&](const View& view, const Reader& reader, int slot) {
    if (reader.contiguous()) return Source{reader.at(args.first), view.dtype, view.cast};
    char* const gathered = free + buffer * slot;
    reader.gather(args.first, args.n, gathered);
    return Source{gathered, view.dtype, view.cast};
  };
  for (std::int64_t i = begin; i < end; i += run) {
    args.first = i;
    args.n = std::min(run, end - i);
    if (call.base != nullptr) args.base = source(*call.base, base, num_models);
    for (int m = 0; m < num_models; ++m) {
      const auto k = static_cast<std::size_t>(m);
      if (args.models[m].stage != kStageOut) args.models[m].source = source(*call.models[k], readers[k], m);
    }
    call.kernels.sweep(&args);
    for (int m = 0; m < num_models; ++m)
      if (args.models[m].stage != kStageOut && args.found[m].size > 0) flush(&args, m);
  }
  for (int m = 0; m < num_models; ++m)
    if (args.models[m].stage == kStageKey && args.before[m] > 0) call.stats->add(m, args.before[m], nullptr, 0);
  for (int s = 0; s <= num_models; ++s) {
    const NonFinite& bad = args.nonfinite[s];
    if (bad.count > 0) call.stats->add_nonfinite(s, bad.first + call.offset, bad.count);
  }
}

}  // namespace

void sweep(SweepStats* stats, const Piece& piece, const View* base, const std::vector<const View*>& models, int compute,
           std::uint64_t seed, std::uint32_t tensor, std::int64_t offset, int threads, const Kernels& kernels) {
  check_piece(piece);
  if (static_cast<int>(models.size()) != stats->num_models())
    throw std::invalid_argument("the statistics are for another number of models");
  if (compute != kF32 && compute != kF64) throw std::invalid_argument("arithmetic is in float32 or float64");
  std::int64_t bytes_each = 0;
  for (const View* view : models) {
    if (view == nullptr) continue;
    check_view(*view, piece, "a model");
    bytes_each += itemsize(view->dtype);
  }
  if (base != nullptr) {
    check_view(*base, piece, "the base");
    bytes_each += itemsize(base->dtype);
  }
  const Call call{stats, piece, base, models, compute, seed, tensor, offset, kernels};
  const std::int64_t n = piece.rows * piece.cols;
  parallel_ranges(n, kCanonicalBlock, team_size(threads, n * bytes_each),
                  [&call](std::int64_t begin, std::int64_t end) { sweep_range(call, begin, end); });
}

}  // namespace mergekernels
