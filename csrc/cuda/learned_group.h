// The passes behind learned coefficients and masks (see ops/learned.py for the formulas), eight elements at a time:
//   seg dot     sum of gradient * v per model and group, v = x - base, times the mask if there is one. Reads the models
//               once, the rest once for each tile of slots; the tiles of a block run side by side and share the cache.
//   mask sum    sum of the mask; reads the logits once
//   mask merge  base + m / mean * (sum of w v), or the gradient of that with respect to the logits; reads each input
//               once, writes once
// Sums are written as 8 bytes per slot and canonical block.
#pragma once

#include "common/program.h"
#include "common/transcendental.h"
#include "cuda/group.h"

namespace mergekernels {

// A seed and a tensor id of Philox words.
struct WordKey {
  std::uint64_t seed;
  std::uint32_t tensor;
};

// One call, by value. The piece is flat. base, gradient, logits: nullptr where a pass has none. sums: double
// [models * groups][blocks]. C: the compute type; the models and the base have one dtype, the rest their own.
template <class C>
struct LearnedArgs {
  std::int64_t n, blocks;
  Piece piece;
  const void *base, *gradient, *logits;
  void* out;
  double* sums;
  WordKey group_key, mask_key;
  std::int32_t num_models, groups, gradient_dtype, logits_dtype, out_dtype;
  bool aligned, quads;
  C temperature, mean, shift;
  const void* models[kMaxModels];
  C weights[kMaxModels];
};
static_assert(sizeof(LearnedArgs<double>) <= 4096, "the arguments of a kernel");

// Eight elements of a tensor whose dtype is known at run time only; the same for all threads.
template <class C>
MK_HD void load_as(const LearnedArgs<C>& a, const void* data, int dtype, std::int64_t first, int n, C* x) {
  if constexpr (sizeof(C) == 8) {
    widen(load_packed<kF64>(data, first, n, a.aligned), x);
  } else if (dtype == kBF16) {
    widen(load_packed<kBF16>(data, first, n, a.aligned), x);
  } else if (dtype == kF16) {
    widen(load_packed<kF16>(data, first, n, a.aligned), x);
  } else {
    widen(load_packed<kF32>(data, first, n, a.aligned), x);
  }
}

template <class C>
MK_HD void store_result(const LearnedArgs<C>& a, const C* y, std::int64_t first, int n) {
  switch (a.out_dtype) {
    case kBF16:
      store_packed(narrow<kBF16>(y), a.out, first, n, a.aligned);
      break;
    case kF16:
      store_packed(narrow<kF16>(y), a.out, first, n, a.aligned);
      break;
    case kF32:
      store_packed(narrow<kF32>(y), a.out, first, n, a.aligned);
      break;
    default:
      store_packed(narrow<kF64>(y), a.out, first, n, a.aligned);
      break;
  }
}

// The mask of eight elements, 0 where there is none.
template <class C>
MK_HD void relaxed_mask(const LearnedArgs<C>& a, std::int64_t first, int n, C* mask) {
  std::uint32_t words[kGroup] = {};
  group_words(a.mask_key.seed, a.mask_key.tensor, kPurposeMask, a.piece, first, a.quads, first_bits(n), words);
  C z[kGroup];
  load_as(a, a.logits, a.logits_dtype, first, n, z);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) mask[j] = C(0);
  // One copy of the functions in the code.
  MK_ROLLED
  for (int i = 0; i < n; ++i) {
    const C u = (C(std::int32_t(pick(words, i) >> 9)) + C(0.5)) * C(0x1p-23);
    const C r = (pick(z, i) + C(exact_log(double(u)))) - C(exact_log(double(C(C(1) - u))));
    const C value = C(exact_sigmoid(double(C(r / a.temperature))));
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) mask[j] = j == i ? value : mask[j];
  }
}

// The mask over its mean; 0 where that is 0.
template <class C>
MK_HD C normalised(const LearnedArgs<C>& a, C mask) {
  return a.mean == C(0) ? C(0) : mask / a.mean;
}

template <int kDType, class C>
MK_HD void load_base(const LearnedArgs<C>& a, std::int64_t first, int n, C* base) {
  // Without a base it is +0, and x - (+0) has the bits of x.
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) base[j] = C(0);
  if (a.base != nullptr) widen(load_packed<kDType>(a.base, first, n, a.aligned), base);
}

// What the products of all models share.
template <class C>
struct Factors {
  C base[kGroup], gradient[kGroup], mask[kGroup];
};

template <int kDType, bool kMasked, class C>
MK_HD Factors<C> dot_factors(const LearnedArgs<C>& a, std::int64_t first, int n) {
  Factors<C> factors = {};
  load_base<kDType>(a, first, n, factors.base);
  load_as(a, a.gradient, a.gradient_dtype, first, n, factors.gradient);
  if (kMasked) {
    relaxed_mask(a, first, n, factors.mask);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) factors.mask[j] = normalised(a, factors.mask[j]);
  }
  return factors;
}

// The products of model m. Past the end all factors are +0.
template <int kDType, bool kMasked, class C>
MK_HD void dot_products(const LearnedArgs<C>& a, const Factors<C>& factors, int m, std::int64_t first, int n,
                        double* products) {
  C x[kGroup];
  widen(load_packed<kDType>(a.models[m], first, n, a.aligned), x);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    C v = x[j] - factors.base[j];
    if (kMasked) v = factors.mask[j] * v;
    products[j] = double(factors.gradient[j]) * double(v);
  }
}

