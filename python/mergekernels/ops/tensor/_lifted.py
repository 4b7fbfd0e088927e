"""Factorisations of a stack that is read in tiles: those of its core, in the coordinates of the updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from ._terms import CP, signed, signs
from .tiled import Projected, TileStack, projected

if TYPE_CHECKING:
    import torch

    from .tucker import Tucker

__all__ = ["cp_of_tiles", "tucker_of_tiles"]


def _numbers(weights: Any, count: int, zero: bool) -> list[float] | None:
    """Weights of the slices, checked."""
    if weights is None:
        return None
    try:
        numbers = [float(w) for w in weights]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(0.0 <= w < float("inf") and (zero or w > 0.0) for w in numbers):
        raise ArgumentError(
            "weights are not usable",
            code="tiles.weights",
            expected=f"{count} {'non-negative' if zero else 'positive'} numbers",
            got=repr(weights),
        )
    return numbers


def cp_of_tiles(stack: TileStack, rank: int, key: int, fit: Callable[..., list[CP]], options: dict[str, Any]) -> CP:
    """`cp_als` of a stack of tiles. fit : `fits`. options : checked, for `fit`. key : of random starts."""
    count = stack.shape[0]
    if not isinstance(options["init"], str):
        raise ArgumentError(
            "explicit factors are not taken for a stack of tiles",
            code="cp.init",
            expected="auto, hosvd, gevd or random",
            got=type(options["init"]).__name__,
        )
    weights = _numbers(options["weights"], count, False)
    size = max(2 * rank, rank + 8)
    relative = options["normalize"] == "fro"
    found: Projected = projected(stack, (size, size), weights, relative, options["seed"])
    shares = _shares(found, weights, relative)
    inner = {**options, "weights": shares.tolist(), "normalize": None}
    small = fit([found.core], rank, keys=[key], **inner)[0]
    c, u, v = small.factors
    full = [(found.u @ u).to(found.dtype), (found.v @ v).to(found.dtype)]
    turns = [signs(x) for x in full]
    full = [signed(x, turn) for x, turn in zip(full, turns, strict=True)]
    total, inside = float((shares * found.norm2).sum()), float((shares * found.inside).sum())
    outside = max(0.0, total - inside)

    def whole(error: float) -> float:
        return ((outside + error * error * inside) / total) ** 0.5 if total > 0.0 else 0.0

    history = tuple(whole(e) for e in small.history)
    details = dict(small.diagnostics)
    finals = tuple(whole(e) for e in details["starts"])
    known = [e for e in finals if e == e]
    details |= {
        "task_errors": _task_errors(found, details["task_errors"]),
        "compressed": (found.u.shape[1] < stack.shape[1], found.v.shape[1] < stack.shape[2]),
        "core": (found.u.shape[1], found.v.shape[1]),
        "outside": (outside / total) ** 0.5 if total > 0.0 else 0.0,
        "starts": finals,
        "spread": max(known) - min(known) if known else 0.0,
    }
    factors = [(c * turns[0] * turns[1]).to(found.dtype), *full]
    return CP(small.weights.to(found.dtype), factors, 1.0 - history[-1], history, details)


def tucker_of_tiles(
    stack: TileStack, sizes: tuple[int | float, int | float], weights: Any, fit: Callable[..., list[Tucker]]
) -> Tucker:
    """`tucker` of a stack of tiles. fit : the op on cores of given weights."""
    wanted = tuple(size for size in sizes if isinstance(size, int))
    if len(wanted) < 2:
        raise ArgumentError(
            "a share of the energy is not taken for a stack of tiles",
            code="tucker.p",
            expected="integers: the bases are found for them",
            got=repr(sizes),
        )
    numbers = _numbers(weights, stack.shape[0], True)
    found: Projected = projected(stack, (wanted[0] + 8, wanted[1] + 8), numbers, False, 0)
    small = fit(found.core, numbers)[0]
    shares = _shares(found, numbers, False)
    total, inside = float((shares * found.norm2).sum()), float((shares * found.inside).sum())
    outside = max(0.0, total - inside)

    def whole(error: float) -> float:
        return ((outside + error * error * inside) / total) ** 0.5 if total > 0.0 else 0.0

    full = [(found.u @ small.u).to(found.dtype), (found.v @ small.v).to(found.dtype)]
    turns = [signs(x) for x in full]
    full = [signed(x, turn) for x, turn in zip(full, turns, strict=True)]
    return replace(
        small,
        u=full[0],
        v=full[1],
        cores=small.cores * turns[0][:, None] * turns[1],
        error=whole(small.error),
        task_errors=_task_errors(found, small.task_errors),
        history=tuple(whole(e) for e in small.history),
        bounds=(0.0, whole(small.bounds[1])),
    )


def _shares(found: Projected, weights: Sequence[float] | None, relative: bool) -> torch.Tensor:
    """What the squared error of each slice counts."""
    import torch

    shares = torch.tensor(weights or [1.0] * len(found.norm2), dtype=torch.float64)
    if not relative:
        return shares
    return shares / torch.where(found.norm2 > 0, found.norm2, torch.ones_like(found.norm2))


def _task_errors(found: Projected, inner: Sequence[float]) -> tuple[float, ...]:
    """err_t / ||D_t|| from the errors inside the bases."""
    errors = []
    for e, inside, norm2 in zip(inner, found.inside.tolist(), found.norm2.tolist(), strict=True):
        lost = max(0.0, norm2 - inside) + (e * e * inside if inside > 0.0 else 0.0)
        errors.append((lost / norm2) ** 0.5 if norm2 > 0.0 else 0.0)
    return tuple(errors)
