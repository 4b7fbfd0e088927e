"""Types of the native CUDA module. Addresses and stream handles are integers; every call launches and does not wait.

Codes of dtypes are those of `mergekernels.tensors`; inputs of float64 are computed in float64, all others in float32.
A launch that fails raises RuntimeError with the driver's reason.
"""

from collections.abc import Sequence
from typing import Any

# (g0, rows, cols, ld)
Box = tuple[int, int, int, int]
# (tau, ties, word, index), ties 0 all, 1 none, 2 hash, 3 index
Point = tuple[int, int, int, int]
# (stage, lo, hi, tau, model), stage 0 left out, 1 key, 2 tie
Interval = tuple[int, int, int, int, int]
# (weights, keep, base, consensus, zero_vote, divisor, divisor_value, scale, copy, seed, tensor), as in _cpu.pyi
Program = tuple[list[float], list[Point | None], bool, int, int, int, float, float, bool, int, int]

def stream(
    program: Program,
    piece: Box,
    base: int,
    models: list[int],
    out: int,
    dtype: int,
    out_dtype: int,
    compute: int,
    raw: bool,
    counters: int,
    slots: int,
    device: int,
    queue: int,
) -> None:
    """The fused pass over dense arrays of one dtype. base, out, counters : 0 for none.

    raw : a plain copy keeps the bits. counters : int64 [slots, 3 K + 7], see backends._gpu.Launches.
    """

def plan(program: dict[str, Any], compute: int) -> bytes:
    """The table of a whole program that `program`, `mark` and `reduce` read in device memory.

    The fields are those that `_backends._cuda_plan.fields` makes; ValueError where they do not fit together.
    """

def program(
    plan: int,
    piece: Box,
    base: int,
    models: list[int],
    out: int,
    dtype: int,
    out_dtype: int,
    compute: int,
    counters: int,
    slots: int,
    device: int,
    queue: int,
) -> None:
    """The general fused pass. plan : address of the table in device memory; models : all inputs; else as `stream`."""

TILE: int
"""Elements of one tile of a list."""

def list_item(plan: int, piece: Box, base: int, models: list[int], out: int, out_dtype: int, compute: int) -> bytes:
    """One tensor of a list, as it lies in the table; see `program`."""

def program_list(
    items: int, tiles: int, num_tiles: int, bad: int, dtype: int, compute: int, device: int, queue: int
) -> None:
    """The general fused pass over many tensors in one launch.

    items : address of items in device memory; tiles : int32 pairs (item, number of its tile); bad : int32 per item, set
    to 1 where an input or the result is not finite, or 0.
    """

def mark(
    plan: int,
    piece: Box,
    base: int,
    models: list[int],
    kind: int,
    marks: list[int],
    dtype: int,
    compute: int,
    device: int,
    queue: int,
) -> None:
    """Packed bits of each model. kind : 1 kept, 2 agreeing, 3 useful."""

def reduce(
    plan: int,
    piece: Box,
    base: int,
    models: list[int],
    slots: list[tuple[int, int]],
    dtype: int,
    compute: int,
    sums: int,
    device: int,
    queue: int,
) -> None:
    """Sums over canonical blocks: float64 [slots, blocks]. slots : (number in QUANTITIES, model) of each."""

def gram(
    columns: bool,
    models: list[int],
    base: int,
    rows: int,
    cols: int,
    dtype: int,
    compute: int,
    sums: int,
    device: int,
    queue: int,
) -> None:
    """Products of pairs of models over a dense box, summed over canonical blocks: float64 [pairs, segments, blocks].

    columns : segments are columns instead of rows. base : what is taken off every model, or 0.
    """

def divergence(
    model: int,
    base: int,
    rows: int,
    cols: int,
    dtype: int,
    compute: int,
    maxima: int,
    totals: int,
    sums: int,
    device: int,
    queue: int,
) -> None:
    """One pass of the divergence of rows, see `Launches.launch_divergence`. totals : 0 in the first pass."""

# (temperature, mean, seed, tensor id)
Mask = tuple[float, float, int, int]
# (address, dtype) of a tensor with a dtype of its own, address 0 for none
Side = tuple[int, int]

def seg_dot(
    groups: int,
    key: tuple[int, int],
    mask: Mask | None,
    piece: Box,
    base: int,
    models: list[int],
    gradient: Side,
    logits: Side,
    dtype: int,
    compute: int,
    sums: int,
    device: int,
    queue: int,
) -> None:
    """Products of a gradient and deltas, summed over canonical blocks: float64 [K * groups, blocks]; see SegDot.

    key : (seed, tensor id) of the groups. logits : there iff there is a mask. dtype : of the models and the base.
    """

def mask_sum(mask: Mask, piece: Box, logits: Side, compute: int, sums: int, device: int, queue: int) -> None:
    """A mask, summed over canonical blocks: float64 [blocks]; its mean plays no part."""

def mask_merge(
    weights: Sequence[float],
    shift: float | None,
    mask: Mask,
    piece: Box,
    base: int,
    models: list[int],
    gradient: Side,
    logits: Side,
    out: Side,
    dtype: int,
    compute: int,
    device: int,
    queue: int,
) -> None:
    """The merge inside a mask, or with a shift and a gradient the gradient of the logits; see MaskMerge."""

