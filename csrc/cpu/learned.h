// The passes behind learned coefficients and masks (see ops/learned.py for the formulas).
#pragma once

#include <vector>

#include "cpu/block_sums.h"
#include "cpu/kernels.h"
#include "cpu/view.h"

namespace mergekernels {

enum LearnedPass : int { kSegDot = 0, kMaskSum = 1, kMaskMerge = 2, kMaskSlope = 3 };

// Philox key and tensor id.
struct Draw {
  std::uint64_t seed;
  std::uint32_t tensor;
};

// What a pass is asked for. masked: kSegDot multiplies deltas by the mask. shift: of kMaskSlope.
struct LearnedRequest {
  int pass;
  int groups;
  Draw group_draw, mask_draw;
  bool masked;
  double temperature, mean, shift;
  std::vector<double> weights;
};

// One run: n consecutive elements from flat index g0, for sums a multiple of kCanonicalBlock.
struct LearnedArgs {
  int pass;
  int num_models, groups;
  Draw group_draw, mask_draw;
  bool masked;
  double temperature, mean, shift;
  double weights[kMaxModels];
  std::int64_t g0, n;
  Source base, gradient, logits;  // data null where absent
  Source models[kMaxModels];
  int compute;
  double* sums;  // sum of block j in slot s at [s * slot_stride + j]
  std::int64_t slot_stride;
  void* out;
  int out_dtype;
  void* scratch;  // learned_scratch_bytes(), aligned to 64
};

constexpr std::int64_t learned_scratch_bytes(std::int64_t slots) {
  return std::int64_t(kBlock) * 8 * (7 + (slots > 0 ? slots : 1));
}

// base, gradient, logits, out: null where absent; sums: null unless the pass sums. Flat pieces only, for sums of whole
// canonical blocks.
void learned(const LearnedRequest& request, BlockSums* sums, const Piece& piece, const View* base,
             const std::vector<View>& models, const View* gradient, const View* logits, const View* out, int compute,
             int threads, const Kernels& kernels);

}  // namespace mergekernels
