// Accumulator of exact sums: block sums per slot and segment, folded by the tree over block numbers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mergekernels {

// Thread safe as long as no two threads set the same block. A block that is never set is +0.
class BlockSums {
 public:
  BlockSums(int num_slots, std::int64_t num_segments, std::int64_t segment_length);

  int num_slots() const { return num_slots_; }
  std::int64_t num_segments() const { return num_segments_; }
  std::int64_t segment_length() const { return segment_length_; }
  std::int64_t blocks_per_segment() const { return blocks_; }

  // Block `block` of segment `segment`; the blocks of a segment are adjacent, segments follow one another.
  double* at(int slot, std::int64_t segment, std::int64_t block);
  // Sets `n` blocks in that order, which may run over several segments.
  void set(int slot, std::int64_t segment, std::int64_t block, const double* sums, std::int64_t n);
  // One sum per segment.
  std::vector<double> fold(int slot) const;
  void merge(const BlockSums& other);
  std::string dump() const;
  static BlockSums* load(const std::string& data);

 private:
  int num_slots_;
  std::int64_t num_segments_, segment_length_, blocks_;
  std::vector<double> sums_;
};

}  // namespace mergekernels