def rank_room(rows: int, length: int, compute: int, device: int) -> tuple[int, int]:
    """(bytes, number) of the pieces of memory that the ranks of long rows need, (0, 0) where a row fits on the chip."""

def rank(
    rule: tuple[bool, int, int, int, int, int],
    g0: int,
    rows: int,
    length: int,
    stride: int,
    base: int,
    x: int,
    dtype: int,
    compute: int,
    seed: int,
    tensor: int,
    model: int,
    masks: int,
    thresholds: int,
    room: int,
    room_size: int,
    blocks: int,
    device: int,
    queue: int,
) -> None:
    """What a rank rule keeps of one model: a byte per element of a flat piece of whole slabs.

    rule : (is a draw, low, span, single, first, last). thresholds : uint32 per element, less one, or 0. room : memory
    as `rank_room` says, or 0.
    """

def block_sums(
    program: Program,
    piece: Box,
    base: int,
    models: list[int],
    dtype: int,
    compute: int,
    sums: int,
    device: int,
    queue: int,
) -> None:
    """Sums of squares over canonical blocks: float64 [K, blocks]."""

def sweep(
    intervals: list[Interval],
    by_word: bool,
    piece: Box,
    base: int,
    models: list[int],
    dtype: int,
    compute: int,
    seed: int,
    tensor: int,
    offset: int,
    capacity: int,
    key: int,
    numbers: int,
    row_length: int,
    counters: int,
    ordinals: int,
    indices: int,
    bins: int,
    device: int,
    queue: int,
) -> None:
    """One counting pass of S searches. A search that is left out has stage 0 and, unless the key is joint, address 0.

    models : all models where the key is joint, else one tensor per search. key : 0 delta, 1 variance, 2 importance,
    3 balance. numbers : of the key, see `Launches.launch_sweep`; row_length : for importance.
    counters : int64 [4 S + 2]; ordinals, indices : int64 [S, capacity]; bins : int64 [S, 4096] or 0, filled instead of
    the rest.
    """

def jacobi_limit(device: int) -> int:
    """Bytes of shared memory that a block of the device may have."""

def jacobi_room(eigh: bool, p: int, s: int, far: bool, compute: int) -> tuple[int, int]:
    """(threads, bytes of shared memory) for one p x s matrix, p >= s. far : it is held in global memory."""

# (matrix, its strides; left, strides; right, strides; values; far; report; p, s), strides of rows and columns
JacobiItem = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int]

def jacobi_table(items: list[JacobiItem], compute: int) -> bytes:
    """The items of one launch as they lie in device memory. Addresses are 0 for what is not wanted.

    left : p x s, not of eigenproblems; right : s x s; values : [s]; far : room for p x s numbers, where a matrix
    does not fit on the chip; report : float64 [2], sweeps (0 not converged, -1 NaN or Inf) and largest cosine.
    """

def jacobi(eigh: bool, items: int, count: int, compute: int, threads: int, size: int, device: int, queue: int) -> None:
    """Decompose `count` matrices of one number of threads, one block each. size : bytes of shared memory."""

# tasks, sum of ranks R, rows of b (p) and of a (q), terms c
AlsShape = tuple[int, int, int, int, int]
# (b, a, state, history, report, norm2), see csrc/common/als.h
AlsProblem = tuple[int, int, int, int, int, float]

def als_room(shape: AlsShape, far: bool) -> int:
    """Bytes of shared memory for one problem. far : its cores stay in global memory."""

def als_table(problems: list[AlsProblem]) -> bytes:
    """The problems of one launch as they lie in device memory; all addresses are those of float64 numbers."""

def als(
    items: int,
    count: int,
    shape: AlsShape,
    owner: int,
    ends: int,
    tol: float,
    prox: float,
    sweeps: int,
    search: bool,
    far: bool,
    device: int,
    queue: int,
) -> None:
    """Up to `sweeps` sweeps of each problem, one block each; see _cpu.als. items : the table on the device."""

# (x, f, scale or 0, owner or 0, out, pitch of x, rows of out, depth of the sum, whether x is transposed)
ThinItem = tuple[int, int, int, int, int, int, int, int, bool]

def thin_table(items: list[ThinItem], width: int, compute: int) -> tuple[bytes, int]:
    """Products x f or x^T f as they lie in device memory, and their tiles. x : of the compute dtype; the rest float64.

    scale : [tasks, width], row owner[d] of which multiplies row d of f; owner : int32.
    """

def thin(items: int, count: int, width: int, tiles: int, compute: int, device: int, queue: int) -> None:
    """All products of a table in one launch."""

def task_table(items: list[tuple[int, int, int, int, int]], width: int) -> tuple[bytes, int]:
    """Sums (p, s, ends, out, tasks) as they lie in device memory, and their elements. ends : int32 [tasks + 1]."""

def task_sums(items: int, count: int, width: int, elements: int, device: int, queue: int) -> None:
    """out[t] = sum of p[r] s[r] over ends[t] <= r < ends[t + 1], for all items of a table."""

def devices() -> tuple[int, str]:
    """Devices that the driver offers, and why there are none."""

def build_info() -> dict[str, str]:
    """What the module was built with: "toolkit"."""
