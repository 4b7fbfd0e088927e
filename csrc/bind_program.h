// A program as it comes from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/program.h"

namespace mergekernels {

// Holds the buffers that the program points into.
struct BoundProgram {
  explicit BoundProgram(const pybind11::dict& fields);
  BoundProgram(const BoundProgram&) = delete;
  BoundProgram& operator=(const BoundProgram&) = delete;

  Program program;
  std::vector<pybind11::buffer_info> held;
};

}  // namespace mergekernels
