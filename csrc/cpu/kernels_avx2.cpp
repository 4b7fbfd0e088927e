// The kernels for x86-64-v3.
#define MK_ISA avx2
#define MK_VECTOR_BYTES 32
#include "cpu/kernels.inc"
