"""Types of the native CPU module. Views are tuples, so that native code needs no Python classes."""

from collections.abc import Sequence
from typing import Any

# (ptr, dtype code, cast code or -1, shape, strides in elements)
View = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
# (g0, rows, cols, ld)
Box = tuple[int, int, int, int]

class Buffer:
    """Page-aligned zero-cost memory, reused between tiles; supports the (writable) buffer protocol."""

    ptr: int
    nbytes: int
    def __init__(self, nbytes: int) -> None: ...
    def __buffer__(self, flags: int) -> memoryview: ...

class SweepStats:
    """Accumulator of one sweep over any number of tensors. Thread safe. See ops.program.Sweep."""

    capacity: int
    def __init__(
        self,
        stages: list[int],
        lo: list[int],
        hi: list[int],
        tau: list[int],
        order: int,
        capacity: int,
        models: list[int] | None = None,
    ) -> None:
        """Per search: stage 0 = left out, 1 = key, 2 = tie; models: whose Philox stream orders its ties, by default its
        position. "Model" below is the number of a search.

        order: 0 = hash, 1 = index. capacity: entries kept per search.
        """

    def before(self, model: int) -> int: ...
    def inside(self, model: int) -> int: ...
    def overflowed(self, model: int) -> bool: ...
    def histogram(self, model: int) -> list[int]:
        """Counts of the NUM_BINS bins, valid whether or not the entries overflowed."""

    def order_statistics(self, model: int, ranks: list[int]) -> list[int]:
        """The ranks-th (1-based) ordinals, counted from the one furthest ahead. Only if not overflowed."""

    def count_ordinal(self, model: int, ordinal: int) -> tuple[int, int]:
        """(number of entries ahead of `ordinal`, number equal to it). Only if not overflowed."""

    def tie_point(
        self,
        model: int,
        rank: int,
        tau: int,
        order: int,
        seed: int,
        offsets: list[int],
        tensor_ids: list[int],
    ) -> tuple[int, int]:
        """(word, scope index) of the rank-th (1-based) entry with key `tau`.

        Order hash: by (Philox word, scope index); order index: by scope index, and the word is 0. Stage key: the
        entries with
        ordinal `tau`; stage tie: all entries. offsets: scope index of the first element of each tensor, ascending.
        """

    def nonfinite(self, source: int) -> tuple[int, int]:
        """(first scope index or -1, count) of NaN or Inf in the values of model `source`, or of the base (source =
        models).
        """

    def add(self, model: int, before: int, ordinals: Any, indices: Any) -> None:
        """For backends in Python: entries as contiguous buffers of uint64."""

    def add_histogram(self, model: int, before: int, bins: Any) -> None:
        """For backends that count on a device: NUM_BINS counts, a contiguous buffer of uint64, of entries that are not
        handed over; `inside` grows by their sum and the model counts as overflowed.
        """

    def add_nonfinite(self, source: int, first: int, count: int) -> None: ...
    def merge(self, other: SweepStats) -> None: ...
    def dump(self) -> bytes: ...
    @staticmethod
    def load(data: bytes) -> SweepStats: ...

class StreamStats:
    """Counters of one `stream` pass over one tensor (or a scope). Thread safe."""

    def __init__(self, num_models: int, num_blocks: int) -> None:
        """num_blocks: canonical blocks of the tensor for the norms, 0 for no norms."""

    num_blocks: int
    num_models: int
    def kept(self, model: int) -> int:
        """Elements kept whose delta is not zero."""

    def conflicts(self) -> int:
        """Elements where kept weighted deltas of both signs meet."""

    def votes(self) -> tuple[int, int]:
        """(elements with weighted sum s > 0, with s < 0)."""

    def nonfinite(self, source: int) -> tuple[int, int]:
        """(first flat index or -1, count): models 0..K-1, base = K, output = K + 1."""

    def sum_squares(self, model: int) -> float:
        """Sum of dt * dt over canonical blocks in float64 (T1)."""

    def add(self, kept: list[int], conflicts: int, positive: int, negative: int) -> None: ...
    def add_nonfinite(self, source: int, first: int, count: int) -> None: ...
    def set_blocks(self, model: int, first_block: int, sums: Any) -> None:
        """Block sums as a contiguous buffer of float64."""

    def merge(self, other: StreamStats) -> None: ...
    def dump(self) -> bytes: ...
    @staticmethod
    def load(data: bytes) -> StreamStats: ...

