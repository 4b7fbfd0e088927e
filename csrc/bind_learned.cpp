// The passes behind learned coefficients and masks in the Python module _cpu.

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind_cpu.h"
#include "cpu/learned.h"
#include "cpu/ops.h"

namespace {

using DrawTuple = std::pair<std::uint64_t, std::uint32_t>;
using MaskTuple = std::tuple<double, double, std::uint64_t, std::uint32_t>;

}  // namespace

void bind_learned(py::module_& m) {
  m.def(
      "learned",
      [](int pass, int groups, const DrawTuple& draw, const std::optional<MaskTuple>& mask,
         const std::vector<double>& weights, double shift, mk::BlockSums* sums, const PieceTuple& piece,
         const std::optional<ViewTuple>& base, const std::vector<ViewTuple>& models,
         const std::optional<ViewTuple>& gradient, const std::optional<ViewTuple>& logits,
         const std::optional<ViewTuple>& out, int compute, int threads, const std::string& isa) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        mk::LearnedRequest request{};
        request.pass = pass;
        request.groups = groups;
        request.group_draw = {draw.first, draw.second};
        request.masked = mask.has_value();
        if (mask) {
          request.temperature = std::get<0>(*mask);
          request.mean = std::get<1>(*mask);
          request.mask_draw = {std::get<2>(*mask), std::get<3>(*mask)};
        }
        request.weights = weights;
        request.shift = shift;
        std::vector<mk::View> views;
        for (const ViewTuple& v : models) views.push_back(to_view(v));
        mk::View others[4];
        const std::optional<ViewTuple>* const given[4] = {&base, &gradient, &logits, &out};
        const mk::View* found[4] = {};
        for (int i = 0; i < 4; ++i) {
          if (!*given[i]) continue;
          others[i] = to_view(**given[i]);
          found[i] = &others[i];
        }
        const py::gil_scoped_release release;
        mk::learned(request, sums, to_piece(piece), found[0], views, found[1], found[2], found[3], compute, threads,
                    kernels);
      },
      py::arg("pass"), py::arg("groups"), py::arg("draw"), py::arg("mask"), py::arg("weights"), py::arg("shift"),
      py::arg("sums"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("gradient"), py::arg("logits"),
      py::arg("out"), py::arg("compute"), py::arg("threads"), py::arg("isa"));
}
