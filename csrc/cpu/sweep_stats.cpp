#include <algorithm>
#include <stdexcept>

#include "common/philox.h"
#include "cpu/bytes.h"
#include "cpu/stats.h"

namespace mergekernels {

namespace {

constexpr char kMagic[] = "MKsweep2";

}  // namespace

int bin_shift(std::uint64_t lo, std::uint64_t hi) {
  int bits = 0;
  for (std::uint64_t width = hi - lo; width != 0; width >>= 1) ++bits;
  return std::max(0, bits - 12);
}

void merge_nonfinite(NonFinite* into, std::int64_t first, std::int64_t count) {
  if (count <= 0) return;
  if (into->count == 0 || first < into->first) into->first = first;
  into->count += count;
}

SweepStats::SweepStats(std::vector<Interval> intervals, int order, std::int64_t capacity)
    : models_(intervals.size()),
      nonfinite_(intervals.size() + 1, NonFinite{-1, 0}),
      order_(order),
      capacity_(capacity) {
  if (intervals.empty() || intervals.size() > kMaxSearches)
    throw std::invalid_argument("a sweep takes 1 to 128 searches");
  if (capacity < 0) throw std::invalid_argument("the capacity of a sweep is negative");
  if (order != 0 && order != 1) throw std::invalid_argument("the tie order of a sweep is 0 (hash) or 1 (index)");
  for (std::size_t m = 0; m < intervals.size(); ++m) {
    const Interval& i = intervals[m];
    if (i.stage < kStageOut || i.stage > kStageTie || (i.stage != kStageOut && i.lo > i.hi) ||
        (i.stage == kStageKey && i.lo == 0) || i.model < 0 || i.model >= kMaxModels)
      throw std::invalid_argument(
          "an interval of a sweep needs a stage of 0, 1 or 2, lo <= hi, for keys lo >= 1, and a model from 0 to 63");
    models_[m].interval = i;
  }
}

const SweepStats::Model& SweepStats::at(int model) const {
  if (model < 0 || model >= num_searches()) throw std::out_of_range("no such model in this sweep");
  return models_[static_cast<std::size_t>(model)];
}

std::int64_t SweepStats::before(int model) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return at(model).before;
}

std::int64_t SweepStats::inside(int model) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return at(model).inside;
}

bool SweepStats::overflowed(int model) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !at(model).bins.empty();
}

void SweepStats::spill(Model* model) {
  if (model->bins.empty()) model->bins.assign(kNumBins, 0);
  const int shift = bin_shift(model->interval.lo, model->interval.hi);
  for (const Entry& e : model->entries) ++model->bins[(e.ordinal - model->interval.lo) >> shift];
  std::deque<Entry>().swap(model->entries);
}

std::vector<std::int64_t> SweepStats::histogram(int model) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Model copy = at(model);
  spill(&copy);
  return copy.bins;
}

const std::deque<Entry>& SweepStats::entries_of(int model) const {
  const Model& m = at(model);
  if (!m.bins.empty())
    throw std::invalid_argument("the entries of this model overflowed: only their histogram is left");
  return m.entries;
}

std::vector<std::uint64_t> SweepStats::order_statistics(int model, const std::vector<std::int64_t>& ranks) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Interval& interval = at(model).interval;
  const std::deque<Entry>& entries = entries_of(model);
  const std::int64_t n = static_cast<std::int64_t>(entries.size());
  // One cheap pass into bins, then only the bin that holds the rank is ordered: a selection over all entries costs ten
  // times as much.
  const int shift = bin_shift(interval.lo, interval.hi);
  std::vector<std::int64_t> bins(kNumBins, 0);
  for (const Entry& e : entries) ++bins[(e.ordinal - interval.lo) >> shift];
  std::vector<std::uint64_t> result, ordinals;
  for (const std::int64_t rank : ranks) {
    if (rank < 1 || rank > n) throw std::out_of_range("a rank lies outside the entries of the sweep");
    // Ranks count from the entry furthest ahead: from the largest key, from the smallest tie ordinal.
    std::int64_t left = interval.stage == kStageKey ? n + 1 - rank : rank;
    std::size_t bin = 0;
    while (left > bins[bin]) left -= bins[bin++];
    ordinals.clear();
    for (const Entry& e : entries)
      if ((e.ordinal - interval.lo) >> shift == bin) ordinals.push_back(e.ordinal);
    const auto nth = ordinals.begin() + (left - 1);
    std::nth_element(ordinals.begin(), nth, ordinals.end());
    result.push_back(*nth);
  }
  return result;
}

