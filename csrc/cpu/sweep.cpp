#include <algorithm>
#include <memory>
#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

constexpr std::int64_t kGather = kCanonicalBlock;
// Entries that a thread holds for a model before they go to the statistics, and the room for a block more.
constexpr std::int64_t kLocalEntries = 2048;
constexpr std::int64_t kRoom = kLocalEntries + 2 * kBlock;

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

template <class Key>
void take_keys(const Found& found, const std::int64_t* g, std::int64_t offset, Entry* entries) {
  const Key* keys = static_cast<const Key*>(found.keys);
  for (std::int64_t i = 0; i < found.size; ++i) entries[i] = {keys[i], static_cast<std::uint64_t>(g[i] + offset)};
}

// Hands what a run has found for a model to the statistics.
void flush(SweepArgs* args, int m) {
  Worker& worker = *static_cast<Worker*>(args->context);
  const Call& call = *worker.call;
  const SweepModel& model = args->models[m];
  Found& found = args->found[m];
  Entry* const entries = worker.entries.data();
  std::int64_t* const g = worker.g.data();
  const std::int64_t n = found.size;
  if (args->piece.rows <= 1 || args->piece.ld == args->piece.cols) {
    for (std::int64_t i = 0; i < n; ++i) g[i] = args->piece.g0 + args->first + found.where[i];
  } else {
    for (std::int64_t i = 0; i < n; ++i) g[i] = flat_index(args->piece, args->first + found.where[i]);
  }
  std::int64_t before = 0, inside = 0;
  if (model.stage == kStageKey) {
    inside = n;
    if (call.compute == kF64) {
      take_keys<std::uint64_t>(found, g, call.offset, entries);
    } else {
      take_keys<std::uint32_t>(found, g, call.offset, entries);
    }
  } else {
    const bool hash = call.stats->order() == 0;
    if (hash)
      call.kernels.philox(call.seed, call.tensor, philox_stream(call.stats->interval(m).model, kPurposeTie), g, n,
                          worker.words.data());
    for (std::int64_t i = 0; i < n; ++i) {
      const auto index = static_cast<std::uint64_t>(g[i] + call.offset);
      const std::uint64_t ordinal = hash ? worker.words[static_cast<std::size_t>(i)] : index;
      before += ordinal < model.lo;
      entries[inside] = {ordinal, index};
      inside += int(ordinal >= model.lo) & int(ordinal <= model.hi);
    }
  }
  found.size = 0;
  call.stats->add(m, before, entries, inside, true);
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
  Worker worker{&call, std::vector<Entry>(kRoom), std::vector<std::int64_t>(kRoom), std::vector<std::uint32_t>(kRoom)};
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
  const Scratch scratch(sweep_scratch_bytes + active * kRoom * 12 + buffer * (num_models + 1));
  char* free = scratch.data() + sweep_scratch_bytes;
  for (int m = 0; m < num_models; ++m) {
    if (args.models[m].stage == kStageOut) continue;
    args.found[m] = Found{free, reinterpret_cast<std::uint32_t*>(free + kRoom * 8), 0};
    free += kRoom * 12;
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
