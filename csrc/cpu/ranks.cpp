#include "cpu/ranks.h"

#include <algorithm>
#include <cstring>

namespace mergekernels {

RankWindow::RankWindow(const Program& program, int model, const Piece& piece, const View& view, const View* base,
                       int compute, std::int64_t widest, bool skip_zeros, const Kernels& kernels)
    : program_(program),
      model_(model),
      piece_(piece),
      view_(view),
      base_(base),
      reader_(view),
      base_reader_(base == nullptr ? view : *base),
      kernels_(kernels),
      compute_(compute),
      skip_zeros_(skip_zeros),
      slab_(program.row_length * program.row_stride),
      item_(compute == kF64 ? 8 : 4),
      scratch_(rank_scratch_bytes(program.row_length, program.row_stride)) {
  const std::int64_t size = std::min(piece.rows * piece.cols, ((widest + slab_ - 1) / slab_ + 1) * slab_);
  mask_.resize(static_cast<std::size_t>(size));
  if (program.keep[model].divide) divisors_.resize(static_cast<std::size_t>(size * item_));
}

void RankWindow::move(std::int64_t begin, std::int64_t end) {
  const std::int64_t first = begin / slab_ * slab_, last = (end + slab_ - 1) / slab_ * slab_;
  const std::int64_t held = last_ > first ? last_ - first : 0;
  if (held > 0 && first > first_) {
    std::memmove(mask_.data(), mask_.data() + (first - first_), static_cast<std::size_t>(held));
    if (!divisors_.empty())
      std::memmove(divisors_.data(), divisors_.data() + (first - first_) * item_,
                   static_cast<std::size_t>(held * item_));
  }
  first_ = first;
  const std::int64_t from = first + held, n = last - from;
  last_ = std::max(last, from);
  if (n <= 0) return;
  const auto source = [&](const View& view, const Reader& reader, std::vector<char>* gathered) {
    if (reader.contiguous()) return Source{reader.at(from), view.dtype, view.cast};
    gathered->resize(static_cast<std::size_t>(n * reader.item()));
    reader.gather(from, n, gathered->data());
    return Source{gathered->data(), view.dtype, view.cast};
  };
  RankArgs args{};
  args.rule = &program_.keep[model_];
  args.model = source(view_, reader_, &gathered_);
  if (base_ != nullptr) args.base = source(*base_, base_reader_, &gathered_base_);
  args.g = piece_.g0 + from;
  args.slabs = n / slab_;
  args.length = program_.row_length;
  args.stride = program_.row_stride;
  args.seed = program_.seed;
  args.tensor = program_.tensor;
  args.number = model_;
  args.compute = compute_;
  args.skip_zeros = skip_zeros_;
  args.mask = mask_.data() + (from - first_);
  args.divisors = divisors_.empty() ? nullptr : divisors_.data() + (from - first_) * item_;
  args.scratch = scratch_.data();
  kernels_.rank_masks(&args);
}

}  // namespace mergekernels
