// The kernels for the baseline of the architecture (SSE2, NEON).
#define MK_ISA base
#define MK_VECTOR_BYTES 16
#include "cpu/kernels.inc"
