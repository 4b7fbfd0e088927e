#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

std::vector<double> divergence(std::int64_t length, const Piece& piece, const View& base, const View& model,
                               int compute, int threads, const Kernels& kernels) {
  check_piece(piece);
  check_view(base, piece, "the base");
  check_view(model, piece, "a model");
  if (compute != kF32 && compute != kF64) throw std::invalid_argument("arithmetic is in float32 or float64");
  const std::int64_t n = piece.rows * piece.cols;
  const bool flat = piece.rows <= 1 || piece.ld == piece.cols;
  if (length < 1 || !flat || piece.g0 % length != 0 || n % length != 0)
    throw std::invalid_argument("divergences need flat pieces of whole rows");
  std::vector<double> result(static_cast<std::size_t>(n / length));
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    const DefaultFloatEnvironment environment;
    const Reader readers[2] = {Reader(base), Reader(model)};
    const View* views[2] = {&base, &model};
    const bool dense = readers[0].contiguous() && readers[1].contiguous();
    const Scratch scratch(divergence_scratch_bytes(length));
    const Scratch gathered(dense ? 0 : 2 * length * 8);
    DivergenceArgs args{};
    args.length = length;
    args.compute = compute;
    args.scratch = scratch.data();
    const std::int64_t step = dense ? end - begin : 1;
    for (std::int64_t row = begin; row < end; row += step) {
      args.rows = step;
      args.result = result.data() + row;
      Source* const sources[2] = {&args.base, &args.model};
      for (int s = 0; s < 2; ++s) {
        *sources[s] = Source{readers[s].at(row * length), views[s]->dtype, views[s]->cast};
        if (dense) continue;
        char* const buffer = gathered.data() + s * length * 8;
        readers[s].gather(row * length, length, buffer);
        sources[s]->data = buffer;
      }
      kernels.divergence(&args);
    }
  };
  // Functions cost more than memory: a thread is worth less data than elsewhere.
  parallel_ranges(n / length, 1, team_size(threads, n * 64), run);
  return result;
}

}  // namespace mergekernels
