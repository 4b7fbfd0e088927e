// What the parts of the module _cuda share. Pointers and streams are integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

namespace mergekernels {

using PieceTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using KeepTuple = std::tuple<std::uint64_t, int, std::uint32_t, std::int64_t>;
using Address = std::uintptr_t;

inline Piece to_piece(const PieceTuple& p) { return {std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p)}; }

inline bool is_flat(const Piece& p) { return p.rows <= 1 || p.cols == p.ld; }

inline bool is_quads(const Piece& p) { return is_flat(p) && p.g0 % 4 == 0; }

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline bool all_aligned(const std::vector<Address>& models, Address base, Address out) {
  Address any = base | out;
  for (const Address m : models) any |= m;
  return any % 16 == 0;
}

inline void check_code(int code, const char* what) {
  if (code < kBF16 || code > kF64) throw pybind11::value_error(std::string(what) + " is no dtype code");
}

inline void check_models(const std::vector<Address>& models) {
  if (models.empty() || models.size() > kMaxModels) throw pybind11::value_error("a call takes 1 to 64 models");
}

inline KeepPoint to_keep(const KeepTuple& k) {
  const auto& [tau, ties, word, index] = k;
  if (ties < kTiesAll || ties > kTiesIndex) throw pybind11::value_error("ties are 0 (all) to 3 (index)");
  return KeepPoint{tau, index, word, ties, 1};
}

// Adds the functions of bind_cuda_jacobi.cpp, bind_cuda_learned.cpp, bind_cuda_programs.cpp, bind_cuda_sums.cpp and
// bind_cuda_tensor.cpp.
void bind_jacobi(pybind11::module_& m);
void bind_learned(pybind11::module_& m);
void bind_programs(pybind11::module_& m);
void bind_sums(pybind11::module_& m);
void bind_tensor(pybind11::module_& m);

}  // namespace mergekernels
