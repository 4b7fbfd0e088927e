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
}

}  // namespace mergekernels
