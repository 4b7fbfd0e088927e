// The accumulators of statistics in the Python module _cpu.

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bind_cpu.h"
#include "cpu/block_sums.h"
#include "cpu/stats.h"

namespace {

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

}  // namespace

void bind_stats(py::module_& m) {
  bind_sweep_stats(m);
  bind_stream_stats(m);
  bind_block_sums(m);
}