class BlockSums:
    """Accumulator of exact sums: block sums per slot and segment. Thread safe as long as no two threads set the same
    block. See ops.sums.
    """

    num_slots: int
    num_segments: int
    segment_length: int
    blocks_per_segment: int
    def __init__(self, num_slots: int, num_segments: int, segment_length: int) -> None: ...
    def set(self, slot: int, segment: int, first_block: int, sums: Any) -> None:
        """Block sums as a contiguous buffer of float64, which may run on into the segments that follow."""

    def fold(self, slot: int) -> bytes:
        """One float64 per segment: the tree over its blocks."""

    def merge(self, other: BlockSums) -> None: ...
    def dump(self) -> bytes: ...
    @staticmethod
    def load(data: bytes) -> BlockSums: ...

def sweep(
    stats: SweepStats,
    piece: Box,
    base: View | None,
    models: list[View | None],
    compute: int,
    seed: int,
    tensor: int,
    offset: int,
    threads: int,
    isa: str,
    key: int = 0,
    rows: tuple[int, Any] | None = None,
    balance: Sequence[tuple[float, float, float, float, float]] = (),
    draws: Sequence[int] = (),
) -> None:
    """Adds one piece of one tensor to `stats`. models: those of the merge, each searched as the intervals say.

    compute: dtype code of F32 or F64. offset: scope index of flat index 0. key: 0 delta, 1 variance, 2 importance, 3
    balance, 4 drawn; rows: (length, float64 per row) for importance; balance: (lo, hi, spread, cut, top) per model;
    draws: a threshold per model for drawn.
    """

def stream(
    program: dict[str, Any],
    piece: Box,
    base: View | None,
    models: list[View],
    out: View | None,
    compute: int,
    stats: StreamStats | None,
    threads: int,
    isa: str,
    marks: list[View | None] = ...,
) -> None:
    """Runs the fused pass on one piece; without `out` only the statistics are taken.

    With norms (`stats` with blocks) a piece must be flat, begin at a multiple of 4096 and, but for the tensor's last
    block, hold whole blocks; ValueError otherwise. Results are rounded once.

    program: the fields of ops.program.Program by name, numbers and codes in place of names: vote 0 none, 1 weighted,
    2 plain, 3 count; merge 0 sum, 1 max, 2 largest, 3 importance, 4 balance; divisor 0 none, 1 value,
    2 agreeing_weights, 3 agreeing_count, 4 kept_count. A point is (tau, ties, word, index), ties 0 all, 1 none, 2 hash,
    3 index; a rule None, (1, point), (2, wide or None, top), (3, threshold of Draw), (4,) for Marked, (5, low, span,
    single, divide) or (6, first, last); a table None or (axis, length, tensor, values), axis 1 rows, 2 columns,
    3 groups, values a contiguous buffer of float64 that is not copied. `thresholds` and `at_least` are those of Useful,
    `balance` a list of (lo, hi, spread, cut, top), `rows` (length, stride) or (0, 0).
    marks: per model the packed bits of the piece (uint8, contiguous), needed where its rule is (4,).
    """

def reduce(
    program: dict[str, Any],
    quantities: list[int],
    sums: BlockSums,
    piece: Box,
    base: View | None,
    models: list[View],
    compute: int,
    threads: int,
    isa: str,
    kept: list[View | None] = ...,
) -> None:
    """Sums quantities (positions in ops.sums.QUANTITIES) of a flat piece of whole canonical blocks into the slots.

    kept : where to write the packed bits of what each model keeps and is not 0; [] or None for a model: nowhere.
    """

def mark(
    program: dict[str, Any],
    kind: int,
    piece: Box,
    base: View | None,
    models: list[View],
    marks: list[View],
    compute: int,
    threads: int,
    isa: str,
) -> None:
    """Writes one packed bit per element of a flat piece that begins at a multiple of 8: kind 0 kept, 1 agreeing,
    2 useful. marks: one contiguous view of uint8 per model.
    """

