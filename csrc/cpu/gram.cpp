#include <algorithm>
#include <memory>
#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

// A piece as a box of a matrix of `width` columns.
struct Box {
  std::int64_t row, col, rows, cols;
};

struct Call {
  BlockSums* sums;
  Box box;
  const View* base;
  const std::vector<View>& models;
  int compute;
  const Kernels& kernels;
};

Box box_of(const Piece& piece, std::int64_t width) {
  const std::int64_t n = piece.rows * piece.cols;
  Box box = {piece.g0 / width, piece.g0 % width, piece.rows, piece.cols};
  if (piece.rows == 1 || piece.ld == piece.cols) {
    box.rows = 1;
    box.cols = n;
    if (box.col == 0 && n % width == 0) {
      box.rows = n / width;
      box.cols = width;
    }
  } else if (piece.ld != width) {
    throw std::invalid_argument("a piece for sums by row or column has the rows of its tensor");
  }
  if (box.col + box.cols > width) throw std::invalid_argument("a piece for sums by row or column is a box");
  return box;
}

// Whether [first, first + n) of a segment consists of whole canonical blocks.
bool whole_blocks(std::int64_t first, std::int64_t n, std::int64_t length) {
  return first % kCanonicalBlock == 0 && (n % kCanonicalBlock == 0 || first + n == length);
}

// The sources of one call of a kernel: in place, or gathered.
class Sources {
 public:
  Sources(const Call& call, std::int64_t elements) : call_(call), bytes_(0) {
    const int num_models = static_cast<int>(call.models.size());
    for (const View& view : call.models) readers_.emplace_back(view);
    if (call.base != nullptr) readers_.emplace_back(*call.base);
    for (const Reader& reader : readers_) dense_ = dense_ && reader.contiguous();
    if (!dense_) bytes_ = elements * 8;
    scratch_ =
        std::make_unique<Scratch>(gram_scratch_bytes(num_models) + bytes_ * static_cast<std::int64_t>(readers_.size()));
    buffers_ = scratch_->data() + gram_scratch_bytes(num_models);
    args_.num_models = num_models;
    args_.compute = call.compute;
    args_.scratch = scratch_->data();
  }

  bool dense() const { return dense_; }
  GramArgs& args() { return args_; }

  // Elements i .. i + n - 1 of `rows` rows, `pitch` apart.
  void take(std::int64_t i, std::int64_t n, int rows, std::int64_t pitch) {
    args_.pitch = dense_ ? pitch : n;
    args_.rows = rows;
    args_.n = n;
    for (std::size_t s = 0; s < readers_.size(); ++s) {
      const bool is_base = s == call_.models.size();
      const View& view = is_base ? *call_.base : call_.models[s];
      Source& source = is_base ? args_.base : args_.models[s];
      source = Source{nullptr, view.dtype, view.cast};
      if (dense_) {
        source.data = readers_[s].at(i);
        continue;
      }
      char* const buffer = buffers_ + bytes_ * static_cast<std::int64_t>(s);
      for (int r = 0; r < rows; ++r) readers_[s].gather(i + r * pitch, n, buffer + r * n * itemsize(view.dtype));
      source.data = buffer;
    }
  }

 private:
  const Call& call_;
  std::vector<Reader> readers_;
  bool dense_ = true;
  std::int64_t bytes_;
  std::unique_ptr<Scratch> scratch_;
  char* buffers_;
  GramArgs args_{};
};

// Blocks `begin` .. `end` of the box, row by row.
void row_range(const Call& call, std::int64_t begin, std::int64_t end) {
  const DefaultFloatEnvironment environment;
  Sources sources(call, kCanonicalBlock);
  const Box& box = call.box;
  const std::int64_t blocks = (box.cols + kCanonicalBlock - 1) / kCanonicalBlock;
  GramArgs& args = sources.args();
  args.slot_stride = call.sums->num_segments() * call.sums->blocks_per_segment();
  for (std::int64_t u = begin; u < end;) {
    const std::int64_t row = u / blocks, block = u % blocks;
    const std::int64_t count = sources.dense() ? std::min(blocks - block, end - u) : 1;
    const std::int64_t first = block * kCanonicalBlock;
    sources.take(row * box.cols + first, std::min(count * kCanonicalBlock, box.cols - first), 1, 0);
    args.sums = call.sums->at(0, box.row + row, box.col / kCanonicalBlock + block);
    call.kernels.gram(&args);
    u += count;
  }
}

// The columns that are summed together: their sums and those of eight more levels of the tree stay within 3 MiB.
std::int64_t columns_together(std::int64_t pairs) {
  std::int64_t width = 1024;
  while (width > 16 && pairs * width > 40000) width /= 2;
  return width;
}

// Sums of one canonical block of rows for some columns. The tree over the lanes is walked depth first, so that nine
// levels of it are held instead of 256 lanes: the lanes that are l modulo s fold into those that are l and those that
// are l + s modulo 2 s.
class ColumnTree {
 public:
  ColumnTree(const Call& call, std::int64_t pairs, std::int64_t width)
      : call_(call),
        sources_(call, width * (kCanonicalBlock / kLanes)),
        size_(pairs * width),
        width_(width),
        sums_(static_cast<std::size_t>(9 * size_)) {}

