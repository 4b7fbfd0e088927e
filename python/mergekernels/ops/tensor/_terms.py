"""The outcome of a fit as rank-1 terms in canonical form, in the stack's own coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ._als import Options, Outcome
from .stack import Core

if TYPE_CHECKING:
    import torch

__all__ = ["CP", "in_terms", "signed", "signs"]


@dataclass(frozen=True)
class CP:
    """X[t] ~ sum_k C[t, k] u_k v_k^T. Unpacks as (weights, factors).

    weights : (c,), all one; the scale is in C. factors : [C (T, c), U (m, c), V (n, c)] in the stack's dtype, columns
    of U and V of norm 1, components by falling sum_t C^2, the largest entry of each u and v positive; U (V) in row
    shards where B (A) came in shards. fit : 1 - err / ||X||, 1 for a zero stack. history : err / ||X|| after every
    sweep of the best start, of the tensor that is fitted (weights and `normalize` applied).
    diagnostics : rank, ranks of the core, compressed, sweeps, converged, last_change, start, starts (final err / ||X||
    of each), spread of these, task_errors (err_t / ||D_t||, unweighted), theta and growth (degeneracy), ridge,
    orthogonal, longer_steps, warnings.
    """

    weights: torch.Tensor
    factors: list[Any]
    fit: float
    history: tuple[float, ...]
    diagnostics: Mapping[str, Any]

    def __iter__(self) -> Iterator[Any]:
        yield self.weights
        yield self.factors


def in_terms(core: Core, scale: torch.Tensor, o: Outcome, asked: int, used: int, options: Options) -> CP:
    """The outcome in canonical form and in the stack's own coordinates."""
    import torch

    c = o.c / scale[:, None]
    order = (c * c).sum(0).argsort(descending=True, stable=True)
    c, u, v = c[:, order], o.u[:, order], o.v[:, order]
    if not bool(torch.isfinite(c).all() & torch.isfinite(u).all() & torch.isfinite(v).all()):
        raise DataError("the factorisation broke down", code="cp.breakdown", hint="A larger prox, or ridge, helps.")
    errors = _task_errors(core, c, u, v)
    c = _in_range(c * core.scale, core.dtype)
    full = core.expand(u, v)
    turns = [signs(x) for x in full]
    full = [signed(x, turn) for x, turn in zip(full, turns, strict=True)]
    c = c * turns[0] * turns[1]
    last = abs(o.history[-2] - o.history[-1]) if len(o.history) > 1 else 0.0
    warnings = list(o.notes)
    if asked > used:
        warnings.append(f"rank {asked} is more than the {used} that the stack holds: {used} are used, an exact model")
    tasks, p, q = len(core.ranks), int(core.b.shape[0]), int(core.a.shape[0])
    known = (min(p, used) + min(q, used) + min(tasks, used) - 2) // 2
    if tasks > 1 and used > 1 and known < used:
        warnings.append(
            f"rank {used} is more than the {known} that {tasks} tasks in cores of {p} x {q} identify for certain "
            "(Kruskal's bound): the terms need not be unique; what they add up to and the fit count"
        )
    if not o.converged:
        warnings.append(
            f"no convergence in {options.max_iter} sweeps: err / ||X|| is {o.history[-1]:.6g} and changed by {last:.2g}"
            f" in the last, tol is {options.tol:g}"
        )
    if o.theta < -0.95 and o.growth > 5.0:
        warnings.append(
            f"degenerate: two terms nearly cancel (cosine {o.theta:.3f}) and the terms are {o.growth:.1f} times as "
            "large as the stack; a smaller rank, or ridge, helps"
        )
    finals = [x for x in o.finals if x == x]
    diagnostics = {
        "rank": used,
        "core": (int(core.b.shape[0]), int(core.a.shape[0])),
        "compressed": (core.qb is not None, core.qa is not None),
        "sweeps": o.sweeps,
        "converged": o.converged,
        "last_change": last,
        "start": o.start,
        "starts": o.finals,
        "spread": max(finals) - min(finals) if finals else 0.0,
        "task_errors": errors,
        "theta": o.theta,
        "growth": o.growth,
        "ridge": o.ridge,
        "orthogonal": o.orthogonal,
        "longer_steps": o.longer_steps,
        "warnings": tuple(warnings),
    }
    factors = [c.to(core.dtype), *full]
    return CP(torch.ones(used, dtype=core.dtype), factors, 1.0 - o.history[-1], tuple(o.history), diagnostics)


def _in_range(c: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """C, which holds the scale, if `dtype` can hold it."""
    import torch

    largest, info = float(c.abs().max()) if c.numel() else 0.0, torch.finfo(dtype)
    if largest > info.max or 0.0 < largest < info.tiny:
        raise DataError(
            f"the terms leave the range of {str(dtype).removeprefix('torch.')}",
            code="cp.range",
            expected=f"a largest coefficient between {info.tiny:.3g} and {info.max:.3g}",
            got=f"{largest:.3g}",
            hint="Scale the factors, or pass float64.",
        )
    return c


def _task_errors(core: Core, c: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> tuple[float, ...]:
    """err_t / ||D_t|| of every task, 0 for a zero task that is fitted by zero."""
    products = core.tasks.total((core.b.mT @ u) * (core.a.mT @ v))
    grams = (u.mT @ u) * (v.mT @ v)
    errors = core.norm2 + ((c @ grams) * c).sum(1) - 2.0 * (products * c).sum(1)
    found = []
    for error, norm2 in zip(errors.clamp_min(0.0).tolist(), core.norm2.tolist(), strict=True):
        found.append((error / norm2) ** 0.5 if norm2 > 0 else 0.0 if error == 0.0 else float("inf"))
    return tuple(found)


def signs(x: Any) -> torch.Tensor:
    """-1 for each column whose entry of largest magnitude is negative, else 1; float64."""
    import torch

    whole = x.dense() if hasattr(x, "parts") else x
    if not len(whole):
        return torch.ones(whole.shape[1], dtype=torch.float64, device=whole.device)
    rows = whole.abs().argmax(0)
    return torch.where(whole.gather(0, rows[None])[0] < 0, -1.0, 1.0).to(torch.float64)


def signed(x: Any, sign: torch.Tensor) -> Any:
    """Each column times its sign; shards stay shards."""
    from ..spectral.sharded import Sharded

    if isinstance(x, Sharded):
        return Sharded([p * sign.to(p) for p in x.parts], x.dim)
    return x * sign.to(x)
