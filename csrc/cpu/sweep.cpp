#include <algorithm>
#include <memory>
#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

constexpr std::int64_t kGather = kCanonicalBlock;
// Entries that a thread holds for a search before they go to the statistics, and the room for a block more.
constexpr std::int64_t kLocalEntries = 2048;
constexpr std::int64_t kRoom = kLocalEntries + 2 * kBlock;

struct Call {
  SweepStats* stats;
  const Piece& piece;
  const View* base;
  const std::vector<const View*>& models;
  const SweepKeys& keys;
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

// Hands what a run has found for a search to the statistics.
void flush(SweepArgs* args, int s) {
  Worker& worker = *static_cast<Worker*>(args->context);
  const Call& call = *worker.call;
  const SweepSearch& search = args->searches[s];
  Found& found = args->found[s];
  Entry* const entries = worker.entries.data();
  std::int64_t* const g = worker.g.data();
  const std::int64_t n = found.size;
  if (args->piece.rows <= 1 || args->piece.ld == args->piece.cols) {
    for (std::int64_t i = 0; i < n; ++i) g[i] = args->piece.g0 + args->first + found.where[i];
  } else {
    for (std::int64_t i = 0; i < n; ++i) g[i] = flat_index(args->piece, args->first + found.where[i]);
  }
  std::int64_t before = 0, inside = 0;
  if (search.stage == kStageKey) {
    inside = n;
    if (call.compute == kF64) {
      take_keys<std::uint64_t>(found, g, call.offset, entries);
    } else {
      take_keys<std::uint32_t>(found, g, call.offset, entries);
    }
  } else {
    const bool hash = call.stats->order() == 0;
    if (hash)
      call.kernels.philox(call.seed, call.tensor, philox_stream(search.model, kPurposeTie), g, n, worker.words.data());
    for (std::int64_t i = 0; i < n; ++i) {
      const auto index = static_cast<std::uint64_t>(g[i] + call.offset);
      const std::uint64_t ordinal = hash ? worker.words[static_cast<std::size_t>(i)] : index;
      before += ordinal < search.lo;
      entries[inside] = {ordinal, index};
      inside += int(ordinal >= search.lo) & int(ordinal <= search.hi);
    }
  }
  found.size = 0;
  call.stats->add(s, before, entries, inside, true);
}

// The searches of the call, those of a model next to one another.
void set_searches(const Call& call, SweepArgs* args) {
  for (int s = 0; s < args->num_searches; ++s) {
    const SweepStats::Interval& interval = call.stats->interval(s);
    const bool out = interval.stage == kStageOut || call.models[static_cast<std::size_t>(interval.model)] == nullptr;
    args->searches[s] =
        SweepSearch{interval.model, out ? int(kStageOut) : interval.stage, interval.lo, interval.hi, interval.tau};
    args->nonfinite[s] = NonFinite{-1, 0};
  }
  args->nonfinite[args->num_searches] = NonFinite{-1, 0};
  for (int m = 0; m < args->num_models; ++m)
    for (int s = 0; s < args->num_searches; ++s)
      if (args->searches[s].stage != kStageOut && args->searches[s].model == m) args->active[args->num_active++] = s;
}

void sweep_range(const Call& call, std::int64_t begin, std::int64_t end) {
  const DefaultFloatEnvironment environment;
  SweepArgs args{};
  args.num_models = static_cast<int>(call.models.size());
  args.num_searches = call.stats->num_searches();
  args.piece = call.piece;
  args.compute = call.compute;
  args.key = call.keys.key;
  args.rows = call.keys.rows;
  args.balance = call.keys.balance.data();
  args.draws = call.keys.draws.data();
  args.seed = call.seed;
  args.tensor = call.tensor;
  args.capacity = kLocalEntries;
  args.flush = &flush;
  Worker worker{&call, std::vector<Entry>(kRoom), std::vector<std::int64_t>(kRoom), std::vector<std::uint32_t>(kRoom)};
  args.context = &worker;
  set_searches(call, &args);

  // Models in use; the base is the last.
  std::vector<Reader> readers;
  const View empty;
  std::vector<bool> used(call.models.size() + 1, joint(call.keys) && args.num_active > 0);
  for (int k = 0; k < args.num_active; ++k) used[static_cast<std::size_t>(args.searches[args.active[k]].model)] = true;
  used.back() = call.base != nullptr;
  const auto view_of = [&](std::size_t m) -> const View& {
    return m < call.models.size() ? *call.models[m] : *call.base;
  };
  bool dense = true;
  for (std::size_t m = 0; m < used.size(); ++m) {
    readers.emplace_back(used[m] ? view_of(m) : empty);
    dense = dense && (!used[m] || readers.back().contiguous());
  }

  // `where` counts inside a run in 32 bits.
  const std::int64_t run = dense ? std::min<std::int64_t>(end - begin, std::int64_t(1) << 30) : kGather;
  const std::int64_t buffer = dense ? 0 : kGather * 8;
  const std::int64_t own = sweep_scratch_bytes(args.num_models);
  const Scratch scratch(own + args.num_active * kRoom * 12 + buffer * static_cast<std::int64_t>(used.size()));
  char* free = scratch.data() + own;
  for (int k = 0; k < args.num_active; ++k) {
    args.found[args.active[k]] = Found{free, reinterpret_cast<std::uint32_t*>(free + kRoom * 8), 0};
    free += kRoom * 12;
  }
  args.scratch = scratch.data();
  for (std::int64_t i = begin; i < end; i += run) {
    args.first = i;
    args.n = std::min(run, end - i);
    for (std::size_t m = 0; m < used.size(); ++m) {
      if (!used[m]) continue;
      const View& view = view_of(m);
      Source& source = m < call.models.size() ? args.models[m] : args.base;
      source = Source{readers[m].at(i), view.dtype, view.cast};
      if (readers[m].contiguous()) continue;
      char* const gathered = free + buffer * static_cast<std::int64_t>(m);
      readers[m].gather(i, args.n, gathered);
      source.data = gathered;
    }
    call.kernels.sweep(&args);
    for (int k = 0; k < args.num_active; ++k)
      if (args.found[args.active[k]].size > 0) flush(&args, args.active[k]);
  }
  for (int k = 0; k < args.num_active; ++k) {
    const int s = args.active[k];
    if (args.searches[s].stage == kStageKey && args.before[s] > 0) call.stats->add(s, args.before[s], nullptr, 0);
  }
  for (int s = 0; s <= args.num_searches; ++s) {
    const NonFinite& bad = args.nonfinite[s];
    if (bad.count > 0) call.stats->add_nonfinite(s, bad.first + call.offset, bad.count);
  }
}

}  // namespace

