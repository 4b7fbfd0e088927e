// The Python module _cpu: conversions only. Needs neither torch nor numpy.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_program.h"
#include "common/transcendental.h"
#include "common/tree.h"
#include "cpu/block_sums.h"
#include "cpu/buffer.h"
#include "cpu/compare.h"
#include "cpu/ops.h"

namespace py = pybind11;
namespace mk = mergekernels;

namespace {

using PieceTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using ViewTuple = std::tuple<std::uintptr_t, int, int, std::vector<std::int64_t>, std::vector<std::int64_t>>;

mk::Piece to_piece(const PieceTuple& p) { return {std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p)}; }

mk::View to_view(const ViewTuple& v) {
  mk::View view;
  view.data = reinterpret_cast<char*>(std::get<0>(v));
  view.dtype = std::get<1>(v);
  view.cast = std::get<2>(v) == view.dtype ? -1 : std::get<2>(v);
  view.shape = std::get<3>(v);
  view.strides = std::get<4>(v);
  return view;
}

// A contiguous buffer of 8-byte items.
template <class T>
std::pair<const T*, std::int64_t> items(const py::buffer_info& info) {
  if (info.itemsize != sizeof(T) || info.ndim != 1 || (info.size > 1 && info.strides[0] != sizeof(T)))
    throw py::value_error("a contiguous, one-dimensional buffer of 8-byte items is needed");
  return {static_cast<const T*>(info.ptr), info.size};
}

std::pair<std::int64_t, std::int64_t> pair_of(const mk::NonFinite& n) { return {n.first, n.count}; }

void bind_sweep_stats(py::module_& m) {
  using S = mk::SweepStats;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<S>(m, "SweepStats")
      .def(py::init([](const std::vector<int>& stages, const std::vector<std::uint64_t>& lo,
                       const std::vector<std::uint64_t>& hi, const std::vector<std::uint64_t>& tau, int order,
                       std::int64_t capacity, const std::optional<std::vector<int>>& models) {
             const std::size_t n = stages.size();
             if (lo.size() != n || hi.size() != n || tau.size() != n || (models && models->size() != n))
               throw py::value_error("stages, lo, hi, tau and models need one value for each search");
             std::vector<S::Interval> intervals;
             for (std::size_t i = 0; i < n; ++i)
               intervals.push_back({stages[i], lo[i], hi[i], tau[i], models ? (*models)[i] : static_cast<int>(i)});
             return std::make_unique<S>(std::move(intervals), order, capacity);
           }),
           py::arg("stages"), py::arg("lo"), py::arg("hi"), py::arg("tau"), py::arg("order"), py::arg("capacity"),
           py::arg("models") = py::none())
      .def_property_readonly("capacity", &S::capacity)
      .def("before", &S::before, py::arg("model"))
      .def("inside", &S::inside, py::arg("model"))
      .def("overflowed", &S::overflowed, py::arg("model"))
      .def("histogram", &S::histogram, py::arg("model"))
      .def("order_statistics", &S::order_statistics, py::arg("model"), py::arg("ranks"), nogil)
      .def("count_ordinal", &S::count_ordinal, py::arg("model"), py::arg("ordinal"), nogil)
      .def("tie_point", &S::tie_point, py::arg("model"), py::arg("rank"), py::arg("tau"), py::arg("order"),
           py::arg("seed"), py::arg("offsets"), py::arg("tensor_ids"), nogil)
      .def(
          "nonfinite", [](const S& s, int source) { return pair_of(s.nonfinite(source)); }, py::arg("source"))
      .def(
          "add",
          [](S& s, int model, std::int64_t before, const py::buffer& ordinals, const py::buffer& indices) {
            const py::buffer_info a = ordinals.request(), b = indices.request();
            const auto [ordinal, n] = items<std::uint64_t>(a);
            const auto [index, same] = items<std::uint64_t>(b);
            if (n != same) throw py::value_error("ordinals and indices differ in length");
            std::vector<mk::Entry> entries(static_cast<std::size_t>(n));
            for (std::int64_t i = 0; i < n; ++i) entries[static_cast<std::size_t>(i)] = {ordinal[i], index[i]};
            s.add(model, before, entries.data(), n);
          },
          py::arg("model"), py::arg("before"), py::arg("ordinals"), py::arg("indices"))
      .def(
          "add_histogram",
          [](S& s, int model, std::int64_t before, const py::buffer& bins) {
            const py::buffer_info info = bins.request();
            const auto [counts, n] = items<std::int64_t>(info);
            if (n != mk::kNumBins) throw py::value_error("a histogram has 4096 bins");
            s.add_histogram(model, before, counts);
          },
          py::arg("model"), py::arg("before"), py::arg("bins"))
      .def("add_nonfinite", &S::add_nonfinite, py::arg("source"), py::arg("first"), py::arg("count"))
      .def("merge", &S::merge, py::arg("other"), nogil)
      .def("dump", [](const S& s) { return py::bytes(s.dump()); })
      .def_static("load", [](const py::bytes& data) { return std::unique_ptr<S>(S::load(data)); }, py::arg("data"));
}

