#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/ranks.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

// Elements that are gathered from strided tensors at a time; a multiple of kCanonicalBlock.
constexpr std::int64_t kGather = kCanonicalBlock;
// Elements whose ranks are found before they are worked on: several rows, which stay in the second-level cache.
constexpr std::int64_t kRankRun = 8 * kCanonicalBlock;

struct Call {
  const PassInputs& inputs;
  const View* out;
  StreamStats* stats;
  double* block_sums;
  const std::vector<int>* quantities;
  int num_slots;
  double* sums;  // of the first block of the piece
  std::int64_t sum_stride;
  int mark;
  const std::vector<std::uint8_t*>* bits;
  void (*kernel)(const StreamArgs*);
};

// Reads a source through its view: in place if it is contiguous, else through `buffer`.
Source source_at(const View& view, const Reader& reader, std::int64_t i, std::int64_t n, char* buffer) {
  if (reader.contiguous()) return Source{reader.at(i), view.dtype, view.cast};
  reader.gather(i, n, buffer);
  return Source{buffer, view.dtype, view.cast};
}

void run_range(const Call& call, std::int64_t begin, std::int64_t end) {
  const DefaultFloatEnvironment environment;
  const PassInputs& in = call.inputs;
  const Program& p = *in.program;
  const std::size_t num_inputs = in.models->size();
  std::vector<Reader> readers;
  readers.reserve(num_inputs + 2);
  bool dense = true;
  const auto add = [&](const View& view) {
    readers.emplace_back(view);
    dense = dense && readers.back().contiguous();
  };
  for (const View& view : *in.models) add(view);
  if (in.base != nullptr) add(*in.base);
  if (call.out != nullptr) add(*call.out);
  const Reader* base = in.base == nullptr ? nullptr : &readers[num_inputs];
  const Reader* out = call.out == nullptr ? nullptr : &readers.back();

  std::vector<std::unique_ptr<RankWindow>> ranks(num_inputs);
  bool ranking = false;
  for (int m = 0; m < p.num_models; ++m) {
    if (!ranked(p.keep[m])) continue;
    const auto k = static_cast<std::size_t>(m);
    ranks[k] = std::make_unique<RankWindow>(p, m, in.piece, (*in.models)[k], p.subtract ? in.base : nullptr, in.compute,
                                            kRankRun, call.bits == nullptr || call.sums != nullptr, *in.kernels);
    ranking = true;
  }

  const std::int64_t run = !dense ? kGather : ranking ? kRankRun : end - begin;
  const std::int64_t buffer = dense ? 0 : kGather * 8, own = stream_scratch_bytes(p, call.num_slots);
  const Scratch scratch(own + buffer * static_cast<std::int64_t>(readers.size()));
  char* const buffers = scratch.data() + own;

  StreamCounters counters{};
  StreamArgs args{};
  args.program = &p;
  args.piece = in.piece;
  args.out_dtype = call.out == nullptr ? kF32 : call.out->dtype;
  args.compute = in.compute;
  args.counters = call.stats == nullptr ? nullptr : &counters;
  args.block_sums = call.block_sums;
  args.block_stride = call.stats == nullptr ? 0 : call.stats->num_blocks();
  args.scratch = scratch.data();
  std::copy(in.marks->begin(), in.marks->end(), args.marks);
  if (call.quantities != nullptr) {
    args.quantities = call.quantities->data();
    args.num_quantities = static_cast<int>(call.quantities->size());
  }
  args.num_slots = call.num_slots;
  args.sum_stride = call.sum_stride;
  args.mark = call.mark;
  if (call.bits != nullptr) std::copy(call.bits->begin(), call.bits->end(), args.bits);
  for (std::int64_t i = begin; i < end; i += run) {
    args.first = i;
    args.n = std::min(run, end - i);
    if (call.sums != nullptr) args.sums = call.sums + i / kCanonicalBlock;
    for (std::size_t k = 0; k < num_inputs; ++k) {
      args.models[k] =
          source_at((*in.models)[k], readers[k], i, args.n, buffers + buffer * static_cast<std::int64_t>(k));
      if (ranks[k] == nullptr) continue;
      ranks[k]->move(i, i + args.n);
      args.ranks[k] = ranks[k]->mask(i);
      args.divisors[k] = ranks[k]->divisors(i);
    }
    if (base != nullptr)
      args.base = source_at(*in.base, *base, i, args.n, buffers + buffer * static_cast<std::int64_t>(num_inputs));
    char* const target = buffers + buffer * (static_cast<std::int64_t>(readers.size()) - 1);
    if (out != nullptr) args.out = out->contiguous() ? out->at(i) : target;
    call.kernel(&args);
    if (out != nullptr && !out->contiguous()) out->scatter(i, args.n, target);
  }
  if (call.stats != nullptr) call.stats->add(counters);
}

void run_pass(const Call& call) {
  const PassInputs& in = call.inputs;
  const std::int64_t n = in.piece.rows * in.piece.cols;
  std::int64_t bytes_each = in.base == nullptr ? 0 : itemsize(in.base->dtype);
  for (const View& view : *in.models) bytes_each += itemsize(view.dtype);
  parallel_ranges(n, kCanonicalBlock, team_size(in.threads, n * bytes_each),
                  [&call](std::int64_t begin, std::int64_t end) { run_range(call, begin, end); });
}

bool flat(const Piece& piece) { return piece.rows <= 1 || piece.ld == piece.cols; }

void check_table(const Table& table, const Piece& piece) {
  const std::int64_t n = piece.rows * piece.cols;
  if (table.axis != kTableRows || n == 0) return;
  if (flat_index(piece, n - 1) / table.length >= table.segments)
    throw std::invalid_argument("a table has fewer rows than the piece");
}

