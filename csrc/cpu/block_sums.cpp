#include "cpu/block_sums.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "common/tree.h"
#include "cpu/bytes.h"
#include "cpu/kernels.h"

namespace mergekernels {

namespace {

constexpr char kMagic[] = "MKsums01";

}  // namespace

BlockSums::BlockSums(int num_slots, std::int64_t num_segments, std::int64_t segment_length)
    : num_slots_(num_slots), num_segments_(num_segments), segment_length_(segment_length), blocks_(0) {
  if (num_slots < 1 || num_segments < 1 || segment_length < 0)
    throw std::invalid_argument("sums need at least one slot and one segment, and a length of at least 0");
  blocks_ = (segment_length + kCanonicalBlock - 1) / kCanonicalBlock;
  sums_.assign(static_cast<std::size_t>(num_slots * num_segments * blocks_), 0.0);
}

double* BlockSums::at(int slot, std::int64_t segment, std::int64_t block) {
  if (slot < 0 || slot >= num_slots_ || segment < 0 || segment >= num_segments_ || block < 0 || block >= blocks_)
    throw std::out_of_range("a block lies outside these sums");
  return sums_.data() + (slot * num_segments_ + segment) * blocks_ + block;
}

void BlockSums::set(int slot, std::int64_t segment, std::int64_t block, const double* sums, std::int64_t n) {
  if (n <= 0) return;
  double* const first = at(slot, segment, block);
  if (segment * blocks_ + block + n > num_segments_ * blocks_)
    throw std::out_of_range("a block lies outside these sums");
  std::copy(sums, sums + n, first);
}

std::vector<double> BlockSums::fold(int slot) const {
  if (slot < 0 || slot >= num_slots_) throw std::out_of_range("no such slot in these sums");
  std::vector<double> result(static_cast<std::size_t>(num_segments_)), blocks;
  const double* from = sums_.data() + slot * num_segments_ * blocks_;
  for (std::int64_t s = 0; s < num_segments_; ++s, from += blocks_) {
    if (blocks_ == 1) {
      result[static_cast<std::size_t>(s)] = *from;
      continue;
    }
    blocks.assign(from, from + blocks_);
    result[static_cast<std::size_t>(s)] = fold_blocks(blocks.data(), blocks_);
  }
  return result;
}

void BlockSums::merge(const BlockSums& other) {
  if (&other == this) throw std::invalid_argument("sums cannot be merged with themselves");
  if (num_slots_ != other.num_slots_ || num_segments_ != other.num_segments_ ||
      segment_length_ != other.segment_length_)
    throw std::invalid_argument("sums of different passes cannot be merged");
  // A block belongs to one side only, and a block without data is +0.
  for (std::size_t i = 0; i < sums_.size(); ++i) sums_[i] += other.sums_[i];
}

std::string BlockSums::dump() const {
  Writer w(kMagic);
  w.put_signed(num_slots_);
  w.put_signed(num_segments_);
  w.put_signed(segment_length_);
  w.put(sums_.size());
  for (const double x : sums_) w.put(bits_as<std::uint64_t>(x));
  return w.take();
}

BlockSums* BlockSums::load(const std::string& data) {
  Parser p(data, kMagic);
  const std::int64_t num_slots = p.get_signed(), num_segments = p.get_signed(), length = p.get_signed();
  const std::int64_t size = p.get_count(1);
  if (num_slots < 1 || num_slots > size || num_segments < 1 || num_segments > size || length < 0 ||
      (length + kCanonicalBlock - 1) / kCanonicalBlock > size / (num_slots * num_segments))
    Parser::fail();
  auto sums = std::make_unique<BlockSums>(static_cast<int>(num_slots), num_segments, length);
  if (size != static_cast<std::int64_t>(sums->sums_.size())) Parser::fail();
  for (double& x : sums->sums_) x = bits_as<double>(p.get());
  p.end();
  return sums.release();
}

}  // namespace mergekernels
