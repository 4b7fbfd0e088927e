#include "cpu/learned.h"

#include <algorithm>
#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

struct Call {
  const LearnedRequest& request;
  const Piece& piece;
  double* sums;
  std::int64_t slot_stride, slots;
  const View* base;
  const std::vector<View>& models;
  const View *gradient, *logits, *out;
  int compute;
  const Kernels& kernels;
};

// Reads a source in place if it is contiguous, else through a buffer of one canonical block.
Source source_at(const View& view, const Reader& reader, std::int64_t i, std::int64_t n, char* buffer) {
  if (reader.contiguous()) return Source{reader.at(i), view.dtype, view.cast};
  reader.gather(i, n, buffer);
  return Source{buffer, view.dtype, view.cast};
}

// Elements begin .. end - 1 of the piece; `begin` is a multiple of kCanonicalBlock.
void learned_range(const Call& call, std::int64_t begin, std::int64_t end) {
  const DefaultFloatEnvironment environment;
  const LearnedRequest& request = call.request;
  std::vector<const View*> views;
  for (const View& view : call.models) views.push_back(&view);
  const std::size_t num_models = views.size();
  for (const View* view : {call.base, call.gradient, call.logits, call.out}) views.push_back(view);
  std::vector<Reader> readers;
  readers.reserve(views.size());
  bool dense = true;
  for (const View* view : views) {
    readers.emplace_back(view == nullptr ? View{} : *view);
    dense = dense && (view == nullptr || readers.back().contiguous());
  }
  const std::int64_t fixed = learned_scratch_bytes(call.slots);
  const std::int64_t each = dense ? 0 : kCanonicalBlock * 8;
  const Scratch scratch(fixed + each * static_cast<std::int64_t>(views.size()));
  LearnedArgs args{};
  args.pass = request.pass;
  args.num_models = static_cast<int>(num_models);
  args.groups = request.groups;
  args.group_draw = request.group_draw;
  args.mask_draw = request.mask_draw;
  args.masked = request.masked;
  args.temperature = request.temperature;
  args.mean = request.mean;
  args.shift = request.shift;
  for (std::size_t m = 0; m < request.weights.size(); ++m) args.weights[m] = request.weights[m];
  args.compute = call.compute;
  args.slot_stride = call.slot_stride;
  args.out_dtype = call.out == nullptr ? kF32 : call.out->dtype;
  args.scratch = scratch.data();
  const std::int64_t run = dense ? end - begin : kCanonicalBlock;
  for (std::int64_t i = begin; i < end; i += run) {
    args.g0 = call.piece.g0 + i;
    args.n = std::min(run, end - i);
    const auto buffer = [&](std::size_t s) { return scratch.data() + fixed + each * static_cast<std::int64_t>(s); };
    const auto source = [&](std::size_t s) {
      return views[s] == nullptr ? Source{} : source_at(*views[s], readers[s], i, args.n, buffer(s));
    };
    for (std::size_t m = 0; m < num_models; ++m) args.models[m] = source(m);
    args.base = source(num_models);
    args.gradient = source(num_models + 1);
    args.logits = source(num_models + 2);
    args.sums = call.sums == nullptr ? nullptr : call.sums + i / kCanonicalBlock;
    const std::size_t last = num_models + 3;
    const bool direct = call.out != nullptr && readers[last].contiguous();
    args.out = call.out == nullptr ? nullptr : (direct ? readers[last].at(i) : buffer(last));
    call.kernels.learned(&args);
    if (call.out != nullptr && !direct) readers[last].scatter(i, args.n, buffer(last));
  }
}

}  // namespace

void learned(const LearnedRequest& request, BlockSums* sums, const Piece& piece, const View* base,
             const std::vector<View>& models, const View* gradient, const View* logits, const View* out, int compute,
             int threads, const Kernels& kernels) {
  check_piece(piece);
  const bool needs_mask = request.pass != kSegDot || request.masked;
  const bool needs_gradient = request.pass == kSegDot || request.pass == kMaskSlope;
  const bool needs_sums = request.pass == kSegDot || request.pass == kMaskSum;
  if (request.pass < kSegDot || request.pass > kMaskSlope) throw std::invalid_argument("no such pass");
  if (models.size() > kMaxModels || (models.empty() && request.pass != kMaskSum))
    throw std::invalid_argument("this pass takes 1 to 64 models");
  if (needs_mask != (logits != nullptr) || needs_gradient != (gradient != nullptr) || needs_sums != (sums != nullptr) ||
      needs_sums == (out != nullptr))
    throw std::invalid_argument("the inputs do not fit the pass");
  if (!needs_sums && request.weights.size() != models.size())
    throw std::invalid_argument("a merge needs one weight for each model");
  if (request.groups < 1 || request.groups > 256) throw std::invalid_argument("there are 1 to 256 groups");
  if (compute != kF32 && compute != kF64) throw std::invalid_argument("arithmetic is in float32 or float64");
  std::int64_t bytes_each = 0;
  const auto check = [&](const View* view, const char* what) {
    if (view == nullptr) return;
    check_view(*view, piece, what);
    bytes_each += itemsize(view->dtype);
  };
  for (const View& view : models) check(&view, "a model");
  check(base, "the base");
  check(gradient, "the gradient");
  check(logits, "the logits");
  check(out, "the output");
  const std::int64_t n = piece.rows * piece.cols;
  if (n == 0) return;
  const bool flat = piece.rows == 1 || piece.ld == piece.cols;
  if (!flat) throw std::invalid_argument("this pass needs flat pieces");
  std::int64_t slots = 0;
  double* first = nullptr;
  if (sums != nullptr) {
    slots = request.pass == kMaskSum ? 1 : static_cast<std::int64_t>(models.size()) * request.groups;
    const std::int64_t blocks = (n + kCanonicalBlock - 1) / kCanonicalBlock, block = piece.g0 / kCanonicalBlock;
    const bool whole = n % kCanonicalBlock == 0 || piece.g0 + n == sums->segment_length();
    if (sums->num_slots() != slots || sums->num_segments() != 1 || piece.g0 % kCanonicalBlock != 0 || !whole ||
        block + blocks > sums->blocks_per_segment())
      throw std::invalid_argument("sums need pieces of whole blocks of 4096 elements, and a slot for each sum");
    first = sums->at(0, 0, block);
  }
  const Call call{request, piece, first,   sums == nullptr ? 0 : sums->blocks_per_segment(),
                  slots,   base,  models,  gradient,
                  logits,  out,   compute, kernels};
  parallel_ranges(n, kCanonicalBlock, team_size(threads, n * bytes_each),
                  [&call](std::int64_t begin, std::int64_t end) { learned_range(call, begin, end); });
}

}  // namespace mergekernels
