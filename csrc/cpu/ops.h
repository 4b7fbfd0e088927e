// The ops of the CPU backend: checks, the cut into threads and runs, and the calls of the kernels.
#pragma once

#include <string>
#include <vector>

#include "common/philox.h"
#include "cpu/block_sums.h"
#include "cpu/stats.h"
#include "cpu/view.h"

namespace mergekernels {

// The kernels called `isa`; throws if this build or machine lacks them.
const Kernels& kernels_of(const std::string& isa);

// Threads that work of this size is worth: at most `threads`, at least 1 MiB of input for each.
int team_size(int threads, std::int64_t bytes);

void check_piece(const Piece& piece);

// Throws unless the view has the elements of the piece, a dtype that can be computed with and an aligned address.
void check_view(const View& view, const Piece& piece, const char* what);

// What passes that run a program take. base: null if there is none. marks: per model the bits of the piece, from the
// byte of its first element on, or null; may be shorter.
struct PassInputs {
  const Program* program;
  Piece piece;
  const View* base;
  const std::vector<View>* models;
  const std::vector<const std::uint8_t*>* marks;
  int compute, threads;
  const Kernels* kernels;
};

// out, stats: null where absent.
void stream(const PassInputs& inputs, const View* out, StreamStats* stats);

// Sums of quantities, see Quantity, into the slots of `sums` in order; one segment, the tensor. bits: empty, or per
// model where to write the packed bits of what it keeps and is not 0 (null: nowhere).
void reduce(const PassInputs& inputs, const std::vector<int>& quantities, BlockSums* sums,
            const std::vector<std::uint8_t*>& bits);

// Packed bits per model, see Mark.
void mark(const PassInputs& inputs, int kind, const std::vector<std::uint8_t*>& bits);

// What a sweep ranks; see Sweep in ops/sweeps.py.
struct SweepKeys {
  int key = kSweepDelta;
  Table rows{};                      // kSweepImportance
  std::vector<Competitor> balance;   // kSweepBalance, one per model
  std::vector<std::uint64_t> draws;  // kSweepDrawn, a threshold per model
};

inline bool joint(const SweepKeys& keys) { return keys.key == kSweepVariance || keys.key == kSweepBalance; }

// The searches of a null model are left out, and those whose intervals are.
void sweep(SweepStats* stats, const Piece& piece, const View* base, const std::vector<const View*>& models,
           const SweepKeys& keys, int compute, std::uint64_t seed, std::uint32_t tensor, std::int64_t offset,
           int threads, const Kernels& kernels);

// How a tensor is cut into segments; see Segments in ops/sums.py. A tensor is one row.
enum Axis : int { kAxisRows = 0, kAxisColumns = 1 };

// Dot products of all pairs of models, of deltas if there is a base, into `sums`, whose segments they are.
void gram(BlockSums* sums, int axis, const Piece& piece, const View* base, const std::vector<View>& models, int compute,
          int threads, const Kernels& kernels);

// The divergence of the softmax of each of the model's rows of `length` elements from that of the base's.
std::vector<double> divergence(std::int64_t length, const Piece& piece, const View& base, const View& model,
                               int compute, int threads, const Kernels& kernels);

// The elements of a piece of b a (m x r, r x n; contiguous, of the dtype of `out`) to `out`, or added to it. An element
// has the same bits whatever the piece.
void product(const View& b, const View& a, const Piece& piece, const View& out, bool add, const Kernels& kernels);

// One module of mttkrp. b: (m, R), at: (n, R), dense, float32 or float64; ranks: of each task, R in all; c, u, v: the
// factors, dense float64 of `width` columns (the one of the mode is not read); out: float64, rows of the mode.
struct MttkrpItem {
  View b, at;
  std::vector<std::int64_t> ranks;
  const double *c, *u, *v;
  double* out;
};

// See ops.mttkrp. Threads share modules and, within them, stretches of rows and columns that depend on the sizes alone.
void mttkrp(const std::vector<MttkrpItem>& items, int mode, std::int64_t width, int threads, const Kernels& kernels);

// All problems of a batch, one thread each at a time.
void als(const AlsArgs& args, int threads, const Kernels& kernels);

}  // namespace mergekernels