void check_inputs(const PassInputs& in) {
  const Program& p = *in.program;
  check_piece(in.piece);
  if (static_cast<int>(in.models->size()) != p.num_inputs)
    throw std::invalid_argument("the program is written for another number of models");
  if (p.has_base && in.base == nullptr) throw std::invalid_argument("the program needs a base");
  if (p.copy && in.models->size() != 1) throw std::invalid_argument("a copy takes one model");
  if (in.compute != kF32 && in.compute != kF64) throw std::invalid_argument("arithmetic is in float32 or float64");
  for (const View& view : *in.models) check_view(view, in.piece, "a model");
  if (in.base != nullptr) check_view(*in.base, in.piece, "the base");
  check_table(p.table, in.piece);
  check_table(p.importance, in.piece);
  const std::int64_t n = in.piece.rows * in.piece.cols;
  for (int m = 0; m < p.num_models; ++m) {
    if (p.keep[m].kind == kRuleMarked && n > 0) {
      if (static_cast<std::size_t>(m) >= in.marks->size() || (*in.marks)[static_cast<std::size_t>(m)] == nullptr)
        throw std::invalid_argument("a model is kept by marks that are not given");
      if (!flat(in.piece)) throw std::invalid_argument("marks need flat pieces");
    }
    if (!ranked(p.keep[m])) continue;
    const std::int64_t slab = p.row_length * p.row_stride;
    if (!flat(in.piece) || in.piece.g0 % slab != 0 || n % slab != 0)
      throw std::invalid_argument("rules by rank need flat pieces of whole rows");
  }
}

// Whole canonical blocks of a tensor of `blocks` blocks, from the first of which the number is returned.
std::int64_t first_block(const Piece& piece, std::int64_t blocks, const char* what) {
  const std::int64_t n = piece.rows * piece.cols, first = piece.g0 / kCanonicalBlock;
  const std::int64_t count = (n + kCanonicalBlock - 1) / kCanonicalBlock;
  const bool whole = n % kCanonicalBlock == 0 || first + count == blocks;
  if (!flat(piece) || piece.g0 % kCanonicalBlock != 0 || !whole)
    throw std::invalid_argument(std::string(what) + " need flat pieces of whole blocks of 4096 elements");
  return first;
}

}  // namespace

void stream(const PassInputs& in, const View* out, StreamStats* stats) {
  check_inputs(in);
  if (stats != nullptr && stats->num_models() != in.program->num_inputs)
    throw std::invalid_argument("the statistics are for another number of models");
  if (out != nullptr) {
    check_view(*out, in.piece, "the output");
    if (out->cast >= 0) throw std::invalid_argument("the output has no load cast");
  }
  const std::int64_t n = in.piece.rows * in.piece.cols;
  double* block_sums = nullptr;
  if (stats != nullptr && stats->num_blocks() > 0 && n > 0) {
    const std::int64_t first = first_block(in.piece, stats->num_blocks(), "norms");
    block_sums = stats->blocks(first, (n + kCanonicalBlock - 1) / kCanonicalBlock);
  }
  run_pass({in, out, stats, block_sums, nullptr, 0, nullptr, 0, 0, nullptr, in.kernels->stream});
}

void reduce(const PassInputs& in, const std::vector<int>& quantities, BlockSums* sums,
            const std::vector<std::uint8_t*>& bits) {
  check_inputs(in);
  if (!bits.empty() && (in.program->copy || static_cast<int>(bits.size()) != in.program->num_models))
    throw std::invalid_argument("what is kept is written for each model of a program that does not copy");
  int num_slots = 0;
  for (const int quantity : quantities) {
    if (quantity < kAbs || quantity > kMergedAbs) throw std::invalid_argument("no such quantity");
    if ((quantity == kImportanceSquares || quantity == kNegativeCount) &&
        in.program->num_inputs == in.program->num_models)
      throw std::invalid_argument("the program has no importances to sum");
    num_slots += quantity >= kTotalAbs ? 1 : in.program->num_models;
  }
  if (num_slots == 0 || sums->num_slots() != num_slots || sums->num_segments() != 1)
    throw std::invalid_argument("the sums are for another request");
  if (in.piece.rows * in.piece.cols == 0) return;
  const std::int64_t first = first_block(in.piece, sums->blocks_per_segment(), "sums");
  const std::int64_t last = first + (in.piece.rows * in.piece.cols - 1) / kCanonicalBlock;
  sums->at(0, 0, last);  // throws if it lies outside
  run_pass({in, nullptr, nullptr, nullptr, &quantities, num_slots, sums->at(0, 0, first), sums->blocks_per_segment(), 0,
            bits.empty() ? nullptr : &bits, in.kernels->reduce});
}

void mark(const PassInputs& in, int kind, const std::vector<std::uint8_t*>& bits) {
  check_inputs(in);
  if (kind < kMarkKept || kind > kMarkUseful) throw std::invalid_argument("no such kind of mark");
  if (kind == kMarkUseful && !in.program->has_useful)
    throw std::invalid_argument("the program has no rule of useful models");
  if (static_cast<int>(bits.size()) != in.program->num_models)
    throw std::invalid_argument("marks are written for each model");
  if (!flat(in.piece) || in.piece.g0 % 8 != 0)
    throw std::invalid_argument("marks need flat pieces that begin at a multiple of 8");
  run_pass({in, nullptr, nullptr, nullptr, nullptr, 0, nullptr, 0, kind, &bits, in.kernels->mark});
}

}  // namespace mergekernels