std::pair<std::int64_t, std::int64_t> SweepStats::count_ordinal(int model, std::uint64_t ordinal) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::deque<Entry>& entries = entries_of(model);
  std::int64_t above = 0, below = 0;
  for (const Entry& e : entries) {
    above += e.ordinal > ordinal;
    below += e.ordinal < ordinal;
  }
  const std::int64_t equal = static_cast<std::int64_t>(entries.size()) - above - below;
  return {at(model).interval.stage == kStageKey ? above : below, equal};
}

std::pair<std::uint32_t, std::int64_t> SweepStats::tie_point(int model, std::int64_t rank, std::uint64_t tau, int order,
                                                             std::uint64_t seed,
                                                             const std::vector<std::int64_t>& offsets,
                                                             const std::vector<std::uint32_t>& tensor_ids) const {
  if (offsets.empty() || offsets.size() != tensor_ids.size())
    throw std::invalid_argument("a tie needs one offset and one tensor id for each tensor of the scope");
  const Interval interval = at(model).interval;
  std::vector<Entry> entries;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Entry& e : entries_of(model))
      if (interval.stage == kStageTie || e.ordinal == tau) entries.push_back(e);
  }
  const bool hash = order == 0;
  const bool has_words = interval.stage == kStageTie && order_ == 0;
  for (Entry& e : entries) {
    if (!hash) {
      e.ordinal = 0;
    } else if (!has_words) {
      const auto next = std::upper_bound(offsets.begin(), offsets.end(), static_cast<std::int64_t>(e.index));
      if (next == offsets.begin()) throw std::invalid_argument("an entry lies before the first tensor of the scope");
      const std::size_t t = static_cast<std::size_t>(next - offsets.begin()) - 1;
      const std::uint64_t g = e.index - static_cast<std::uint64_t>(offsets[t]);
      e.ordinal = philox_word(seed, tensor_ids[t], philox_stream(interval.model, kPurposeTie), g);
    }
  }
  if (rank < 1 || rank > static_cast<std::int64_t>(entries.size()))
    throw std::out_of_range("a rank lies outside the ties of the sweep");
  const auto nth = entries.begin() + (rank - 1);
  std::nth_element(entries.begin(), nth, entries.end(), [](const Entry& a, const Entry& b) {
    return a.ordinal != b.ordinal ? a.ordinal < b.ordinal : a.index < b.index;
  });
  return {static_cast<std::uint32_t>(nth->ordinal), static_cast<std::int64_t>(nth->index)};
}

NonFinite SweepStats::nonfinite(int source) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (source < 0 || source > num_searches()) throw std::out_of_range("no such source in this sweep");
  return nonfinite_[static_cast<std::size_t>(source)];
}

void SweepStats::add_locked(Model* model, std::int64_t before, const Entry* entries, std::int64_t n) {
  model->before += before;
  model->inside += n;
  if (model->bins.empty() && model->inside > capacity_) spill(model);
  if (model->bins.empty()) {
    model->entries.insert(model->entries.end(), entries, entries + n);
    return;
  }
  const int shift = bin_shift(model->interval.lo, model->interval.hi);
  for (std::int64_t i = 0; i < n; ++i) ++model->bins[(entries[i].ordinal - model->interval.lo) >> shift];
}

void SweepStats::add(int model, std::int64_t before, const Entry* entries, std::int64_t n, bool trusted) {
  const Interval& interval = at(model).interval;
  for (std::int64_t i = 0; !trusted && i < n; ++i)
    if (entries[i].ordinal < interval.lo || entries[i].ordinal > interval.hi)
      throw std::invalid_argument("an entry lies outside the interval of its model");
  const std::lock_guard<std::mutex> lock(mutex_);
  add_locked(&models_[static_cast<std::size_t>(model)], before, entries, n);
}

void SweepStats::add_histogram(int model, std::int64_t before, const std::int64_t* bins) {
  if (at(model).interval.stage == kStageOut) throw std::invalid_argument("a model that is left out has no histogram");
  const std::lock_guard<std::mutex> lock(mutex_);
  Model& m = models_[static_cast<std::size_t>(model)];
  spill(&m);
  m.before += before;
  for (int b = 0; b < kNumBins; ++b) {
    m.inside += bins[b];
    m.bins[static_cast<std::size_t>(b)] += bins[b];
  }
}

