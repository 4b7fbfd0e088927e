// The fused pass as plain data; see Program in ops/program.py and the rules in ops/keep.py.
#pragma once

#include "common/program.h"

namespace mergekernels {

enum Vote : int { kVoteNone = 0, kVoteWeighted = 1, kVotePlain = 2, kVoteCount = 3 };
enum Merge : int { kMergeSum = 0, kMergeMax = 1, kMergeLargest = 2, kMergeImportance = 3, kMergeBalance = 4 };
enum Rule : int {
  kRuleAll = 0,
  kRulePoint = 1,
  kRuleBand = 2,
  kRuleDraw = 3,
  kRuleMarked = 4,
  kRuleRankDraw = 5,
  kRuleRankBand = 6
};
enum TableAxis : int { kTableNone = 0, kTableRows = 1, kTableColumns = 2, kTableGroups = 3 };

struct KeepRule {
  int kind;
  KeepPoint point;                  // of a band `wide`; keeps everything if it is not active
  KeepPoint top;                    // kRuleBand
  std::uint64_t low, span, single;  // kRuleRankDraw; kRuleDraw: low is the threshold
  std::int64_t first, last;         // kRuleRankBand
  int divide;                       // kRuleRankDraw
};

// Numbers of segments: `segments` for each model. The caller keeps `values` alive.
struct Table {
  int axis;
  std::uint32_t tensor;
  std::int64_t length, segments;
  const double* values;
};

struct Competitor {  // see Balance in ops/program.py
  double lo, hi, spread, cut, top;
};

struct Program {
  int num_models;
  int num_inputs;  // the models, with merge importance as many weights of their entries
  int has_base, subtract, anchor_first, copy;
  int vote, zero_vote, merge, divisor;
  int has_factors, has_alone, has_limit, has_useful, at_least;
  double divisor_value, divisor_floor, scale, limit, epsilon;
  std::uint64_t seed;
  std::uint32_t tensor;
  double weights[kMaxModels], factors[kMaxModels], alone[kMaxModels], thresholds[kMaxModels];
  KeepRule keep[kMaxModels];
  KeepPoint joint;
  Competitor balance[kMaxModels];
  Table importance;  // numbers of rows for the key of `joint`; without them it is the variance
  Table table;
  std::int64_t row_length, row_stride;  // 0 without rows
};

inline bool ranked(const KeepRule& rule) { return rule.kind == kRuleRankDraw || rule.kind == kRuleRankBand; }

}  // namespace mergekernels
