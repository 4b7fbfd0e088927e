#include <algorithm>
#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

// Elements that are gathered from strided tensors at a time; a multiple of kCanonicalBlock.
constexpr std::int64_t kGather = kCanonicalBlock;

struct Call {
  const Program& program;
  const Piece& piece;
  const View* base;
  const std::vector<View>& models;
  const View* out;
  int compute;
  StreamStats* stats;
  const Kernels& kernels;
  double* block_sums;
};

// Reads a source through its view: in place if it is contiguous, else through `buffer`.
Source source_at(const View& view, const Reader& reader, std::int64_t i, std::int64_t n, char* buffer) {
  if (reader.contiguous()) return Source{reader.at(i), view.dtype, view.cast};
  reader.gather(i, n, buffer);
  return Source{buffer, view.dtype, view.cast};
}

void stream_range(const Call& call, std::int64_t begin, std::int64_t end) {
  const DefaultFloatEnvironment environment;
  const int num_models = call.program.num_models;
  std::vector<Reader> readers;
  readers.reserve(static_cast<std::size_t>(num_models) + 2);
  bool dense = true;
  const auto add = [&](const View& view) {
    readers.emplace_back(view);
    dense = dense && readers.back().contiguous();
  };
  for (const View& view : call.models) add(view);
  if (call.base != nullptr) add(*call.base);
  if (call.out != nullptr) add(*call.out);
  const Reader* base = call.base == nullptr ? nullptr : &readers[static_cast<std::size_t>(num_models)];
  const Reader* out = call.out == nullptr ? nullptr : &readers.back();

  const std::int64_t run = dense ? end - begin : kGather;
  const std::int64_t buffer = dense ? 0 : kGather * 8;
  const Scratch scratch(stream_scratch_bytes(num_models) + buffer * static_cast<std::int64_t>(readers.size()));
  char* const buffers = scratch.data() + stream_scratch_bytes(num_models);

  StreamCounters counters{};
  StreamArgs args{};
  args.program = &call.program;
  args.piece = call.piece;
  args.out_dtype = call.out == nullptr ? kF32 : call.out->dtype;
  args.compute = call.compute;
  args.counters = call.stats == nullptr ? nullptr : &counters;
  args.block_sums = call.block_sums;
  args.block_stride = call.stats == nullptr ? 0 : call.stats->num_blocks();
  args.scratch = scratch.data();
  for (std::int64_t i = begin; i < end; i += run) {
    args.first = i;
    args.n = std::min(run, end - i);
    for (int m = 0; m < num_models; ++m) {
      const auto k = static_cast<std::size_t>(m);
      args.models[m] = source_at(call.models[k], readers[k], i, args.n, buffers + buffer * m);
    }
    if (base != nullptr) args.base = source_at(*call.base, *base, i, args.n, buffers + buffer * num_models);
    char* const target = buffers + buffer * (static_cast<std::int64_t>(readers.size()) - 1);
    if (out != nullptr) args.out = out->contiguous() ? out->at(i) : target;
    call.kernels.stream(&args);
    if (out != nullptr && !out->contiguous()) out->scatter(i, args.n, target);
  }
  if (call.stats != nullptr) call.stats->add(counters);
}

void check(const Program& program, const View* base, const std::vector<View>& models, int compute,
           const StreamStats* stats) {
  if (models.empty() || models.size() > kMaxModels) throw std::invalid_argument("a stream pass takes 1 to 64 models");
  if (static_cast<int>(models.size()) != program.num_models)
    throw std::invalid_argument("the program is written for another number of models");
  if (program.has_base && base == nullptr) throw std::invalid_argument("the program needs a base");
  if (program.copy && models.size() != 1) throw std::invalid_argument("a copy takes one model");
  if (compute != kF32 && compute != kF64) throw std::invalid_argument("arithmetic is in float32 or float64");
  if (stats != nullptr && stats->num_models() != program.num_models)
    throw std::invalid_argument("the statistics are for another number of models");
}

}  // namespace

void stream(const Program& program, const Piece& piece, const View* base, const std::vector<View>& models,
            const View* out, int compute, StreamStats* stats, int threads, const Kernels& kernels) {
  check_piece(piece);
  check(program, base, models, compute, stats);
  std::int64_t bytes_each = 0;
  for (const View& view : models) {
    check_view(view, piece, "a model");
    bytes_each += itemsize(view.dtype);
  }
  if (base != nullptr) {
    check_view(*base, piece, "the base");
    bytes_each += itemsize(base->dtype);
  }
  if (out != nullptr) {
    check_view(*out, piece, "the output");
    if (out->cast >= 0) throw std::invalid_argument("the output has no load cast");
  }
  const std::int64_t n = piece.rows * piece.cols;
  double* block_sums = nullptr;
  if (stats != nullptr && stats->num_blocks() > 0 && n > 0) {
    const std::int64_t blocks = (n + kCanonicalBlock - 1) / kCanonicalBlock;
    const std::int64_t block = piece.g0 / kCanonicalBlock;
    const bool flat = piece.rows == 1 || piece.ld == piece.cols;
    const bool whole = n % kCanonicalBlock == 0 || block + blocks == stats->num_blocks();
    if (!flat || piece.g0 % kCanonicalBlock != 0 || !whole)
      throw std::invalid_argument("norms need flat pieces of whole blocks of 4096 elements");
    block_sums = stats->blocks(block, blocks);
  }
  const Call call{program, piece, base, models, out, compute, stats, kernels, block_sums};
  parallel_ranges(n, kCanonicalBlock, team_size(threads, n * bytes_each),
                  [&call](std::int64_t begin, std::int64_t end) { stream_range(call, begin, end); });
}

}  // namespace mergekernels
