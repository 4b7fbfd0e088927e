// Comparison of two runs of elements, for `mergekernels diff`.
#pragma once

#include <cstdint>
#include <string_view>

namespace mergekernels {

// What a comparison found. A pair differs if its bits differ; between two dtypes, if its exact values differ (a zero's
// sign counts, a NaN equals a NaN).
struct Comparison {
  std::int64_t differing = 0;  // pairs that differ
  std::int64_t first = -1;     // index of the first of them, -1 for none
  std::int64_t unbounded = 0;  // unequal pairs with a NaN or an infinity: no finite difference (two NaNs do not count)
  std::uint64_t max_ulp =
      0;  // largest distance of a pair without NaN, in units in the last place of the narrower dtype
  std::int64_t max_ulp_at = -1;  // index of the first pair at that distance, -1 if no distance was above 0
  double max_abs = 0.0;          // largest |a - b| of the finite pairs
  double squares_diff = 0.0;     // sum of (a - b)^2 over the finite pairs
  double squares_a = 0.0;        // sum of a^2 over the finite pairs
  bool measured = false;         // false for dtypes that are compared as bytes only
};

// True if elements of these two safetensors dtypes can be compared by `compare`.
bool comparable(std::string_view dtype_a, std::string_view dtype_b);

// Compares n elements at `a` and `b`, each aligned to its dtype. Sums run in float64 over blocks of 4,096 elements, 256
// lanes to a block, and binary trees over lanes and blocks, so they do not depend on how a caller cuts at multiples of
// a power of two blocks. With `norm` false, equal bytes return at once and squares_a stays 0.
Comparison compare(const void* a, std::string_view dtype_a, const void* b, std::string_view dtype_b, std::int64_t n,
                   bool norm);

}  // namespace mergekernels
