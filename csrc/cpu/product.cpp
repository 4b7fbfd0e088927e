#include <algorithm>
#include <stdexcept>

#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

// Rows row .. row + rows - 1, columns column .. column + cols - 1 of the product, to `out` with rows out_pitch apart.
void box(ProductArgs args, const View& b, const View& a, std::int64_t row, std::int64_t rows, std::int64_t column,
         std::int64_t cols, char* out, std::int64_t out_pitch, const Kernels& kernels) {
  const std::int64_t item = args.compute == kF64 ? 8 : 4;
  args.b = b.data + row * args.rank * item;
  args.a = a.data + column * item;
  args.rows = rows;
  args.cols = cols;
  args.out = out;
  args.out_pitch = out_pitch;
  if (rows > 0 && cols > 0) kernels.product(&args);
}

}  // namespace

void product(const View& b, const View& a, const Piece& piece, const View& out, bool add, const Kernels& kernels) {
  check_piece(piece);
  check_view(out, piece, "the output");
  const int compute = out.dtype;
  if ((compute != kF32 && compute != kF64) || b.dtype != compute || a.dtype != compute)
    throw std::invalid_argument("factors and product are of one dtype, float32 or float64");
  if (b.shape.size() != 2 || a.shape.size() != 2 || b.shape[1] != a.shape[0])
    throw std::invalid_argument("factors are matrices of shapes (m, r) and (r, n)");
  const bool dense_factors = b.shape[1] == 0 || (Reader(b).contiguous() && Reader(a).contiguous());
  if (!dense_factors || !Reader(out).contiguous()) throw std::invalid_argument("factors and product are contiguous");
  const std::int64_t m = b.shape[0], n = a.shape[1], item = compute == kF64 ? 8 : 4;
  const std::int64_t last = piece.g0 + (piece.rows - 1) * piece.ld + piece.cols;
  if (piece.g0 < 0 || piece.rows < 0 || (piece.rows > 0 && piece.cols > 0 && last > m * n))
    throw std::invalid_argument("the piece is outside the product");
  if (piece.rows == 0 || piece.cols == 0) return;
  const DefaultFloatEnvironment environment;
  ProductArgs args{};
  args.rank = b.shape[1];
  args.a_pitch = n;
  args.add = add;
  args.compute = compute;
  const bool dense = piece.rows == 1 || piece.ld == piece.cols;
  const std::int64_t first_column = piece.g0 % n;
  if (!dense && piece.ld == n && first_column + piece.cols <= n) {
    box(args, b, a, piece.g0 / n, piece.rows, first_column, piece.cols, out.data, piece.cols, kernels);
    return;
  }
  // Runs of consecutive elements: the rest of a row, whole rows, the beginning of a row.
  const std::int64_t runs = dense ? 1 : piece.rows, length = dense ? piece.rows * piece.cols : piece.cols;
  for (std::int64_t run = 0; run < runs; ++run) {
    std::int64_t at = piece.g0 + run * piece.ld, left = length;
    char* to = out.data + run * piece.cols * item;
    while (left > 0) {
      const std::int64_t row = at / n, column = at % n;
      const std::int64_t rows = column == 0 ? std::max<std::int64_t>(1, left / n) : 1;
      const std::int64_t cols = std::min(n - column, left);
      box(args, b, a, row, rows, column, cols, to, n, kernels);
      at += rows * cols;
      left -= rows * cols;
      to += rows * cols * item;
    }
  }
}

}  // namespace mergekernels
