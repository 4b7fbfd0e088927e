// The launches, without a CUDA header: the binding and the host build of the tests see only this.
#pragma once

#include "cuda/als_group.h"
#include "cuda/divergence_group.h"
#include "cuda/gram_group.h"
#include "cuda/jacobi_group.h"
#include "cuda/learned_group.h"
#include "cuda/list_group.h"
#include "cuda/mttkrp_group.h"
#include "cuda/program_group.h"
#include "cuda/rank_group.h"
#include "cuda/reduce_group.h"
#include "cuda/select_group.h"
#include "cuda/stream_group.h"

namespace mergekernels {

// Where a launch goes: a device number and a stream handle (0 for the default stream). Every function below throws
// std::runtime_error with the driver's reason if it cannot launch, and does not wait for the result.
struct Queue {
  int device;
  void* stream;
};

// dtype: of the inputs, a DTypeCode: float64 for C = double, any other for C = float.
template <class C>
void launch_stream(const StreamArgs<C>& args, int dtype, const Queue& queue);
template <class C>
void launch_program(const ProgramArgs<C>& args, int dtype, const Queue& queue);
template <class C>
void launch_list(const ListArgs<C>& args, int dtype, const Queue& queue);
template <class C>
void launch_reduce(const ReduceArgs<C>& args, int dtype, const Queue& queue);
template <class C>
void launch_block_sums(const NormArgs<C>& args, int dtype, const Queue& queue);
template <class C>
void launch_gram(const GramArgs& args, int dtype, const Queue& queue);
template <class C>
void launch_divergence(const DivergenceArgs<C>& args, int dtype, const Queue& queue);
template <class C>
void launch_seg_dot(const LearnedArgs<C>& args, int dtype, const Queue& queue);
template <class C>
void launch_mask_sum(const LearnedArgs<C>& args, const Queue& queue);
template <class C>
void launch_mask_merge(const LearnedArgs<C>& args, bool slope, int dtype, const Queue& queue);
template <class C>
void launch_rank(const RankArgs& args, int dtype, const Queue& queue);
template <class C>
void launch_sweep(const SweepArgs& args, int dtype, const Queue& queue);

// threads: jacobi_threads of every matrix of the call; bytes: of the largest room. `eigh`: an eigenproblem, else an
// SVD.
template <class C>
void launch_jacobi(bool eigh, const JacobiArgs<C>& args, int threads, int bytes, const Queue& queue);

// Bytes of memory on the chip that a block may have.
int jacobi_limit(int device);

// One block for each problem, als_threads and als_room of their shape.
void launch_als(const AlsArgs& args, const Queue& queue);

template <class C>
void launch_thin(const ThinArgs<C>& args, const Queue& queue);
void launch_task_sums(const TaskArgs& args, const Queue& queue);

// The memory that the ranks of long rows need: bytes for each block of threads, and how many blocks; 0 where rows fit
// on the chip.
struct RankRoom {
  std::int64_t size;
  int blocks;
};
template <class C>
RankRoom rank_room(std::int64_t rows, std::int64_t length, int device);

// Devices that the driver offers, and why there are none ("" if there are).
int num_devices(char* reason, int size);

// What the module was built with.
const char* toolkit();

}  // namespace mergekernels