void bind_stream_stats(py::module_& m) {
  using S = mk::StreamStats;
  py::class_<S>(m, "StreamStats")
      .def(py::init<int, std::int64_t>(), py::arg("num_models"), py::arg("num_blocks"))
      .def_property_readonly("num_blocks", &S::num_blocks)
      .def_property_readonly("num_models", &S::num_models)
      .def("kept", &S::kept, py::arg("model"))
      .def("conflicts", &S::conflicts)
      .def("votes", &S::votes)
      .def(
          "nonfinite", [](const S& s, int source) { return pair_of(s.nonfinite(source)); }, py::arg("source"))
      .def("sum_squares", &S::sum_squares, py::arg("model"), py::call_guard<py::gil_scoped_release>())
      .def(
          "add",
          [](S& s, const std::vector<std::int64_t>& kept, std::int64_t conflicts, std::int64_t positive,
             std::int64_t negative) {
            if (static_cast<int>(kept.size()) != s.num_models())
              throw py::value_error("kept needs one count for each model");
            mk::StreamCounters c{};
            for (std::size_t i = 0; i < kept.size(); ++i) c.kept[i] = kept[i];
            c.conflicts = conflicts;
            c.positive = positive;
            c.negative = negative;
            s.add(c);
          },
          py::arg("kept"), py::arg("conflicts"), py::arg("positive"), py::arg("negative"))
      .def("add_nonfinite", &S::add_nonfinite, py::arg("source"), py::arg("first"), py::arg("count"))
      .def(
          "set_blocks",
          [](S& s, int model, std::int64_t first, const py::buffer& sums) {
            const py::buffer_info info = sums.request();
            const auto [data, n] = items<double>(info);
            s.set_blocks(model, first, data, n);
          },
          py::arg("model"), py::arg("first_block"), py::arg("sums"))
      .def("merge", &S::merge, py::arg("other"))
      .def("dump", [](const S& s) { return py::bytes(s.dump()); })
      .def_static("load", [](const py::bytes& data) { return std::unique_ptr<S>(S::load(data)); }, py::arg("data"));
}

void bind_block_sums(py::module_& m) {
  using S = mk::BlockSums;
  py::class_<S>(m, "BlockSums")
      .def(py::init<int, std::int64_t, std::int64_t>(), py::arg("num_slots"), py::arg("num_segments"),
           py::arg("segment_length"))
      .def_property_readonly("num_slots", &S::num_slots)
      .def_property_readonly("num_segments", &S::num_segments)
      .def_property_readonly("segment_length", &S::segment_length)
      .def_property_readonly("blocks_per_segment", &S::blocks_per_segment)
      .def(
          "set",
          [](S& s, int slot, std::int64_t segment, std::int64_t block, const py::buffer& sums) {
            const py::buffer_info info = sums.request();
            const auto [data, n] = items<double>(info);
            s.set(slot, segment, block, data, n);
          },
          py::arg("slot"), py::arg("segment"), py::arg("first_block"), py::arg("sums"))
      .def(
          "fold",
          [](const S& s, int slot) {
            const std::vector<double> sums = s.fold(slot);
            return py::bytes(reinterpret_cast<const char*>(sums.data()), sums.size() * sizeof(double));
          },
          py::arg("slot"))
      .def("merge", &S::merge, py::arg("other"))
      .def("dump", [](const S& s) { return py::bytes(s.dump()); })
      .def_static("load", [](const py::bytes& data) { return std::unique_ptr<S>(S::load(data)); }, py::arg("data"));
}

