// A whole program as it lies in device memory: what the general kernels read besides their arguments.
#pragma once

#include "cuda/keys.h"
#include "cuda/point.h"

namespace mergekernels {

enum Rule : std::int32_t { kRuleAll = 0, kRulePoint = 1, kRuleBand = 2, kRuleDraw = 3, kRuleMarked = 4, kRuleRank = 5 };
enum Vote : std::int32_t { kVoteNone = 0, kVoteWeighted = 1, kVotePlain = 2, kVoteCount = 3 };
enum Merge : std::int32_t { kMergeSum = 0, kMergeMax = 1, kMergeLargest = 2, kMergeImportance = 3, kMergeBalance = 4 };
enum Axis : std::int32_t { kAxisNone = 0, kAxisRows = 1, kAxisColumns = 2, kAxisGroups = 3 };
enum Joint : std::int32_t { kJointNone = 0, kJointVariance = 1, kJointImportance = 2 };

// Beside those of common/program.h.
constexpr int kDivideByKept = 4;

// One model. marks: packed bits, for kRuleMarked. masks: a byte for each element of the piece, for kRuleRank;
// thresholds: of a rank rule that divides, less one, else nullptr. threshold: of kRuleDraw.
template <class C>
struct ModelPlan {
  Point<C> point, top;
  const std::uint8_t* marks;
  const std::uint8_t* masks;
  const std::uint32_t* thresholds;
  std::uint64_t threshold;
  C weight, factor, alone, useful;
  BalancePlan<C> balance;
  std::int32_t rule;
  std::int32_t scaled;
};

// See Program in ops/program.py. useful_at_least: -1 for none. marks_shift: the bit at which packed marks begin. table:
// C [models][segments]; rows: C, one per row of row_length elements, for a joint point on the importance key.
template <class C>
struct Plan {
  std::uint64_t seed;
  std::uint32_t tensor, table_tensor;
  std::int32_t num_models, vote, zero_vote, merge, divisor, joint, axis;
  std::int32_t subtract, anchor_first, scaled, has_alone, useful_at_least, has_limit, has_floor, marks_shift;
  C divisor_value, divisor_floor, scale, epsilon, limit, limit_factor, limit_below;
  Point<C> joint_point;
  const C* table;
  const C* rows;
  std::int64_t table_length, segments, row_length;
  ModelPlan<C> models[kMaxModels];
};

// One call of a general kernel, by value. models: the inputs, with merge "importance" followed by their importances.
// counters: as in StreamArgs. marks: where to write packed bits (instead of a result), or nullptr; mark: what of.
enum Mark : std::int32_t { kMarkNone = 0, kMarkKept = 1, kMarkAgreeing = 2, kMarkUseful = 3 };

template <class C>
struct ProgramArgs {
  std::int64_t n;
  Piece piece;
  const Plan<C>* plan;
  const void* base;
  void* out;
  unsigned long long* counters;
  std::int32_t slots, num_inputs, out_dtype, mark;
  bool aligned, quads;
  const void* models[kMaxModels];
  std::uint8_t* marks[kMaxModels];
};
static_assert(sizeof(ProgramArgs<double>) <= 4096, "the arguments of a kernel");

}  // namespace mergekernels