  // Rows `first` .. and columns c .. c + n - 1 of the box; the sum of column j of pair p is at [p * width + j].
  const double* fold(std::int64_t first, std::int64_t rows, std::int64_t c, std::int64_t n) {
    first_ = first;
    rows_ = rows;
    c_ = c;
    n_ = n;
    walk(0, 1, level(8));
    return level(8);
  }

 private:
  double* level(int l) { return sums_.data() + l * size_; }

  void walk(int lane, int stride, double* into) {
    if (stride == kLanes) return add_lane(lane, into);
    walk(lane, 2 * stride, into);
    if (lane + stride >= rows_) return;  // a missing lane is +0
    int l = 0;
    while ((1 << l) < stride) ++l;
    double* const right = level(l);
    walk(lane + stride, 2 * stride, right);
    for (std::int64_t i = 0; i < size_; ++i) into[i] += right[i];
  }

  void add_lane(int lane, double* into) {
    const int rows = static_cast<int>((rows_ - lane + kLanes - 1) / kLanes);
    const std::int64_t pitch = call_.box.cols;
    sources_.take((first_ + lane) * pitch + c_, n_, rows, kLanes * pitch);
    GramArgs& args = sources_.args();
    args.sums = into;
    args.slot_stride = width_;
    call_.kernels.gram_lane(&args);
  }

  const Call& call_;
  Sources sources_;
  std::int64_t size_, width_;
  std::vector<double> sums_;  // levels of the tree
  std::int64_t first_ = 0, rows_ = 0, c_ = 0, n_ = 0;
};

// Units are pairs of a block of rows and a stretch of columns.
void column_range(const Call& call, std::int64_t begin, std::int64_t end) {
  const DefaultFloatEnvironment environment;
  const auto num_models = static_cast<std::int64_t>(call.models.size());
  const std::int64_t pairs = num_models * (num_models + 1) / 2;
  const std::int64_t width = columns_together(pairs);
  const Box& box = call.box;
  const std::int64_t stretches = (box.cols + width - 1) / width;
  ColumnTree tree(call, pairs, width);
  for (std::int64_t u = begin; u < end; ++u) {
    const std::int64_t row = u / stretches * kCanonicalBlock, c = u % stretches * width;
    const std::int64_t n = std::min(width, box.cols - c);
    const double* sums = tree.fold(row, std::min<std::int64_t>(kCanonicalBlock, box.rows - row), c, n);
    for (std::int64_t p = 0; p < pairs; ++p)
      for (std::int64_t j = 0; j < n; ++j)
        *call.sums->at(static_cast<int>(p), box.col + c + j, (box.row + row) / kCanonicalBlock) = sums[p * width + j];
  }
}

}  // namespace

void gram(BlockSums* sums, int axis, const Piece& piece, const View* base, const std::vector<View>& models, int compute,
          int threads, const Kernels& kernels) {
  check_piece(piece);
  if (models.empty() || models.size() > kMaxModels) throw std::invalid_argument("a Gram matrix takes 1 to 64 models");
  const auto num_models = static_cast<std::int64_t>(models.size());
  if (sums->num_slots() != num_models * (num_models + 1) / 2)
    throw std::invalid_argument("the sums are for another number of models");
  if (compute != kF32 && compute != kF64) throw std::invalid_argument("arithmetic is in float32 or float64");
  std::int64_t bytes_each = 0;
  for (const View& view : models) {
    check_view(view, piece, "a model");
    bytes_each += itemsize(view.dtype);
  }
  if (base != nullptr) {
    check_view(*base, piece, "the base");
    bytes_each += itemsize(base->dtype);
  }
  const std::int64_t n = piece.rows * piece.cols;
  if (n == 0) return;
  const std::int64_t count = sums->num_segments(), length = sums->segment_length();
  if (axis == kAxisColumns) {
    const Call call{sums, box_of(piece, count), base, models, compute, kernels};
    const Box& box = call.box;
    if (box.row + box.rows > length || !whole_blocks(box.row, box.rows, length))
      throw std::invalid_argument("sums by column need pieces of whole blocks of 4096 rows");
    const std::int64_t width = columns_together(sums->num_slots());
    const std::int64_t units = (box.rows + kCanonicalBlock - 1) / kCanonicalBlock * ((box.cols + width - 1) / width);
    parallel_ranges(units, 1, team_size(threads, n * bytes_each),
                    [&call](std::int64_t begin, std::int64_t end) { column_range(call, begin, end); });
  } else {
    if (length == 0) throw std::invalid_argument("a piece lies outside these sums");
    const Call call{sums, box_of(piece, length), base, models, compute, kernels};
    const Box& box = call.box;
    if (box.row + box.rows > count || !whole_blocks(box.col, box.cols, length))
      throw std::invalid_argument("sums need flat pieces of whole blocks of 4096 elements, or whole rows");
    const std::int64_t units = box.rows * ((box.cols + kCanonicalBlock - 1) / kCanonicalBlock);
    parallel_ranges(units, 1, team_size(threads, n * bytes_each),
                    [&call](std::int64_t begin, std::int64_t end) { row_range(call, begin, end); });
  }
}

}  // namespace mergekernels