// One group: a tile of models, whose sums live in registers.
constexpr int kDotModels = 4;

MK_HD int num_dot_tiles(int num_models) { return (num_models + kDotModels - 1) / kDotModels; }

// Adds the products of eight elements to eight sums of each model of a tile.
template <int kDType, bool kMasked, class C>
MK_HD void add_dots(const LearnedArgs<C>& a, int tile, std::int64_t first, int n, double sums[kDotModels][kGroup]) {
  const Factors<C> factors = dot_factors<kDType, kMasked>(a, first, n);
  MK_UNROLL
  for (int t = 0; t < kDotModels; ++t) {
    const int m = tile * kDotModels + t;
    if (m >= a.num_models) continue;
    double products[kGroup];
    dot_products<kDType, kMasked>(a, factors, m, first, n, products);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) sums[t][j] = sums[t][j] + products[j];
  }
}

// Several groups: a tile of at most eight slots, models by groups, whose sums live in memory, since which of them an
// element goes to is known at run time only.
constexpr int kTileSlots = 8;

struct SlotTile {
  int model, models, group, groups;
};

// Groups of the tiles: as even as can be.
MK_HD int tile_groups(int groups) {
  const int tiles = (groups + kTileSlots - 1) / kTileSlots;
  return (groups + tiles - 1) / tiles;
}

MK_HD int num_slot_tiles(int num_models, int groups) {
  const int wide = tile_groups(groups), deep = kTileSlots / wide;
  return ((num_models + deep - 1) / deep) * ((groups + wide - 1) / wide);
}

MK_HD SlotTile slot_tile_at(int num_models, int groups, int number) {
  const int wide = tile_groups(groups), deep = kTileSlots / wide, across = (groups + wide - 1) / wide;
  const int model = number / across * deep, group = number % across * wide;
  return {model, num_models - model < deep ? num_models - model : deep, group,
          groups - group < wide ? groups - group : wide};
}

// Slot of a tile among those of the call.
template <class C>
MK_HD std::int64_t slot_of(const LearnedArgs<C>& a, const SlotTile& tile, int slot) {
  return std::int64_t(tile.model + slot / tile.groups) * a.groups + tile.group + slot % tile.groups;
}

// Adds the products of eight elements to sums[(slot * 8 + j) * stride]. What is in another group would add +0, which
// changes no sum.
template <int kDType, bool kMasked, class C>
MK_HD void add_grouped_dots(const LearnedArgs<C>& a, const SlotTile& tile, std::int64_t first, int n, double* sums,
                            int stride) {
  std::uint32_t words[kGroup] = {};
  group_words(a.group_key.seed, a.group_key.tensor, kPurposeGroup, a.piece, first, a.quads, first_bits(n), words);
  const Factors<C> factors = dot_factors<kDType, kMasked>(a, first, n);
  MK_ROLLED
  for (int t = 0; t < tile.models; ++t) {
    double products[kGroup];
    dot_products<kDType, kMasked>(a, factors, tile.model + t, first, n, products);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const int group = int(std::uint64_t(words[j]) * std::uint64_t(a.groups) >> 32) - tile.group;
      if (j >= n || group < 0 || group >= tile.groups) continue;
      double* const at = sums + ((t * tile.groups + group) * kGroup + j) * stride;
      *at = *at + products[j];
    }
  }
}

// Adds the mask of eight elements to eight sums.
template <class C>
MK_HD void add_mask(const LearnedArgs<C>& a, std::int64_t first, int n, double* sums) {
  C mask[kGroup];
  relaxed_mask(a, first, n, mask);
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) sums[j] = sums[j] + double(mask[j]);
}

// Writes eight elements of the merge inside the mask, or with kSlope of the gradient of the logits.
template <int kDType, bool kSlope, class C>
MK_HD void mask_group(const LearnedArgs<C>& a, std::int64_t first, int n) {
  if (n <= 0) return;
  C base[kGroup], total[kGroup] = {}, mask[kGroup];
  load_base<kDType>(a, first, n, base);
  const auto load = [&a, first, n](int m) { return load_packed<kDType>(a.models[m], first, n, a.aligned); };
  Pipeline<kDType> pipeline;
  pipeline.start(a.num_models, load);
  MK_ROLLED
  for (int m = 0; m < a.num_models; ++m) {
    C x[kGroup];
    widen(pipeline.next(m, a.num_models, load), x);
    MK_UNROLL
    for (int j = 0; j < kGroup; ++j) total[j] = total[j] + a.weights[m] * (x[j] - base[j]);
  }
  relaxed_mask(a, first, n, mask);
  C gradient[kGroup] = {};
  if (kSlope) load_as(a, a.gradient, a.gradient_dtype, first, n, gradient);
  C y[kGroup];
  MK_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    if (kSlope) {
      const C centred = (gradient[j] * total[j] - a.shift) / a.mean;
      const C slope = ((centred * mask[j]) * (C(1) - mask[j])) / a.temperature;
      y[j] = a.mean == C(0) ? C(0) : slope;
    } else {
      const C merged = normalised(a, mask[j]) * total[j];
      y[j] = a.base == nullptr ? merged : base[j] + merged;
    }
  }
  store_result(a, y, first, n);
}

}  // namespace mergekernels
