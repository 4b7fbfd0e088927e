#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/ops.h"

namespace mergekernels {

const Kernels& kernels_of(const std::string& isa) {
  int count = 0;
  const Kernels* const* table = available_kernels(&count);
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (isa == table[i]->name) return *table[i];
    names += (i == 0 ? "" : ", ") + std::string(table[i]->name);
  }
  throw std::invalid_argument("instruction set '" + isa + "' cannot run here; there is " + names);
}

int team_size(int threads, std::int64_t bytes) {
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, bytes >> 20)));
}

void check_piece(const Piece& piece) {
  if (piece.g0 < 0 || piece.rows < 0 || piece.cols < 0 || (piece.rows > 1 && piece.ld < piece.cols))
    throw std::invalid_argument("a piece needs g0, rows and cols >= 0 and ld >= cols");
}

void check_view(const View& view, const Piece& piece, const char* what) {
  const std::string name(what);
  if (view.dtype < kBF16 || view.dtype > kF64)
    throw std::invalid_argument(name + " has a dtype that is not computed with");
  if (view.cast < -1 || view.cast > kF64) throw std::invalid_argument(name + " has a load cast to an unknown dtype");
  if (view.shape.size() != view.strides.size())
    throw std::invalid_argument(name + " needs one stride for each dimension");
  std::int64_t count = 1;
  for (const std::int64_t size : view.shape) count *= size;
  if (count != piece.rows * piece.cols)
    throw std::invalid_argument(name + " has " + std::to_string(count) + " elements, its piece " +
                                std::to_string(piece.rows * piece.cols));
  if (count > 0 && view.data == nullptr) throw std::invalid_argument(name + " has a null address");
  if (reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(itemsize(view.dtype)) != 0)
    throw std::invalid_argument(name + " is not aligned to its dtype");
}

}  // namespace mergekernels
