// What rules by rank keep, slab by slab as a pass goes on.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/view.h"

namespace mergekernels {

// For one model of one thread. Windows are asked for in ascending order.
class RankWindow {
 public:
  // piece: flat, of whole slabs. base: null if no deltas are taken. widest: elements of the largest window.
  // skip_zeros: what is said of deltas that are zero does not matter.
  RankWindow(const Program& program, int model, const Piece& piece, const View& view, const View* base, int compute,
             std::int64_t widest, bool skip_zeros, const Kernels& kernels);

  // Ranks the slabs that overlap elements begin .. end - 1 of the piece, those that are not yet.
  void move(std::int64_t begin, std::int64_t end);
  // Of the element with ordinal i.
  const std::int8_t* mask(std::int64_t i) const { return mask_.data() + (i - first_); }
  const void* divisors(std::int64_t i) const {
    return divisors_.empty() ? nullptr : divisors_.data() + (i - first_) * item_;
  }

 private:
  const Program& program_;
  int model_;
  const Piece& piece_;
  const View& view_;
  const View* base_;
  Reader reader_, base_reader_;
  const Kernels& kernels_;
  int compute_;
  bool skip_zeros_;
  std::int64_t slab_, item_;
  std::int64_t first_ = 0, last_ = 0;  // the elements that are there, whole slabs
  std::vector<std::int8_t> mask_;
  std::vector<char> divisors_, gathered_, gathered_base_;
  Scratch scratch_;
};

}  // namespace mergekernels
