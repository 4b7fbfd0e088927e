#include <algorithm>
#include <stdexcept>

#include "common/tree.h"
#include "cpu/bytes.h"
#include "cpu/stats.h"

namespace mergekernels {

namespace {

constexpr char kMagic[] = "MKstrm01";

}  // namespace

StreamStats::StreamStats(int num_models, std::int64_t num_blocks)
    : num_models_(num_models), num_blocks_(num_blocks), counters_() {
  if (num_models < 1 || num_models > kMaxModels) throw std::invalid_argument("a stream pass takes 1 to 64 models");
  if (num_blocks < 0) throw std::invalid_argument("the number of blocks is negative");
  for (NonFinite& n : counters_.nonfinite) n = NonFinite{-1, 0};
  sums_.assign(static_cast<std::size_t>(num_models) * static_cast<std::size_t>(num_blocks), 0.0);
}

void StreamStats::check_model(int model) const {
  if (model < 0 || model >= num_models_) throw std::out_of_range("no such model in these statistics");
}

std::int64_t StreamStats::kept(int model) const {
  check_model(model);
  const std::lock_guard<std::mutex> lock(mutex_);
  return counters_.kept[model];
}

std::int64_t StreamStats::conflicts() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return counters_.conflicts;
}

std::pair<std::int64_t, std::int64_t> StreamStats::votes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {counters_.positive, counters_.negative};
}

NonFinite StreamStats::nonfinite(int source) const {
  if (source < 0 || source > num_models_ + 1) throw std::out_of_range("no such source in these statistics");
  const std::lock_guard<std::mutex> lock(mutex_);
  return counters_.nonfinite[source];
}

double StreamStats::sum_squares(int model) const {
  check_model(model);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto first = sums_.begin() + model * num_blocks_;
  std::vector<double> sums(first, first + num_blocks_);
  return fold_blocks(sums.data(), num_blocks_);
}

void StreamStats::add(const StreamCounters& c) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int m = 0; m < num_models_; ++m) counters_.kept[m] += c.kept[m];
  counters_.conflicts += c.conflicts;
  counters_.positive += c.positive;
  counters_.negative += c.negative;
  for (int s = 0; s < num_models_ + 2; ++s)
    merge_nonfinite(&counters_.nonfinite[s], c.nonfinite[s].first, c.nonfinite[s].count);
}

void StreamStats::add_nonfinite(int source, std::int64_t first, std::int64_t count) {
  if (source < 0 || source > num_models_ + 1) throw std::out_of_range("no such source in these statistics");
  const std::lock_guard<std::mutex> lock(mutex_);
  merge_nonfinite(&counters_.nonfinite[source], first, count);
}

double* StreamStats::blocks(std::int64_t first, std::int64_t n) {
  if (first < 0 || n < 0 || first + n > num_blocks_) throw std::out_of_range("the blocks lie outside the tensor's");
  return sums_.data() + first;
}

void StreamStats::set_blocks(int model, std::int64_t first, const double* sums, std::int64_t n) {
  check_model(model);
  std::copy(sums, sums + n, blocks(first, n) + model * num_blocks_);
}

void StreamStats::merge(const StreamStats& other) {
  if (&other == this) throw std::invalid_argument("statistics cannot be merged with themselves");
  if (num_models_ != other.num_models_ || num_blocks_ != other.num_blocks_)
    throw std::invalid_argument("statistics of different passes cannot be merged");
  StreamCounters counters;
  std::vector<double> sums;
  {
    const std::lock_guard<std::mutex> lock(other.mutex_);
    counters = other.counters_;
    sums = other.sums_;
  }
  add(counters);
  const std::lock_guard<std::mutex> lock(mutex_);
  // A block belongs to one side only, and a block without data is +0.
  for (std::size_t i = 0; i < sums.size(); ++i) sums_[i] += sums[i];
}

std::string StreamStats::dump() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Writer w(kMagic);
  w.put_signed(num_models_);
  w.put_signed(num_blocks_);
  for (int m = 0; m < num_models_; ++m) w.put_signed(counters_.kept[m]);
  w.put_signed(counters_.conflicts);
  w.put_signed(counters_.positive);
  w.put_signed(counters_.negative);
  for (int s = 0; s < num_models_ + 2; ++s) {
    w.put_signed(counters_.nonfinite[s].first);
    w.put_signed(counters_.nonfinite[s].count);
  }
  w.put(sums_.size());
  for (const double x : sums_) w.put(bits_as<std::uint64_t>(x));
  return w.take();
}

StreamStats* StreamStats::load(const std::string& data) {
  Parser p(data, kMagic);
  const std::int64_t num_models = p.get_signed(), num_blocks = p.get_signed();
  if (num_models < 1 || num_models > kMaxModels || num_blocks < 0 ||
      static_cast<std::uint64_t>(num_blocks) > data.size() / 8)
    Parser::fail();
  auto* stats = new StreamStats(static_cast<int>(num_models), num_blocks);
  try {
    StreamCounters& c = stats->counters_;
    for (int m = 0; m < num_models; ++m) c.kept[m] = p.get_signed();
    c.conflicts = p.get_signed();
    c.positive = p.get_signed();
    c.negative = p.get_signed();
    for (int s = 0; s < num_models + 2; ++s) {
      c.nonfinite[s].first = p.get_signed();
      c.nonfinite[s].count = p.get_signed();
    }
    if (p.get_count(1) != static_cast<std::int64_t>(stats->sums_.size())) Parser::fail();
    for (double& x : stats->sums_) x = bits_as<double>(p.get());
    p.end();
  } catch (...) {
    delete stats;
    throw;
  }
  return stats;
}

}  // namespace mergekernels
