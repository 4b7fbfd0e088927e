"""`select`: the exact k-th largest |delta| of each model, resolved to a point, for tensors in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .. import _cpu
from .._backends.dispatch import Backend, pick, requested, require
from .._checks import nonfinite
from ..errors import ArgumentError
from ..tensors import Piece, TensorView
from .arguments import check_choice, check_integer
from .inputs import Inputs, gather, num_threads
from .keep import Keep
from .selection import SAMPLE_BLOCK, Scope, Selection
from .sweeps import Sweep

if TYPE_CHECKING:
    from .._cpu import SweepStats

__all__ = ["new_stats", "refuse_nonfinite", "run_sweep", "select", "sweep_one"]

_STAGES = {"key": 1, "tie": 2}


def new_stats(sweep: Sweep, capacity: int) -> SweepStats:
    """An empty accumulator for a sweep. capacity : entries kept per model before a histogram takes over."""
    intervals = sweep.intervals
    return _cpu.SweepStats(
        [0 if i is None else _STAGES[i.stage] for i in intervals],
        [0 if i is None else i.lo for i in intervals],
        [0 if i is None else i.hi for i in intervals],
        [0 if i is None else i.tau for i in intervals],
        1 if sweep.order == "index" else 0,
        capacity,
        [0 if i is None else i.model for i in intervals],
    )


def run_sweep(
    selection: Selection, tensors: Sequence[Inputs], backend: Backend, threads: int, nan: str
) -> tuple[SweepStats, int]:
    """One pass of `selection` over all tensors of its scope: (statistics, elements visited).

    Raises
    ------
    DataError : with nan="error", an input holds NaN or Inf. BackendError : the backend lacks the key.
    """
    sweep = selection.sweep
    require(backend, sweep.features)
    n = selection.scope.n
    stats = new_stats(sweep, max(1 << 18, min(n // 16, 1 << 22)))
    visited = 0
    for inputs, offset in zip(tensors, selection.scope.offsets, strict=True):
        visited += sweep_one(selection, sweep, stats, inputs, backend, threads, offset)
    # A sample does not know the places of its elements; of a joint key it is not known whose value is not finite.
    if nan == "error" and visited == n and not sweep.joint:
        refuse_nonfinite(stats, selection, tensors)
    return stats, visited


def sweep_one(
    selection: Selection, sweep: Sweep, stats: SweepStats, inputs: Inputs, backend: Backend, threads: int, offset: int
) -> int:
    """One pass over one tensor of the scope, or over some of its pieces: the elements visited.

    offset : scope index of the tensor's first element.
    """
    visited = 0
    for shard, piece in enumerate(inputs.pieces):
        if piece.numel == 0:
            continue
        base, models = inputs.views(shard)
        if selection.sample < 1.0:
            piece, base, models = _sample(piece, base, models, selection.sample)
        visited += piece.numel
        searched = {i.model for i in sweep.intervals if i is not None}
        wanted = [v if m in searched or sweep.joint else None for m, v in enumerate(models)]
        backend.sweep(
            sweep,
            stats,
            piece,
            base,
            wanted,
            compute=inputs.compute,
            tensor=inputs.tensor,
            offset=offset,
            threads=threads,
        )
    return visited


def _sample(
    piece: Piece, base: TensorView | None, models: list[TensorView], fraction: float
) -> tuple[Piece, TensorView | None, list[TensorView]]:
    """Blocks at a fixed stride from every view, or everything where the memory is not one run."""
    views = [*models] if base is None else [*models, base]
    blocks = int(piece.numel * fraction) // SAMPLE_BLOCK
    if blocks < 2 or not all(_is_run(v) for v in views):
        return piece, base, models
    # An odd stride is no multiple of an even row length, so that all columns are visited.
    stride = (piece.numel // blocks - 1) | 1
    count = blocks * SAMPLE_BLOCK
    cut = [
        TensorView(v.ptr, (blocks, SAMPLE_BLOCK), (stride, 1), v.dtype, _strided(v, blocks, stride), v.cast, v.device)
        for v in views
    ]
    return Piece.flat(piece.g0, count), (cut.pop() if base is not None else None), cut


def _is_run(view: TensorView) -> bool:
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _strided(view: TensorView, blocks: int, stride: int) -> Any:
    import torch

    assert isinstance(view.owner, torch.Tensor)
    return view.owner.as_strided((blocks, SAMPLE_BLOCK), (stride, 1))


def refuse_nonfinite(stats: SweepStats, selection: Selection, tensors: Sequence[Inputs]) -> None:
    """Raise the DataError for what a complete sweep found that is not finite."""
    for number, search in enumerate((*selection.searches, None)):
        first, count = stats.nonfinite(number)
        if first >= 0:
            base = number == len(selection.searches)
            label = "the base" if base or search is None else tensors[0].labels[search.model]
            raise nonfinite(label, first, count, selection.scope, [t.name for t in tensors])


def select(
    models: Sequence[Any],
    k: int | Sequence[int],
    *,
    base: Any = None,
    policy: Literal["hash", "index", "all"] = "hash",
    seed: int = 0,
    name: str = "",
    nan: Literal["error", "propagate"] = "error",
    backend: str | None = None,
    threads: int | None = None,
    shard_dim: int = 0,
) -> list[Keep]:
    """The points that keep the k largest |delta| of each model.

    Parameters
    ----------
    models : 1 to 64 tensors of one shape, or lists of shards; bfloat16, float16, float32 or float64.
    k : how many entries to keep, 1 to n, one for all models or one each.
    base : subtracted from every model (float32, or float64 if any input is); None selects on the models themselves.
    policy : who survives among equals: "hash" (exactly k by Philox word, then index), "index" (exactly k, lowest index
        first) or "all" (every entry that equals the k-th).
    seed, name : of the Philox words.
    nan : "error" refuses NaN and Inf; "propagate" ranks NaN above Inf.

    Returns
    -------
    One `Keep` per model: the k-th key and which of its equals are kept.

    Raises
    ------
    ArgumentError, BackendError, DataError
    """
    check_choice(policy, ("hash", "index", "all"), "policy", name)
    check_choice(nan, ("error", "propagate"), "nan", name)
    seed = check_integer(seed, 0, 1 << 64, "seed", name)
    inputs = gather(models, base, name, shard_dim)
    ks = _ranks(k, inputs)
    request = requested(backend)
    _, module = pick("select", inputs.all_views, request)
    scope = Scope((0,), (inputs.tensor,), inputs.n, "F64" if inputs.compute.name == "F64" else "F32")
    selection = Selection.start(ks, scope, policy=policy, seed=seed, base=base is not None)
    while not selection.done:
        stats, visited = run_sweep(selection, [inputs], module, num_threads(threads), nan)
        selection = selection.advance(stats, visited)
    return [point for point in selection.points if point is not None]


def _ranks(k: Any, inputs: Inputs) -> tuple[int, ...]:
    """`k` for each model, checked."""
    name, n = inputs.name, inputs.n
    if n == 0:
        raise ArgumentError(
            "models have no elements to select from",
            code="select.empty",
            tensor=name,
            expected="at least one element",
            got=f"shape {tuple(inputs.tensors[0][0].shape)}",
        )
    # A tensor or array without dimensions can be asked for its items, but is one number.
    if not isinstance(k, Iterable) or isinstance(k, (str, bytes)) or getattr(k, "shape", None) == ():
        return (check_integer(k, 1, n + 1, "k", name),) * inputs.num_models
    given = list(k)
    if len(given) != inputs.num_models:
        raise ArgumentError(
            "k has the wrong number of values",
            code="k",
            tensor=name,
            expected=f"one integer, or {inputs.num_models} (one per model)",
            got=str(len(given)),
        )
    return tuple(check_integer(v, 1, n + 1, f"k[{m}]", name) for m, v in enumerate(given))
