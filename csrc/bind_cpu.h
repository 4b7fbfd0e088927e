// Conversions that the parts of the Python module _cpu share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/view.h"

namespace py = pybind11;
namespace mk = mergekernels;

using PieceTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using ViewTuple = std::tuple<std::uintptr_t, int, int, std::vector<std::int64_t>, std::vector<std::int64_t>>;

inline mk::Piece to_piece(const PieceTuple& p) {
  return {std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p)};
}

inline mk::View to_view(const ViewTuple& v) {
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

// The parts of the module.
void bind_stats(py::module_& m);
void bind_sums(py::module_& m);
// stream, reduce and mark.
void bind_passes(py::module_& m);
void bind_learned(py::module_& m);
void bind_tensor(py::module_& m);
