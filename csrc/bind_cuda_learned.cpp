// The passes behind learned coefficients and masks in the module _cuda.

#include <algorithm>
#include <optional>
#include <utility>

#include "bind_cuda.h"

namespace py = pybind11;

namespace mergekernels {

namespace {

using KeyTuple = std::pair<std::uint64_t, std::uint32_t>;
// (temperature, mean, seed, tensor)
using MaskTuple = std::tuple<double, double, std::uint64_t, std::uint32_t>;
// (address, dtype), address 0 for none
using Side = std::pair<Address, int>;

constexpr int kMaxGroups = 256;

// What all passes share: the piece, the inputs, the mask.
template <class C>
LearnedArgs<C> learned_args(const PieceTuple& piece, Address base, const std::vector<Address>& models,
                            const Side& gradient, const Side& logits, const std::optional<MaskTuple>& mask,
                            const Side& out) {
  LearnedArgs<C> a{};
  a.piece = to_piece(piece);
  if (!is_flat(a.piece) || a.piece.g0 < 0) throw py::value_error("this pass needs flat pieces");
  if (models.size() > kMaxModels) throw py::value_error("a call takes 1 to 64 models");
  if (mask.has_value() != (logits.first != 0)) throw py::value_error("a mask needs logits, and logits a mask");
  for (const Side& side : {gradient, logits}) {
    check_code(side.second, "dtype");
    if (side.first != 0 && (sizeof(C) == 8) != (side.second == kF64))
      throw py::value_error("float64 inputs, and no others, are computed in float64");
  }
  check_code(out.second, "out_dtype");
  a.n = a.piece.rows * a.piece.cols;
  a.blocks = (a.n + kCanonicalBlock - 1) / kCanonicalBlock;
  a.base = pointer<const void>(base);
  a.gradient = pointer<const void>(gradient.first);
  a.logits = pointer<const void>(logits.first);
  a.out = pointer<void>(out.first);
  a.gradient_dtype = gradient.second;
  a.logits_dtype = logits.second;
  a.out_dtype = out.second;
  a.num_models = static_cast<std::int32_t>(models.size());
  a.groups = 1;
  a.aligned = all_aligned(models, base | gradient.first | logits.first, out.first);
  a.quads = is_quads(a.piece);
  if (mask) {
    a.temperature = static_cast<C>(std::get<0>(*mask));
    a.mean = static_cast<C>(std::get<1>(*mask));
    a.mask_key = {std::get<2>(*mask), std::get<3>(*mask)};
  }
  for (std::size_t m = 0; m < models.size(); ++m) a.models[m] = pointer<const void>(models[m]);
  return a;
}

template <class C>
void set_sums(LearnedArgs<C>* a, Address sums) {
  if (a->piece.g0 % kCanonicalBlock != 0) throw py::value_error("sums begin at a multiple of 4096");
  if (sums == 0) throw py::value_error("sums need a place");
  a->sums = pointer<double>(sums);
}

template <class C>
void seg_dot(int groups, const KeyTuple& key, const std::optional<MaskTuple>& mask, const PieceTuple& piece,
             Address base, const std::vector<Address>& models, const Side& gradient, const Side& logits, int dtype,
             Address sums, const Queue& queue) {
  LearnedArgs<C> a = learned_args<C>(piece, base, models, gradient, logits, mask, {0, kF32});
  check_models(models);
  if (gradient.first == 0) throw py::value_error("dot products need a gradient");
  if (groups < 1 || groups > kMaxGroups) throw py::value_error("there are 1 to 256 groups");
  a.groups = groups;
  a.group_key = {key.first, key.second};
  set_sums(&a, sums);
  const py::gil_scoped_release release;
  if (a.n > 0) launch_seg_dot(a, dtype, queue);
}

template <class C>
void mask_sum(const MaskTuple& mask, const PieceTuple& piece, const Side& logits, Address sums, const Queue& queue) {
  LearnedArgs<C> a = learned_args<C>(piece, 0, {}, {0, kF32}, logits, mask, {0, kF32});
  set_sums(&a, sums);
  const py::gil_scoped_release release;
  if (a.n > 0) launch_mask_sum(a, queue);
}

template <class C>
void mask_merge(const std::vector<double>& weights, const std::optional<double>& shift, const MaskTuple& mask,
                const PieceTuple& piece, Address base, const std::vector<Address>& models, const Side& gradient,
                const Side& logits, const Side& out, int dtype, const Queue& queue) {
  LearnedArgs<C> a = learned_args<C>(piece, base, models, gradient, logits, mask, out);
  check_models(models);
  if (weights.size() != models.size()) throw py::value_error("a merge needs one weight for each model");
  if (shift.has_value() != (gradient.first != 0)) throw py::value_error("a shift needs a gradient, and the reverse");
  if (out.first == 0) throw py::value_error("a merge needs an output");
  a.shift = static_cast<C>(shift.value_or(0.0));
  std::transform(weights.begin(), weights.end(), a.weights, [](double w) { return static_cast<C>(w); });
  const py::gil_scoped_release release;
  if (a.n > 0) launch_mask_merge(a, shift.has_value(), dtype, queue);
}

}  // namespace

void bind_learned(py::module_& m) {
  m.def("seg_dot", [](int groups, const KeyTuple& key, const std::optional<MaskTuple>& mask, const PieceTuple& piece,
                      Address base, const std::vector<Address>& models, const Side& gradient, const Side& logits,
                      int dtype, int compute, Address sums, int device, Address queue) {
    check_code(dtype, "dtype");
    const auto run = compute == kF64 ? seg_dot<double> : seg_dot<float>;
    run(groups, key, mask, piece, base, models, gradient, logits, dtype, sums, Queue{device, pointer<void>(queue)});
  });
  m.def("mask_sum", [](const MaskTuple& mask, const PieceTuple& piece, const Side& logits, int compute, Address sums,
                       int device, Address queue) {
    const auto run = compute == kF64 ? mask_sum<double> : mask_sum<float>;
    run(mask, piece, logits, sums, Queue{device, pointer<void>(queue)});
  });
  m.def("mask_merge", [](const std::vector<double>& weights, const std::optional<double>& shift, const MaskTuple& mask,
                         const PieceTuple& piece, Address base, const std::vector<Address>& models,
                         const Side& gradient, const Side& logits, const Side& out, int dtype, int compute, int device,
                         Address queue) {
    check_code(dtype, "dtype");
    const auto run = compute == kF64 ? mask_merge<double> : mask_merge<float>;
    run(weights, shift, mask, piece, base, models, gradient, logits, out, dtype, Queue{device, pointer<void>(queue)});
  });
}

}  // namespace mergekernels
