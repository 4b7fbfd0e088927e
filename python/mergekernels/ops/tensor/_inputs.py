"""What a caller of `cp_als` gives besides the stack: weights of the slices, and factors to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ..arguments import check_integer
from ..spectral.sharded import Sharded
from ._terms import CP
from .stack import Core

if TYPE_CHECKING:
    import torch

__all__ = ["check_options", "given_factors", "scales_of"]


def check_options(
    rank: int,
    init: Any,
    n_starts: int,
    max_iter: int,
    tol: float,
    ridge: float,
    prox: float,
    normalize: str | None,
    seed: int,
) -> None:
    """Refuse what `cp_als` cannot use, before anything is computed; what depends on the stack is checked later."""
    check_integer(rank, 1, 1 << 31, "rank")
    check_integer(n_starts, 1, 1 << 16, "n_starts")
    check_integer(max_iter, 1, 1 << 31, "max_iter")
    for name, value in (("tol", tol), ("ridge", ridge), ("prox", prox)):
        if not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
            raise ArgumentError(f"{name} is not usable", code=f"cp.{name}", expected="0 or more", got=repr(value))
    if normalize not in (None, "fro"):
        raise ArgumentError("normalize is not usable", code="cp.normalize", expected="None, fro", got=repr(normalize))
    check_integer(seed, 0, 1 << 63, "seed")
    if not isinstance(init, (str, list, tuple, CP)):
        raise ArgumentError("init is not usable", code="cp.init", expected="a name or factors", got=type(init).__name__)
    if isinstance(init, str) and init not in ("auto", "hosvd", "gevd", "random"):
        raise ArgumentError(
            "init is not usable",
            code="cp.init",
            expected="auto, hosvd, gevd, random or (weights, factors)",
            got=str(init),
        )


def scales_of(
    core: Core, weights: Sequence[float] | None, normalize: str | None, what: str, order: Sequence[int] | None
) -> torch.Tensor:
    """What each slice is multiplied with before the fit, (T), float64, in the order of the core."""
    import torch

    count = len(core.ranks)
    try:
        numbers = [1.0] * count if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(0.0 < w < float("inf") for w in numbers):
        raise ArgumentError(
            "weights are not usable",
            code="cp.weights",
            tensor=what,
            expected=f"{count} positive numbers",
            got=repr(weights),
        )
    scale = torch.tensor([numbers[t] for t in order] if order else numbers, dtype=torch.float64).sqrt()
    scale = scale.to(core.norm2.device)
    if normalize == "fro":
        norms = core.norm2.sqrt()
        scale = scale / torch.where(norms > 0, norms, torch.ones_like(norms))
    return scale


def given_factors(
    init: Any, rank: int, core: Core, scale: torch.Tensor, what: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Explicit factors in the coordinates of the core."""
    import torch

    if not isinstance(init, (list, tuple, CP)) or len(parts := list(init)) != 2:
        raise ArgumentError(
            "init is not usable", code="cp.init", tensor=what, expected="(weights, [C, U, V])", got=type(init).__name__
        )
    weight, factors = parts
    wide = [
        (x.dense() if isinstance(x, Sharded) else torch.as_tensor(x)).to(core.b.device, torch.float64) for x in factors
    ]
    sizes = (
        len(core.ranks),
        *((basis.shape[0] if basis is not None else x.shape[0]) for basis, x in ((core.qb, core.b), (core.qa, core.a))),
    )
    if len(wide) != 3 or any(x.ndim != 2 or x.shape != (n, rank) for x, n in zip(wide, sizes, strict=True)):
        raise ArgumentError(
            "explicit factors do not fit the stack",
            code="cp.init",
            tensor=what,
            expected=f"[C, U, V] with {sizes[0]}, {sizes[1]}, {sizes[2]} rows and {rank} columns",
            got=", ".join(str(tuple(x.shape)) for x in wide),
        )
    c, u, v = wide
    if weight is not None:
        weight = torch.as_tensor(weight).to(c)
        if weight.shape != (rank,):
            raise ArgumentError(
                "explicit weights do not fit",
                code="cp.init",
                tensor=what,
                expected=f"({rank},)",
                got=str(tuple(weight.shape)),
            )
        c = c * weight
    if not all(bool(torch.isfinite(x).all()) for x in (c, u, v)):
        raise DataError("explicit factors hold NaN or Inf", code="data.nonfinite", tensor=what)

    def inside(basis: Any, x: torch.Tensor) -> torch.Tensor:
        if basis is None:
            return x
        whole = basis.dense() if isinstance(basis, Sharded) else basis
        return whole.to(torch.float64).mT @ x

    return c / core.scale * scale[:, None], inside(core.qb, u), inside(core.qa, v)