void SweepStats::add_nonfinite(int source, std::int64_t first, std::int64_t count) {
  if (source < 0 || source > num_searches()) throw std::out_of_range("no such source in this sweep");
  const std::lock_guard<std::mutex> lock(mutex_);
  merge_nonfinite(&nonfinite_[static_cast<std::size_t>(source)], first, count);
}

void SweepStats::merge(const SweepStats& other) {
  if (&other == this) throw std::invalid_argument("statistics cannot be merged with themselves");
  const std::scoped_lock lock(mutex_, other.mutex_);
  bool same = models_.size() == other.models_.size() && order_ == other.order_;
  for (std::size_t m = 0; same && m < models_.size(); ++m) {
    const Interval &a = models_[m].interval, &b = other.models_[m].interval;
    same = a.stage == b.stage && a.lo == b.lo && a.hi == b.hi && a.tau == b.tau && a.model == b.model;
  }
  if (!same) throw std::invalid_argument("statistics of different sweeps cannot be merged");
  for (std::size_t m = 0; m < models_.size(); ++m) {
    const Model& from = other.models_[m];
    Model& into = models_[m];
    if (from.bins.empty()) {
      const std::vector<Entry> entries(from.entries.begin(), from.entries.end());
      add_locked(&into, from.before, entries.data(), static_cast<std::int64_t>(entries.size()));
      continue;
    }
    spill(&into);
    into.before += from.before;
    into.inside += from.inside;
    for (int b = 0; b < kNumBins; ++b) into.bins[static_cast<std::size_t>(b)] += from.bins[static_cast<std::size_t>(b)];
  }
  for (std::size_t s = 0; s < nonfinite_.size(); ++s)
    merge_nonfinite(&nonfinite_[s], other.nonfinite_[s].first, other.nonfinite_[s].count);
}

std::string SweepStats::dump() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Writer w(kMagic);
  w.put_signed(order_);
  w.put_signed(capacity_);
  w.put(models_.size());
  for (const Model& m : models_) {
    w.put_signed(m.interval.stage);
    for (const std::uint64_t x : {m.interval.lo, m.interval.hi, m.interval.tau}) w.put(x);
    w.put_signed(m.interval.model);
    w.put_signed(m.before);
    w.put_signed(m.inside);
    w.put(m.entries.size());
    for (const Entry& e : m.entries) {
      w.put(e.ordinal);
      w.put(e.index);
    }
    w.put(m.bins.size());
    for (const std::int64_t b : m.bins) w.put_signed(b);
  }
  for (const NonFinite& n : nonfinite_) {
    w.put_signed(n.first);
    w.put_signed(n.count);
  }
  return w.take();
}

SweepStats* SweepStats::load(const std::string& data) {
  Parser p(data, kMagic);
  const int order = static_cast<int>(p.get_signed());
  const std::int64_t capacity = p.get_signed();
  std::vector<Model> models(static_cast<std::size_t>(p.get_count(8)));
  std::vector<Interval> intervals;
  for (Model& m : models) {
    m.interval.stage = static_cast<int>(p.get_signed());
    m.interval.lo = p.get();
    m.interval.hi = p.get();
    m.interval.tau = p.get();
    m.interval.model = static_cast<int>(p.get_signed());
    m.before = p.get_signed();
    m.inside = p.get_signed();
    m.entries.resize(static_cast<std::size_t>(p.get_count(2)));
    for (Entry& e : m.entries) {
      e.ordinal = p.get();
      e.index = p.get();
    }
    m.bins.resize(static_cast<std::size_t>(p.get_count(1)));
    if (!m.bins.empty() && m.bins.size() != kNumBins) Parser::fail();
    for (std::int64_t& b : m.bins) b = p.get_signed();
    intervals.push_back(m.interval);
  }
  auto* stats = new SweepStats(intervals, order, capacity);
  try {
    for (NonFinite& n : stats->nonfinite_) {
      n.first = p.get_signed();
      n.count = p.get_signed();
    }
    p.end();
  } catch (...) {
    delete stats;
    throw;
  }
  stats->models_ = std::move(models);
  return stats;
}

}  // namespace mergekernels
