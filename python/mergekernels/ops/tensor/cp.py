"""`cp_als`: canonical polyadic factorisation of stacks of low-rank updates that are never formed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ..spectral.batching import in_single_threads
from ._als import Options, Outcome
from ._fused import run
from ._inputs import check_options, given_factors, scales_of
from ._lifted import cp_of_tiles
from ._order import in_given_order, in_own_order
from ._starts import gevd, hosvd, random_start
from ._sweeps import Batch
from ._terms import CP, in_terms
from .stack import Core, cores_of, is_module, stacks_of
from .tiled import TileStack, tile_stacks

if TYPE_CHECKING:
    import torch

__all__ = ["CP", "cp_als", "fits"]

_log = logging.getLogger("mergekernels")
_CHUNK = 256 << 20
"""Bytes of cores and states in one batch; on a GPU an eighth of the free memory, as what is computed needs more."""

_LARGE = 1 << 21
"""Numbers in a core whose products are worth several threads each."""


def cp_als(
    stack: Any,
    rank: int,
    *,
    weights: Sequence[float] | None = None,
    init: Any = "auto",
    n_starts: int = 4,
    max_iter: int = 100,
    tol: float = 1e-7,
    ridge: float = 0.0,
    prox: float = 1e-6,
    normalize: str | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Any:
    """Fit the T updates B_t A_t of a module by `rank` shared rank-1 terms with a weight per task.

    min over C, U, V of sum_t w_t ||B_t A_t - sum_k C[t, k] u_k v_k^T||_F^2 by alternating least squares in float64, on
    cores of the stacked factors; all modules of equal core shape and all their starts in one batch. The result does not
    depend on the order of the tasks (with explicit `init` it may, in the last bits).

    stack : a list of (B, A) pairs (or Factors), B (m, r_t) and A (r_t, n), the scale inside B, ranks free; or a list of
        such lists, one per module. B may be row shards, A column shards (`ops.Sharded`). An update may be a matrix
        (m, n) instead, a whole stack a tensor (T, m, n): they count as factors of rank min(m, n). A `TileStack`, or a
        list of these, is read tile by tile and fitted between two bases that hold most of it; what they do not hold is
        part of the reported error, its share `diagnostics["outside"]`.
    rank : terms c, 1 or more; above the sum of the ranks it is reduced, and a warning says so.
    weights : positive number per task; None for 1. normalize : "fro" divides each slice by its norm for the fit.
    init : "auto" (hosvd, gevd, random; after 10 sweeps the two best go on), "hosvd", "gevd", "random", or explicit
        (weights, [C, U, V]), for several modules a list of these: then there is one start and no line search.
    n_starts : 1 or more. max_iter : sweeps, 1 or more. tol : stop where err / ||X|| changes by less, from sweep 2.
    ridge : relative ridge, shifts the solution. prox : relative proximal weight, does not; native sweeps take 1e-9 for
        less, except from explicit factors. seed : of random starts.
    strict : what would be a warning (no convergence, degenerate terms, rank above what is there or what the sizes
        identify) is an error.

    Returns CP, or a list of them. Errors: ArgumentError; DataError for NaN or Inf, or with `strict`.
    Source: Carroll and Chang 1970, Harshman 1970; compression after Carroll, Pruzansky, Kruskal 1980 (CANDELINC).
    """
    single = isinstance(stack, TileStack) or (tile_stacks(stack) is None and is_module(stack))
    options: dict[str, Any] = {"weights": weights, "init": init, "n_starts": n_starts, "max_iter": max_iter, "tol": tol}
    options |= {"ridge": ridge, "prox": prox, "normalize": normalize, "seed": seed}
    tiles = tile_stacks(stack)
    if tiles is None:
        found = fits(stack, rank, **options)
    else:
        check_options(rank, **{name: value for name, value in options.items() if name != "weights"})
        found = [cp_of_tiles(s, rank, i, fits, options) for i, s in enumerate(tiles)]
    for i, result in enumerate(found):
        for warning in result.diagnostics["warnings"]:
            text = warning if single else f"stack[{i}]: {warning}"
            if strict:
                raise DataError(text, code="cp.strict", hint="strict=False returns the result with a warning.")
            _log.warning("cp_als: %s", text)
    return found[0] if single else found


def fits(
    stack: Any,
    rank: int,
    *,
    weights: Sequence[float] | None = None,
    init: Any = "auto",
    n_starts: int = 4,
    max_iter: int = 100,
    tol: float = 1e-7,
    ridge: float = 0.0,
    prox: float = 1e-6,
    normalize: str | None = None,
    seed: int = 0,
    keys: Sequence[int] | None = None,
) -> list[CP]:
    """`cp_als` of one or several modules that says its warnings in the diagnostics only.

    keys : a 32-bit number per module, on which its random starts depend; None for its position.
    """
    import torch

    check_options(rank, init, n_starts, max_iter, tol, ridge, prox, normalize, seed)
    single = is_module(stack)
    explicit = None if isinstance(init, str) else ([init] if single else list(init))
    stacks = stacks_of(stack)
    if explicit is not None and len(explicit) != len(stacks):
        raise ArgumentError("init does not fit", code="cp.init", expected=f"{len(stacks)}", got=str(len(explicit)))
    orders: Sequence[list[int]] = ()
    if explicit is None:  # in an order of their own, so that no start depends on the order in which tasks are given
        turned = [in_own_order(s) for s in stacks]
        orders, stacks = [order for order, _ in turned], [s for _, s in turned]
    cores = cores_of(stacks)
    scales = []
    for i, core in enumerate(cores):
        scales.append(scales_of(core, weights, normalize, f"stack[{i}]", orders[i] if orders else None))
    chunks = list(_chunks(cores, rank, n_starts))
    large = any(core.b.device.type != "cpu" or core.b.numel() + core.a.numel() > _LARGE for core in cores)
    threads = torch.get_num_threads()
    threads = threads if large else max(1, threads // max(1, len(chunks)))  # of each batch
    options = Options(max_iter, float(tol), float(ridge), float(prox), explicit is None, threads)
    results: list[CP | None] = [None] * len(cores)

    def fit(chunk: list[int]) -> list[tuple[Outcome, int]]:
        parts = [cores[i] for i in chunk], [scales[i] for i in chunk]
        numbers = chunk if keys is None else [keys[i] for i in chunk]
        given = None if explicit is None else [explicit[i] for i in chunk]
        return _fit(*parts, numbers, rank, n_starts, init, given, options, seed)

    outcomes = [fit(chunk) for chunk in chunks] if large else in_single_threads(chunks, fit)
    for chunk, found in zip(chunks, outcomes, strict=True):
        for i, (outcome, used) in zip(chunk, found, strict=True):
            result = in_terms(cores[i], scales[i], outcome, rank, used, options)
            results[i] = in_given_order(result, orders[i]) if orders else result
    return [r for r in results if r is not None]


def _chunks(cores: list[Core], rank: int, starts: int) -> Iterator[list[int]]:
    """Positions of cores of one shape, as many as a batch may hold."""
    import torch

    groups: dict[Any, list[int]] = {}
    for i, core in enumerate(cores):
        groups.setdefault((core.b.shape, core.a.shape, core.ranks, str(core.b.device)), []).append(i)
    for (b, a, ranks, device), members in groups.items():
        size = 8 * (b[0] + a[0]) * (b[1] + 6 * rank * starts) + 8 * 6 * sum(ranks) * rank * starts
        threads = torch.get_num_threads() if device == "cpu" else 1
        room = torch.cuda.mem_get_info(device)[0] // 8 if device.startswith("cuda") else _CHUNK
        step = max(1, min(room // max(1, size), -(-len(members) // threads)))
        for k in range(0, len(members), step):
            yield members[k : k + step]


def _fit(
    cores: list[Core],
    scales: list[torch.Tensor],
    modules: list[int],
    rank: int,
    n_starts: int,
    init: Any,
    explicit: list[Any] | None,
    options: Options,
    seed: int,
) -> list[tuple[Outcome, int]]:
    """The outcome of each core and the rank that was used."""
    import torch

    tasks = cores[0].tasks
    b = _stacked(
        [core.b * tasks.spread(s) if bool((s != 1.0).any()) else core.b for core, s in zip(cores, scales, strict=True)]
    )
    a = _stacked([core.a for core in cores])
    norm2 = torch.stack([(core.norm2 * s * s).sum() for core, s in zip(cores, scales, strict=True)])
    batch = Batch(b, a, tasks, norm2)
    used = max(1, min(rank, tasks.columns))
    if tasks.columns == 0 or not bool((norm2 > 0).any()):
        return [(_zero(batch, used), used) for _ in cores]
    if explicit is not None:
        given = [
            given_factors(start, rank, core, s, f"init of stack[{i}]")
            for i, start, core, s in zip(modules, explicit, cores, scales, strict=True)
        ]
        c, u, v = (torch.stack([g[k] for g in given])[:, None] for k in range(3))
        used = int(u.shape[-1])
    else:
        makers = {"hosvd": [hosvd], "gevd": [gevd], "random": [], "auto": [hosvd, gevd]}[init]
        makers = (makers + [random_start] * n_starts)[:n_starts]
        pairs = [make(batch, used, seed, modules, k) for k, make in enumerate(makers)]
        u, v = (torch.stack([pair[k] for pair in pairs], 1) for k in range(2))
        c = torch.zeros((len(cores), len(makers), len(cores[0].ranks), used), dtype=b.dtype, device=b.device)
    return [(outcome, used) for outcome in run(batch, c, u, v, options)]


def _stacked(cores: list[torch.Tensor]) -> torch.Tensor:
    """The cores as one tensor; a single one is not copied."""
    import torch

    return cores[0][None] if len(cores) == 1 else torch.stack(cores)


def _zero(batch: Batch, rank: int) -> Outcome:
    zeros = batch.b.new_zeros
    return Outcome(
        zeros((len(batch.tasks), rank)),
        zeros((batch.b.shape[1], rank)),
        zeros((batch.a.shape[1], rank)),
        [0.0],
        0,
        True,
        0,
        (0.0,),
        0.0,
        0.0,
        0.0,
        False,
    )