void bind_ops(py::module_& m) {
  m.def(
      "sweep",
      [](mk::SweepStats& stats, const PieceTuple& piece, const std::optional<ViewTuple>& base,
         const std::vector<std::optional<ViewTuple>>& models, int compute, std::uint64_t seed, std::uint32_t tensor,
         std::int64_t offset, int threads, const std::string& isa) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        const mk::View base_view = base ? to_view(*base) : mk::View{};
        std::vector<mk::View> views(models.size());
        std::vector<const mk::View*> pointers(models.size(), nullptr);
        for (std::size_t i = 0; i < models.size(); ++i) {
          if (!models[i]) continue;
          views[i] = to_view(*models[i]);
          pointers[i] = &views[i];
        }
        const py::gil_scoped_release release;
        mk::sweep(&stats, to_piece(piece), base ? &base_view : nullptr, pointers, compute, seed, tensor, offset,
                  threads, kernels);
      },
      py::arg("stats"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("compute"), py::arg("seed"),
      py::arg("tensor"), py::arg("offset"), py::arg("threads"), py::arg("isa"));
  m.def(
      "stream",
      [](const py::dict& program, const PieceTuple& piece, const std::optional<ViewTuple>& base,
         const std::vector<ViewTuple>& models, const std::optional<ViewTuple>& out, int compute, mk::StreamStats* stats,
         int threads, const std::string& isa) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        const mk::BoundProgram bound(program);
        const mk::View base_view = base ? to_view(*base) : mk::View{};
        const mk::View out_view = out ? to_view(*out) : mk::View{};
        std::vector<mk::View> views;
        for (const ViewTuple& v : models) views.push_back(to_view(v));
        const py::gil_scoped_release release;
        mk::stream(bound.program, to_piece(piece), base ? &base_view : nullptr, views, out ? &out_view : nullptr,
                   compute, stats, threads, kernels);
      },
      py::arg("program"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("out"), py::arg("compute"),
      py::arg("stats"), py::arg("threads"), py::arg("isa"));
  m.def(
      "philox",
      [](std::uint64_t seed, std::uint32_t tensor, std::uint32_t stream, std::int64_t first, std::int64_t count) {
        std::vector<std::uint32_t> words;
        for (std::int64_t i = 0; i < count; ++i)
          words.push_back(mk::philox_word(seed, tensor, stream, static_cast<std::uint64_t>(first + i)));
        return words;
      },
      py::arg("seed"), py::arg("tensor"), py::arg("stream"), py::arg("first"), py::arg("count"));
  m.def(
      "transcendental",
      [](const std::string& name, double x) {
        if (name == "exp") return mk::exact_exp(x);
        if (name == "log") return mk::exact_log(x);
        if (name == "tanh") return mk::exact_tanh(x);
        if (name == "sigmoid") return mk::exact_sigmoid(x);
        throw py::value_error("a function is exp, log, tanh or sigmoid");
      },
      py::arg("name"), py::arg("x"));
  m.def(
      "block_tree",
      [](const py::buffer& values) {
        const py::buffer_info info = values.request();
        const auto [data, n] = items<double>(info);
        std::vector<double> sums(data, data + n);
        return mk::fold_blocks(sums.data(), n);
      },
      py::arg("values"));
  m.def(
      "compare",
      [](std::uintptr_t a, const std::string& dtype_a, std::uintptr_t b, const std::string& dtype_b, std::int64_t n,
         bool norm) {
        if (!mk::comparable(dtype_a, dtype_b) || n < 0)
          throw std::invalid_argument("compare: cannot compare " + dtype_a + " with " + dtype_b);
        mk::Comparison c;
        {
          py::gil_scoped_release release;
          c = mk::compare(reinterpret_cast<const void*>(a), dtype_a, reinterpret_cast<const void*>(b), dtype_b, n,
                          norm);
        }
        const auto max_ulp = c.measured ? std::optional<std::uint64_t>(c.max_ulp) : std::nullopt;
        return std::make_tuple(c.differing, c.first, c.unbounded, max_ulp, c.max_ulp_at, c.max_abs, c.squares_diff,
                               c.squares_a);
      },
      py::arg("a"), py::arg("dtype_a"), py::arg("b"), py::arg("dtype_b"), py::arg("n"), py::arg("norm"));
  m.def("isas", [] {
    int count = 0;
    const mk::Kernels* const* table = mk::available_kernels(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(table[i]->name);
    return names;
  });
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    std::string built = "base";
#if defined(MK_WITH_AVX2)
    built = "avx2, " + built;
#endif
#if defined(MK_WITH_AVX512)
    built = "avx512, " + built;
#endif
    info["isas"] = built;
    return info;
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "The C++ CPU backend of mergekernels; see _cpu.pyi.";
  py::class_<mk::Buffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<std::int64_t>(), py::arg("nbytes"))
      .def_property_readonly("ptr", [](const mk::Buffer& b) { return reinterpret_cast<std::uintptr_t>(b.data()); })
      .def_property_readonly("nbytes", &mk::Buffer::nbytes)
      .def_buffer([](mk::Buffer& b) {
        return py::buffer_info(b.data(), 1, py::format_descriptor<std::uint8_t>::format(), b.nbytes());
      });
  bind_sweep_stats(m);
  bind_stream_stats(m);
  bind_block_sums(m);
  bind_ops(m);
}
