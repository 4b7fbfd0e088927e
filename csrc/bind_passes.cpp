// stream, reduce and mark: the passes that run a program.

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_cpu.h"
#include "bind_program.h"
#include "cpu/ops.h"

namespace {

// What the passes take alike, in their own order.
struct Bound {
  Bound(const py::dict& fields, const PieceTuple& box, const std::optional<ViewTuple>& base_tuple,
        const std::vector<ViewTuple>& model_tuples, const std::vector<std::optional<ViewTuple>>& mark_tuples,
        int compute, int threads, const std::string& isa)
      : program(fields), base(base_tuple ? to_view(*base_tuple) : mk::View{}) {
    for (const ViewTuple& v : model_tuples) models.push_back(to_view(v));
    const mk::Piece piece = to_piece(box);
    for (const auto& v : mark_tuples) marks.push_back(v ? bits_of(*v, piece) : nullptr);
    inputs = {&program.program, piece,   base_tuple ? &base : nullptr, &models, &marks,
              compute,          threads, &mk::kernels_of(isa)};
  }

  // The address of packed bits that cover a piece, from the byte of its first element on.
  static std::uint8_t* bits_of(const ViewTuple& tuple, const mk::Piece& piece) {
    const mk::View view = to_view(tuple);
    std::int64_t bytes = 1;
    for (std::size_t k = view.shape.size(); k-- > 0;) {
      if (view.shape[k] != 1 && view.strides[k] != bytes) throw std::invalid_argument("marks are contiguous bytes");
      bytes *= view.shape[k];
    }
    const std::int64_t n = piece.rows * piece.cols;
    if (n > 0 && bytes < (piece.g0 % 8 + n + 7) / 8) throw std::invalid_argument("marks have too few bytes");
    return reinterpret_cast<std::uint8_t*>(view.data);
  }

  mk::BoundProgram program;
  mk::View base;
  std::vector<mk::View> models;
  std::vector<const std::uint8_t*> marks;
  mk::PassInputs inputs;
};

using Marks = std::vector<std::optional<ViewTuple>>;

}  // namespace

void bind_passes(py::module_& m) {
  m.def(
      "stream",
      [](const py::dict& program, const PieceTuple& piece, const std::optional<ViewTuple>& base,
         const std::vector<ViewTuple>& models, const std::optional<ViewTuple>& out, int compute, mk::StreamStats* stats,
         int threads, const std::string& isa, const Marks& marks) {
        const Bound bound(program, piece, base, models, marks, compute, threads, isa);
        const mk::View out_view = out ? to_view(*out) : mk::View{};
        const py::gil_scoped_release release;
        mk::stream(bound.inputs, out ? &out_view : nullptr, stats);
      },
      py::arg("program"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("out"), py::arg("compute"),
      py::arg("stats"), py::arg("threads"), py::arg("isa"), py::arg("marks") = Marks{});
  m.def(
      "reduce",
      [](const py::dict& program, const std::vector<int>& quantities, mk::BlockSums& sums, const PieceTuple& piece,
         const std::optional<ViewTuple>& base, const std::vector<ViewTuple>& models, int compute, int threads,
         const std::string& isa, const Marks& kept) {
        const Bound bound(program, piece, base, models, {}, compute, threads, isa);
        std::vector<std::uint8_t*> bits;
        for (const auto& v : kept) bits.push_back(v ? Bound::bits_of(*v, bound.inputs.piece) : nullptr);
        const py::gil_scoped_release release;
        mk::reduce(bound.inputs, quantities, &sums, bits);
      },
      py::arg("program"), py::arg("quantities"), py::arg("sums"), py::arg("piece"), py::arg("base"), py::arg("models"),
      py::arg("compute"), py::arg("threads"), py::arg("isa"), py::arg("kept") = Marks{});
  m.def(
      "mark",
      [](const py::dict& program, int kind, const PieceTuple& piece, const std::optional<ViewTuple>& base,
         const std::vector<ViewTuple>& models, const std::vector<ViewTuple>& marks, int compute, int threads,
         const std::string& isa) {
        const Bound bound(program, piece, base, models, {}, compute, threads, isa);
        std::vector<std::uint8_t*> bits;
        for (const ViewTuple& v : marks) bits.push_back(Bound::bits_of(v, bound.inputs.piece));
        const py::gil_scoped_release release;
        mk::mark(bound.inputs, kind, bits);
      },
      py::arg("program"), py::arg("kind"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("marks"),
      py::arg("compute"), py::arg("threads"), py::arg("isa"));
}
