// Accumulators of sweeps and stream passes. Thread safe; merging is exact and does not depend on the order.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace mergekernels {

constexpr int kNumBins = 4096;

// The smallest shift for which (hi - lo) >> shift is below kNumBins.
int bin_shift(std::uint64_t lo, std::uint64_t hi);

struct Entry {
  std::uint64_t ordinal, index;
};

class SweepStats {
 public:
  struct Interval {
    int stage;
    std::uint64_t lo, hi, tau;
    int model;  // whose Philox stream orders the ties
  };

  SweepStats(std::vector<Interval> intervals, int order, std::int64_t capacity);

  int num_searches() const { return static_cast<int>(models_.size()); }
  int order() const { return order_; }
  std::int64_t capacity() const { return capacity_; }
  const Interval& interval(int model) const { return at(model).interval; }
  std::int64_t before(int model) const;
  std::int64_t inside(int model) const;
  bool overflowed(int model) const;
  std::vector<std::int64_t> histogram(int model) const;
  std::vector<std::uint64_t> order_statistics(int model, const std::vector<std::int64_t>& ranks) const;
  std::pair<std::int64_t, std::int64_t> count_ordinal(int model, std::uint64_t ordinal) const;
  std::pair<std::uint32_t, std::int64_t> tie_point(int model, std::int64_t rank, std::uint64_t tau, int order,
                                                   std::uint64_t seed, const std::vector<std::int64_t>& offsets,
                                                   const std::vector<std::uint32_t>& tensor_ids) const;
  NonFinite nonfinite(int source) const;

  // `trusted`: the entries are known to lie inside the interval.
  void add(int model, std::int64_t before, const Entry* entries, std::int64_t n, bool trusted = false);
  // kNumBins counts of entries that are not handed over.
  void add_histogram(int model, std::int64_t before, const std::int64_t* bins);
  void add_nonfinite(int source, std::int64_t first, std::int64_t count);
  void merge(const SweepStats& other);
  std::string dump() const;
  static SweepStats* load(const std::string& data);

 private:
  struct Model {
    Interval interval;
    std::int64_t before = 0, inside = 0;
    std::deque<Entry> entries;       // until they overflow; grows without moving
    std::vector<std::int64_t> bins;  // then
  };

  const Model& at(int model) const;
  const std::deque<Entry>& entries_of(int model) const;  // throws if they overflowed; needs the lock
  void add_locked(Model* model, std::int64_t before, const Entry* entries, std::int64_t n);
  static void spill(Model* model);

  std::vector<Model> models_;
  std::vector<NonFinite> nonfinite_;
  int order_;
  std::int64_t capacity_;
  mutable std::mutex mutex_;
};

class StreamStats {
 public:
  StreamStats(int num_models, std::int64_t num_blocks);

  int num_models() const { return num_models_; }
  std::int64_t num_blocks() const { return num_blocks_; }
  std::int64_t kept(int model) const;
  std::int64_t conflicts() const;
  std::pair<std::int64_t, std::int64_t> votes() const;
  NonFinite nonfinite(int source) const;
  double sum_squares(int model) const;

  void add(const StreamCounters& counters);
  void add_nonfinite(int source, std::int64_t first, std::int64_t count);
  void set_blocks(int model, std::int64_t first, const double* sums, std::int64_t n);
  // Sums of blocks `first` .. `first + n - 1`, the models num_blocks() apart; different threads write different blocks.
  double* blocks(std::int64_t first, std::int64_t n);
  void merge(const StreamStats& other);
  std::string dump() const;
  static StreamStats* load(const std::string& data);

 private:
  void check_model(int model) const;

  int num_models_;
  std::int64_t num_blocks_;
  StreamCounters counters_;
  std::vector<double> sums_;
  mutable std::mutex mutex_;
};

void merge_nonfinite(NonFinite* into, std::int64_t first, std::int64_t count);

}  // namespace mergekernels