def gram(
    sums: BlockSums,
    columns: bool,
    piece: Box,
    base: View | None,
    models: list[View],
    compute: int,
    threads: int,
    isa: str,
) -> None:
    """Adds the dot products of all pairs of models over one piece; see ops.sums.Gram.

    The segments of `sums` are rows (a tensor is one row), or columns. ValueError if the piece cuts a canonical block.
    """

def divergence(row_length: int, piece: Box, base: View, model: View, compute: int, threads: int, isa: str) -> bytes:
    """One float64 per row of a flat piece of whole rows; see dispatch.Backend.divergence."""

def product(b: View, a: View, piece: Box, out: View, add: bool, isa: str) -> None:
    """The elements of a piece of b a (m x r, r x n) to `out`, or added to what is there.

    Each element is +0 + b[0] a[0] + b[1] a[1] + ..., every operation rounded: the same bits in any piece. All are
    contiguous and of one dtype, float32 or float64; ValueError otherwise.
    """

# (b, at, ranks, C, U, V, out): addresses of dense float64 factors, 0 for the one that is not read
MttkrpModule = tuple[View, View, list[int], int, int, int, int]

def mttkrp(modules: list[MttkrpModule], mode: int, width: int, threads: int, isa: str) -> None:
    """See ops.mttkrp. b : (m, R), at : (n, R), contiguous, float32 or float64; out : float64, (rows of mode, width)."""

# (b, a, state, history, report, norm2): addresses of float64 numbers, see csrc/common/als.h
AlsProblem = tuple[int, int, int, int, int, float]

def als(
    problems: list[AlsProblem],
    shape: tuple[int, int, int, int, int],
    owner: int,
    ends: int,
    tol: float,
    prox: float,
    sweeps: int,
    search: bool,
    threads: int,
    isa: str,
) -> None:
    """Up to `sweeps` sweeps of alternating least squares of each problem, one thread each at a time.

    shape : tasks, sum of ranks R, rows of b (p) and of a (q), terms c. b : [p, R], a : [q, R]. owner : int32 [R], the
    task of each column; ends : int32 [T + 1]. state : [T + p + q + 2 R, c], C, U and V are read and written. history :
    [sweeps]. report : [6], read and written.
    """

def learned(
    pass_: int,
    groups: int,
    draw: tuple[int, int],
    mask: tuple[float, float, int, int] | None,
    weights: tuple[float, ...],
    shift: float,
    sums: BlockSums | None,
    piece: Box,
    base: View | None,
    models: list[View],
    gradient: View | None,
    logits: View | None,
    out: View | None,
    compute: int,
    threads: int,
    isa: str,
) -> None:
    """The passes of ops.learned: 0 seg_dot, 1 sum of the mask (both into `sums`), 2 merge, 3 gradient of the logits.

    draw: seed and tensor id of the groups. mask: (temperature, mean, seed, tensor id). Flat pieces; for sums of whole
    canonical blocks; ValueError otherwise.
    """

def philox(seed: int, tensor: int, stream: int, first: int, count: int) -> list[int]:
    """The 32-bit words of elements first .. first + count - 1."""

def compare(
    a: int, dtype_a: str, b: int, dtype_b: str, n: int, norm: bool
) -> tuple[int, int, int, int | None, int, float, float, float]:
    """Compares n elements at two addresses; dtypes by their safetensors names, equal or both floats.

    (differing pairs, first of them or -1, unequal pairs with NaN or Inf, largest distance in ULPs of the narrower
    dtype or None
    where values are not interpreted, its index or -1, largest |a - b|, sum of (a - b)^2, sum of a^2); sums over
    canonical blocks. With norm False, equal bytes return at once and the last sum is 0.
    """

def transcendental(name: str, x: float) -> float:
    """exp, log, tanh or sigmoid as every backend computes it."""

def block_tree(values: Any) -> float:
    """The binary tree over a contiguous buffer of float64 block sums."""

def isas() -> list[str]:
    """The instruction sets that this build has and this machine can run, best first: "avx512", "avx2", "base"."""

def build_info() -> dict[str, str]: ...
