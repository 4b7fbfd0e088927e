// The Python module _cpu: conversions only. Needs neither torch nor numpy.

#include "bind_cpu.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/transcendental.h"
#include "common/tree.h"
#include "cpu/buffer.h"
#include "cpu/compare.h"
#include "cpu/ops.h"

namespace {

void bind_ops(py::module_& m) {
  m.def(
      "sweep",
      [](mk::SweepStats& stats, const PieceTuple& piece, const std::optional<ViewTuple>& base,
         const std::vector<std::optional<ViewTuple>>& models, int compute, std::uint64_t seed, std::uint32_t tensor,
         std::int64_t offset, int threads, const std::string& isa, int key,
         const std::optional<std::tuple<std::int64_t, py::buffer>>& rows,
         const std::vector<std::tuple<double, double, double, double, double>>& balance,
         const std::vector<std::uint64_t>& draws) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        if (key < mk::kSweepDelta || key > mk::kSweepDrawn) throw py::value_error("a key of a sweep is 0 to 4");
        mk::SweepKeys keys;
        keys.key = key;
        py::buffer_info held;
        if (rows) {
          held = std::get<1>(*rows).request();
          const auto [values, count] = items<double>(held);
          keys.rows = mk::Table{mk::kTableRows, 0, std::get<0>(*rows), count, values};
        }
        for (const auto& [lo, hi, spread, cut, top] : balance) keys.balance.push_back({lo, hi, spread, cut, top});
        keys.draws = draws;
        const mk::View base_view = base ? to_view(*base) : mk::View{};
        std::vector<mk::View> views(models.size());
        std::vector<const mk::View*> pointers(models.size(), nullptr);
        for (std::size_t i = 0; i < models.size(); ++i) {
          if (!models[i]) continue;
          views[i] = to_view(*models[i]);
          pointers[i] = &views[i];
        }
        const py::gil_scoped_release release;
        mk::sweep(&stats, to_piece(piece), base ? &base_view : nullptr, pointers, keys, compute, seed, tensor, offset,
                  threads, kernels);
      },
      py::arg("stats"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("compute"), py::arg("seed"),
      py::arg("tensor"), py::arg("offset"), py::arg("threads"), py::arg("isa"), py::arg("key") = 0,
      py::arg("rows") = py::none(), py::arg("balance") = py::list(), py::arg("draws") = py::list());
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
  bind_stats(m);
  bind_sums(m);
  bind_learned(m);
  bind_tensor(m);
  bind_ops(m);
  bind_passes(m);
}
