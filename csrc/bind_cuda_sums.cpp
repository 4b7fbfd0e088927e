// The sums of the module _cuda that depend on no program, and the ranks of rows.

#include "bind_cuda.h"

namespace py = pybind11;

namespace mergekernels {

namespace {

void check_box(std::int64_t rows, std::int64_t cols) {
  if (rows < 1 || cols < 1) throw py::value_error("a box has rows and columns");
}

// Whether every group of eight begins at a multiple of 16 bytes.
bool aligned_box(const std::vector<Address>& models, Address base, std::int64_t rows, std::int64_t cols) {
  return all_aligned(models, base, 0) && (rows == 1 || cols % kGroup == 0);
}

void gram(bool columns, const std::vector<Address>& models, Address base, std::int64_t rows, std::int64_t cols,
          int dtype, int compute, Address sums, const Queue& queue) {
  check_models(models);
  check_box(rows, cols);
  GramArgs a{};
  a.rows = rows;
  a.cols = cols;
  a.blocks = ((columns ? rows : cols) + kCanonicalBlock - 1) / kCanonicalBlock;
  a.base = pointer<const void>(base);
  a.sums = pointer<double>(sums);
  a.num_models = static_cast<std::int32_t>(models.size());
  a.columns = columns;
  a.aligned = aligned_box(models, base, rows, cols);
  for (std::size_t m = 0; m < models.size(); ++m) a.models[m] = pointer<const void>(models[m]);
  const py::gil_scoped_release release;
  if (compute == kF64) {
    launch_gram<double>(a, dtype, queue);
  } else {
    launch_gram<float>(a, dtype, queue);
  }
}

template <class C>
void divergence(Address model, Address base, std::int64_t rows, std::int64_t cols, int dtype, Address maxima,
                Address totals, Address sums, const Queue& queue) {
  check_box(rows, cols);
  if (model == 0 || base == 0 || maxima == 0) throw py::value_error("a divergence takes a model, a base and maxima");
  DivergenceArgs<C> a{};
  a.rows = rows;
  a.cols = cols;
  a.blocks = (cols + kCanonicalBlock - 1) / kCanonicalBlock;
  a.inputs[0] = pointer<const void>(model);
  a.inputs[1] = pointer<const void>(base);
  a.maxima = pointer<const C>(maxima);
  a.totals = pointer<const C>(totals);
  a.sums = pointer<double>(sums);
  a.aligned = aligned_box({model}, base, rows, cols);
  const py::gil_scoped_release release;
  launch_divergence(a, dtype, queue);
}

// (draw, low, span, single, first, last)
using RankTuple = std::tuple<bool, std::uint64_t, std::uint64_t, std::uint64_t, std::int64_t, std::int64_t>;

void rank(const RankTuple& rule, std::int64_t g0, std::int64_t rows, std::int64_t length, std::int64_t stride,
          Address base, Address x, int dtype, int compute, std::uint64_t seed, std::uint32_t tensor, int model,
          Address masks, Address thresholds, Address room, std::int64_t room_size, int blocks, const Queue& queue) {
  check_box(rows, length);
  if (stride < 1 || rows % stride != 0 || length >= std::int64_t(1) << 31 || x == 0 || masks == 0)
    throw py::value_error("rows come in whole slabs, with a place for their masks");
  if (room % 8 != 0) throw py::value_error("room begins at a multiple of 8");
  if (room != 0 && (room_size < 1 || blocks < 1)) throw py::value_error("room needs a size and blocks");
  RankArgs a{};
  a.rows = rows;
  a.g0 = g0;
  a.length = length;
  a.stride = stride;
  a.room = pointer<std::uint8_t>(room);
  a.room_size = room_size;
  a.blocks = blocks;
  a.x = pointer<const void>(x);
  a.base = pointer<const void>(base);
  a.masks = pointer<std::uint8_t>(masks);
  a.thresholds = pointer<std::uint32_t>(thresholds);
  a.seed = seed;
  a.tensor = tensor;
  a.model = model;
  std::tie(a.draw, a.low, a.span, a.single, a.first, a.last) = rule;
  const py::gil_scoped_release release;
  if (compute == kF64) {
    launch_rank<double>(a, dtype, queue);
  } else {
    launch_rank<float>(a, dtype, queue);
  }
}

}  // namespace

void bind_sums(py::module_& m) {
  m.def("gram", [](bool columns, const std::vector<Address>& models, Address base, std::int64_t rows, std::int64_t cols,
                   int dtype, int compute, Address sums, int device, Address queue) {
    check_code(dtype, "dtype");
    gram(columns, models, base, rows, cols, dtype, compute, sums, Queue{device, pointer<void>(queue)});
  });
  m.def("divergence", [](Address model, Address base, std::int64_t rows, std::int64_t cols, int dtype, int compute,
                         Address maxima, Address totals, Address sums, int device, Address queue) {
    check_code(dtype, "dtype");
    const auto run = compute == kF64 ? divergence<double> : divergence<float>;
    run(model, base, rows, cols, dtype, maxima, totals, sums, Queue{device, pointer<void>(queue)});
  });
  m.def("rank_room", [](std::int64_t rows, std::int64_t length, int compute, int device) {
    const RankRoom room =
        compute == kF64 ? rank_room<double>(rows, length, device) : rank_room<float>(rows, length, device);
    return std::make_tuple(room.size, room.blocks);
  });
  m.def("rank", [](const RankTuple& rule, std::int64_t g0, std::int64_t rows, std::int64_t length, std::int64_t stride,
                   Address base, Address x, int dtype, int compute, std::uint64_t seed, std::uint32_t tensor, int model,
                   Address masks, Address thresholds, Address room, std::int64_t room_size, int blocks, int device,
                   Address queue) {
    check_code(dtype, "dtype");
    rank(rule, g0, rows, length, stride, base, x, dtype, compute, seed, tensor, model, masks, thresholds, room,
         room_size, blocks, Queue{device, pointer<void>(queue)});
  });
}

}  // namespace mergekernels
