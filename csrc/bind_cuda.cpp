// The Python module _cuda: conversions only. Pointers and streams are integers; needs neither torch nor a GPU to
// import.

#include "bind_cuda.h"

#include <algorithm>
#include <optional>

namespace py = pybind11;
namespace mk = mergekernels;

namespace {

using mk::Address;
using mk::all_aligned;
using mk::check_code;
using mk::check_models;
using mk::is_quads;
using mk::KeepTuple;
using mk::PieceTuple;
using mk::pointer;
using mk::to_piece;
// (stage, lo, hi, tau, model)
using IntervalTuple = std::tuple<int, std::uint64_t, std::uint64_t, std::uint64_t, int>;

int bin_shift(std::uint64_t lo, std::uint64_t hi) {
  int bits = 0;
  for (std::uint64_t width = hi - lo; width != 0; width >>= 1) ++bits;
  return bits > 12 ? bits - 12 : 0;
}

// See Program in ops/program.py: (weights, keep, base, consensus, zero_vote, divisor, divisor_value, scale, copy, seed,
// tensor).
template <class C>
mk::StreamArgs<C> stream_args(const py::tuple& t, const mk::Piece& piece, Address base,
                              const std::vector<Address>& models, Address out) {
  if (t.size() != 11) throw py::value_error("a program has 11 fields");
  check_models(models);
  const auto weights = t[0].cast<std::vector<double>>();
  const auto keep = t[1].cast<std::vector<std::optional<KeepTuple>>>();
  if (weights.size() != models.size() || keep.size() != models.size())
    throw py::value_error("a program needs one weight and one keep for each model");
  mk::StreamArgs<C> a{};
  a.n = piece.rows * piece.cols;
  a.piece = piece;
  a.base = pointer<const void>(base);
  a.out = pointer<void>(out);
  a.num_models = static_cast<int>(models.size());
  a.consensus = t[3].cast<int>();
  a.zero_vote = t[4].cast<int>();
  a.divisor = t[5].cast<int>();
  a.divisor_value = static_cast<C>(t[6].cast<double>());
  const double scale = t[7].cast<double>();
  a.scale = static_cast<C>(scale);
  a.scaled = scale != 1.0;
  a.copy = t[8].cast<bool>();
  a.seed = t[9].cast<std::uint64_t>();
  a.tensor = t[10].cast<std::uint32_t>();
  a.aligned = all_aligned(models, base, out);
  a.quads = is_quads(piece);
  if (a.consensus < 0 || a.consensus > 1 || a.divisor < 0 || a.divisor > 3 || a.zero_vote < -1 || a.zero_vote > 1)
    throw py::value_error("a field of the program is out of its range");
  if (a.copy && a.num_models != 1) throw py::value_error("a copy takes one model");
  for (std::size_t m = 0; m < models.size(); ++m) {
    a.models[m] = pointer<const void>(models[m]);
    a.weights[m] = static_cast<C>(weights[m]);
    a.bound[m] = -1;
    a.tau[m] = -1;
    a.rule[m] = mk::kTiesNone;
    if (!keep[m]) continue;
    const mk::Point<C> point = mk::to_point<C>(mk::to_keep(*keep[m]));
    a.bound[m] = point.bound;
    a.tau[m] = point.tau;
    a.rule[m] = static_cast<std::int8_t>(point.rule);
    a.word[m] = point.word;
    a.index[m] = point.index;
  }
  return a;
}

template <class C>
void stream(const py::tuple& program, const mk::Piece& piece, Address base, const std::vector<Address>& models,
            Address out, int dtype, int out_dtype, bool raw, Address counters, int slots, const mk::Queue& queue) {
  mk::StreamArgs<C> a = stream_args<C>(program, piece, base, models, out);
  a.out_dtype = out_dtype;
  a.raw = raw;
  a.counters = pointer<unsigned long long>(counters);
  a.slots = slots;
  if (raw && (!a.copy || a.scaled || dtype != out_dtype)) throw py::value_error("only a plain copy is raw");
  if (counters != 0 && slots < 1) throw py::value_error("counters need at least one slot");
  const py::gil_scoped_release release;
  if (a.n > 0) mk::launch_stream(a, dtype, queue);
}

template <class C>
void block_sums(const py::tuple& program, const mk::Piece& piece, Address base, const std::vector<Address>& models,
                int dtype, Address sums, const mk::Queue& queue) {
  const mk::StreamArgs<C> from = stream_args<C>(program, piece, base, models, 0);
  mk::NormArgs<C> a{};
  a.n = from.n;
  a.blocks = (from.n + mk::kCanonicalBlock - 1) / mk::kCanonicalBlock;
  a.base = from.base;
  a.sums = pointer<double>(sums);
  a.num_models = from.num_models;
  a.copy = from.copy;
  a.scaled = from.scaled;
  a.aligned = from.aligned;
  a.scale = from.scale;
  for (int m = 0; m < from.num_models; ++m) a.models[m] = from.models[m];
  const py::gil_scoped_release release;
  if (a.n > 0) mk::launch_block_sums(a, dtype, queue);
}

// Searches begin .. begin + 63 of a call; false if none of them takes part.
bool set_searches(const std::vector<IntervalTuple>& intervals, const std::vector<Address>& models, std::size_t begin,
                  mk::SweepArgs* a) {
  const bool joint = mk::is_joint(*a);
  a->begin = static_cast<int>(begin);
  a->count = static_cast<int>(std::min<std::size_t>(intervals.size() - begin, mk::kMaxSearches));
  bool any = false;
  for (int s = 0; s < a->count; ++s) {
    const auto& [stage, lo, hi, tau, model] = intervals[begin + static_cast<std::size_t>(s)];
    a->stage[s] = static_cast<std::int8_t>(stage);
    a->lo[s] = lo;
    a->hi[s] = hi;
    a->tau[s] = tau;
    a->which[s] = static_cast<std::int8_t>(model);
    a->shift[s] = static_cast<std::uint8_t>(bin_shift(lo, hi));
    any = any || stage != mk::kStageLeftOut;
    if (!joint) a->models[s] = pointer<const void>(models[begin + static_cast<std::size_t>(s)]);
  }
  return any;
}

void check_searches(const std::vector<IntervalTuple>& intervals, const std::vector<Address>& models, bool joint) {
  if (intervals.empty()) throw py::value_error("a sweep needs a search");
  if (joint) {
    check_models(models);
  } else if (intervals.size() != models.size()) {
    throw py::value_error("a sweep needs one tensor for each search");
  }
  for (std::size_t s = 0; s < intervals.size(); ++s) {
    const auto& [stage, lo, hi, tau, model] = intervals[s];
    if (stage < mk::kStageLeftOut || stage > mk::kStageTies || lo > hi)
      throw py::value_error("an interval needs a stage of 0, 1 or 2 and lo <= hi");
    if (model < 0 || model >= (joint ? static_cast<int>(models.size()) : mk::kMaxModels))
      throw py::value_error("an interval names no model of the call");
    if (!joint && (stage == mk::kStageLeftOut) != (models[s] == 0))
      throw py::value_error("a search that is left out has no address, any other has one");
  }
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "The CUDA backend of mergekernels; see _cuda.pyi.";
  m.def(
      "stream",
      [](const py::tuple& program, const PieceTuple& piece, Address base, const std::vector<Address>& models,
         Address out, int dtype, int out_dtype, int compute, bool raw, Address counters, int slots, int device,
         Address queue) {
        check_code(dtype, "dtype");
        check_code(out_dtype, "out_dtype");
        const mk::Queue to{device, pointer<void>(queue)};
        if (compute == mk::kF64) {
          stream<double>(program, to_piece(piece), base, models, out, dtype, out_dtype, raw, counters, slots, to);
        } else {
          stream<float>(program, to_piece(piece), base, models, out, dtype, out_dtype, raw, counters, slots, to);
        }
      },
      py::arg("program"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("out"), py::arg("dtype"),
      py::arg("out_dtype"), py::arg("compute"), py::arg("raw"), py::arg("counters"), py::arg("slots"),
      py::arg("device"), py::arg("queue"));
  m.def(
      "block_sums",
      [](const py::tuple& program, const PieceTuple& piece, Address base, const std::vector<Address>& models, int dtype,
         int compute, Address sums, int device, Address queue) {
        check_code(dtype, "dtype");
        const mk::Queue to{device, pointer<void>(queue)};
        if (compute == mk::kF64) {
          block_sums<double>(program, to_piece(piece), base, models, dtype, sums, to);
        } else {
          block_sums<float>(program, to_piece(piece), base, models, dtype, sums, to);
        }
      },
      py::arg("program"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("dtype"), py::arg("compute"),
      py::arg("sums"), py::arg("device"), py::arg("queue"));
  m.def(
      "sweep",
      [](const std::vector<IntervalTuple>& intervals, bool by_word, const PieceTuple& piece, Address base,
         const std::vector<Address>& models, int dtype, int compute, std::uint64_t seed, std::uint32_t tensor,
         std::int64_t offset, std::int64_t capacity, int key, Address numbers, std::int64_t row_length,
         Address counters, Address ordinals, Address indices, Address bins, int device, Address queue) {
        check_code(dtype, "dtype");
        if (key < mk::kKeyDelta || key > mk::kKeyDrawn || row_length < 1 || (key >= mk::kKeyImportance && numbers == 0))
          throw py::value_error("a key is out of its range");
        mk::SweepArgs a{};
        a.key = key;
        a.numbers = pointer<const void>(numbers);
        a.row_length = row_length;
        check_searches(intervals, models, mk::is_joint(a));
        a.piece = to_piece(piece);
        a.n = a.piece.rows * a.piece.cols;
        a.base = pointer<const void>(base);
        a.aligned = all_aligned(models, base, 0);
        a.quads = is_quads(a.piece);
        a.total = static_cast<int>(intervals.size());
        if (mk::is_joint(a)) {
          a.num_models = static_cast<int>(models.size());
          for (std::size_t m = 0; m < models.size(); ++m) a.models[m] = pointer<const void>(models[m]);
        }
        a.by_word = by_word;
        a.seed = seed;
        a.tensor = tensor;
        a.offset = offset;
        a.capacity = capacity;
        a.counters = pointer<unsigned long long>(counters);
        a.ordinals = pointer<std::int64_t>(ordinals);
        a.indices = pointer<std::int64_t>(indices);
        a.bins = pointer<unsigned long long>(bins);
        const mk::Queue to{device, pointer<void>(queue)};
        const py::gil_scoped_release release;
        if (a.n <= 0) return;
        for (std::size_t begin = 0; begin < intervals.size(); begin += mk::kMaxSearches) {
          // The first launch reports the base too, unless only bins are wanted.
          if (!set_searches(intervals, models, begin, &a) && (begin != 0 || a.bins != nullptr)) continue;
          if (compute == mk::kF64) {
            mk::launch_sweep<double>(a, dtype, to);
          } else {
            mk::launch_sweep<float>(a, dtype, to);
          }
        }
      },
      py::arg("intervals"), py::arg("by_word"), py::arg("piece"), py::arg("base"), py::arg("models"), py::arg("dtype"),
      py::arg("compute"), py::arg("seed"), py::arg("tensor"), py::arg("offset"), py::arg("capacity"), py::arg("key"),
      py::arg("numbers"), py::arg("row_length"), py::arg("counters"), py::arg("ordinals"), py::arg("indices"),
      py::arg("bins"), py::arg("device"), py::arg("queue"));
  mk::bind_jacobi(m);
  mk::bind_learned(m);
  mk::bind_programs(m);
  mk::bind_sums(m);
  mk::bind_tensor(m);
  m.def("devices", [] {
    char reason[256];
    const int count = mk::num_devices(reason, sizeof(reason));
    return std::make_tuple(count, std::string(reason));
  });
  m.def("build_info", [] {
    py::dict info;
    info["toolkit"] = mk::toolkit();
    return info;
  });
}