void sweep(SweepStats* stats, const Piece& piece, const View* base, const std::vector<const View*>& models,
           const SweepKeys& keys, int compute, std::uint64_t seed, std::uint32_t tensor, std::int64_t offset,
           int threads, const Kernels& kernels) {
  check_piece(piece);
  if (models.empty() || models.size() > kMaxModels) throw std::invalid_argument("a sweep takes 1 to 64 models");
  for (int s = 0; s < stats->num_searches(); ++s)
    if (stats->interval(s).stage != kStageOut && stats->interval(s).model >= static_cast<int>(models.size()))
      throw std::invalid_argument("the statistics are for another number of models");
  if (compute != kF32 && compute != kF64) throw std::invalid_argument("arithmetic is in float32 or float64");
  std::int64_t bytes_each = 0;
  for (const View* view : models) {
    if (view == nullptr && joint(keys)) throw std::invalid_argument("a joint key needs all models");
    if (view == nullptr) continue;
    check_view(*view, piece, "a model");
    bytes_each += itemsize(view->dtype);
  }
  if (base != nullptr) {
    check_view(*base, piece, "the base");
    bytes_each += itemsize(base->dtype);
  }
  if (keys.key == kSweepBalance && keys.balance.size() != models.size())
    throw std::invalid_argument("the key balance needs one rule per model");
  if (keys.key == kSweepDrawn && keys.draws.size() != models.size())
    throw std::invalid_argument("the key drawn needs one threshold per model");
  const std::int64_t n = piece.rows * piece.cols;
  if (keys.key == kSweepImportance && n > 0 &&
      (keys.rows.length < 1 || flat_index(piece, n - 1) / keys.rows.length >= keys.rows.segments))
    throw std::invalid_argument("the key importance needs one number per row");
  const Call call{stats, piece, base, models, keys, compute, seed, tensor, offset, kernels};
  parallel_ranges(n, kCanonicalBlock, team_size(threads, n * bytes_each),
                  [&call](std::int64_t begin, std::int64_t end) { sweep_range(call, begin, end); });
}

}  // namespace mergekernels
