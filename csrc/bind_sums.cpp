// Exact sums, and products of factors, in the Python module _cpu.

#include <optional>
#include <string>
#include <vector>

#include "bind_cpu.h"
#include "cpu/ops.h"

void bind_sums(py::module_& m) {
  m.def(
      "gram",
      [](mk::BlockSums& sums, bool columns, const PieceTuple& piece, const std::optional<ViewTuple>& base,
         const std::vector<ViewTuple>& models, int compute, int threads, const std::string& isa) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        const mk::View base_view = base ? to_view(*base) : mk::View{};
        std::vector<mk::View> views;
        for (const ViewTuple& v : models) views.push_back(to_view(v));
        const py::gil_scoped_release release;
        mk::gram(&sums, columns ? mk::kAxisColumns : mk::kAxisRows, to_piece(piece), base ? &base_view : nullptr, views,
                 compute, threads, kernels);
      },
      py::arg("sums"), py::arg("columns"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("compute"),
      py::arg("threads"), py::arg("isa"));
  m.def(
      "divergence",
      [](std::int64_t length, const PieceTuple& piece, const ViewTuple& base, const ViewTuple& model, int compute,
         int threads, const std::string& isa) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        const mk::View base_view = to_view(base), view = to_view(model);
        std::vector<double> found;
        {
          const py::gil_scoped_release release;
          found = mk::divergence(length, to_piece(piece), base_view, view, compute, threads, kernels);
        }
        return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(double));
      },
      py::arg("row_length"), py::arg("piece"), py::arg("base"), py::arg("model"), py::arg("compute"),
      py::arg("threads"), py::arg("isa"));
  m.def(
      "product",
      [](const ViewTuple& b, const ViewTuple& a, const PieceTuple& piece, const ViewTuple& out, bool add,
         const std::string& isa) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        const mk::View b_view = to_view(b), a_view = to_view(a), out_view = to_view(out);
        const py::gil_scoped_release release;
        mk::product(b_view, a_view, to_piece(piece), out_view, add, kernels);
      },
      py::arg("b"), py::arg("a"), py::arg("piece"), py::arg("out"), py::arg("add"), py::arg("isa"));
}
