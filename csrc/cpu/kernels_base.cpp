// The kernels for the baseline of the architecture (SSE2, NEON).
#define MK_ISA base
#define MK_VECTOR_BYTES 16
#include "cpu/vector.inc"
#include "cpu/load.inc"
#include "cpu/philox.inc"
#include "cpu/stream.inc"
#include "cpu/select.inc"
#include "cpu/table.inc"
