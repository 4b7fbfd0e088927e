"""The loop of alternating least squares over a batch: stopping, pruning of starts, line search, degeneracy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ._sweeps import Batch, State, extrapolate, normalised, sweep

if TYPE_CHECKING:
    import torch

__all__ = ["PRUNE_AFTER", "Options", "Outcome", "alarm", "run"]

PRUNE_AFTER = 10
"""Sweeps after which only the two best starts go on."""

WATCH_EVERY = 5
RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)


@dataclass(frozen=True)
class Options:
    """See `cp_als`. search : whether steps may be lengthened and starts given up. threads : of native code."""

    max_iter: int
    tol: float
    ridge: float
    prox: float
    search: bool
    threads: int = 1


@dataclass
class Outcome:
    """The best start of one module: factors (T, c), (p, c), (q, c), err / ||X|| of every sweep, and what happened."""

    c: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    history: list[float]
    sweeps: int
    converged: bool
    start: int
    finals: tuple[float, ...]
    theta: float
    growth: float
    ridge: float
    orthogonal: bool
    longer_steps: int = 0
    notes: list[str] = field(default_factory=list)


def run(batch: Batch, c: torch.Tensor, u: torch.Tensor, v: torch.Tensor, options: Options) -> list[Outcome]:
    """Sweeps until every start of every module has converged, or `max_iter`; the outcome of each module."""
    import torch

    count, starts = u.shape[:2]
    size = batch.norm2.sqrt()
    safe = torch.where(size > 0, size, torch.ones_like(size))
    state = State.start(batch, c, u, v, options.ridge)
    device = u.device
    which = torch.arange(starts, device=device).expand(count, starts)  # the numbers of the starts that are left
    modules = torch.arange(count, device=device)
    histories: list[list[list[float]]] = [[[] for _ in range(starts)] for _ in range(count)]
    finals = [[float("nan")] * starts for _ in range(count)]
    outcomes: list[Outcome | None] = [None] * count
    last = torch.full((count, starts), float("inf"), dtype=torch.float64, device=device)
    done = torch.zeros((count, starts), dtype=torch.bool, device=device)
    longer = torch.zeros((count, starts), dtype=torch.int64, device=device)
    level = torch.zeros_like(longer)
    for k in range(1, options.max_iter + 1):
        before = state
        after, error = sweep(batch, state, options.prox)
        if options.search and k > 2:
            longest, found = extrapolate(batch, before, after, error)
            longer += ((found < error) & ~done).long()
            after, error = normalised(longest), found
        relative = error.clamp_min(0.0).sqrt() / safe[modules][:, None]
        relative = relative.nan_to_num(nan=float("inf"))  # a start that broke down loses to all others
        state = after.where(~done, before)
        relative = torch.where(done, last, relative)
        stopped = done
        if k >= 2:
            done = done | ((last - relative).abs() < options.tol) | relative.isinf()
        rows = zip(modules.tolist(), which.tolist(), relative.tolist(), stopped.tolist(), strict=True)
        for module, starts_left, values, still in rows:
            for start, value, stopped_before in zip(starts_left, values, still, strict=True):
                if not stopped_before:
                    histories[module][start].append(value)
                finals[module][start] = value
        last = relative
        due = ~stopped if k % WATCH_EVERY == 0 else done & ~stopped
        done = _watch(state, level, done, due, safe[modules])
        finished = done.all(1) if k < options.max_iter else torch.ones_like(done[:, 0])
        for i in finished.nonzero().flatten().tolist():
            best = int(last[i].argmin())
            outcomes[int(modules[i])] = _outcome(
                batch,
                state,
                i,
                best,
                int(which[i, best]),
                k,
                bool(done[i, best]),
                histories[int(modules[i])],
                finals[int(modules[i])],
                int(longer[i, best]),
                safe,
                modules,
            )
        left = (~finished).nonzero().flatten()
        if len(left) == 0:
            break
        chosen: torch.Tensor | None = None
        if k == PRUNE_AFTER and which.shape[1] > 2 and options.search:
            chosen = last[left].argsort(dim=1, stable=True)[:, :2].sort(dim=1).values
        if chosen is not None or len(left) < len(modules):
            batch, state = batch.of(left), state.of(left, chosen)
            fields = [x[left] for x in (which, last, done, longer, level)]
            if chosen is not None:
                each = torch.arange(len(left), device=device)[:, None]
                fields = [x[each, chosen] for x in fields]
            which, last, done, longer, level = fields
            modules = modules[left]
    return [o for o in outcomes if o is not None]


def alarm(c: torch.Tensor, u: torch.Tensor, v: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(theta, growth) of each start: the least triple cosine of two components, and their norms over ||X||.

    c, u, v : (..., rows, c) with u and v of unit columns. size : ||X||, (...).
    """
    import torch

    norms = torch.linalg.vector_norm(c, dim=-2)
    unit = c / torch.where(norms > 0, norms, torch.ones_like(norms))[..., None, :]
    cosines = (unit.mT @ unit) * (u.mT @ u) * (v.mT @ v)
    theta = cosines.flatten(-2).min(-1).values
    return theta, norms.sum(-1) / size


def _watch(
    state: State, level: torch.Tensor, done: torch.Tensor, due: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """Raises the ridge of starts in `due` whose components grow and cancel; they go on, converged or not."""
    if not bool(due.any()):
        return done
    theta, growth = alarm(state.c, state.u, state.v, size[:, None])
    bad = (theta < -0.95) & (growth > 5.0) & ~state.orthogonal & due
    if not bool(bad.any()):
        return done
    level += bad.long()
    raised = bad.clone()
    for i, j in bad.nonzero().tolist():
        step = int(level[i, j])
        if step < len(RIDGES):
            state.ridge[i, j] = max(RIDGES[step], float(state.ridge[i, j]))
        elif state.u.shape[-1] <= state.u.shape[-2]:
            state.orthogonal[i, j] = True
        else:
            raised[i, j] = False  # nothing is left to be done
    return done & ~raised


def _outcome(
    batch: Batch,
    state: State,
    i: int,
    j: int,
    start: int,
    sweeps: int,
    converged: bool,
    histories: list[list[float]],
    finals: list[float],
    longer: int,
    safe: torch.Tensor,
    modules: torch.Tensor,
) -> Outcome:
    theta, growth = alarm(state.c, state.u, state.v, safe[modules][:, None])
    return Outcome(
        c=state.c[i, j],
        u=state.u[i, j],
        v=state.v[i, j],
        history=histories[start],
        sweeps=len(histories[start]),
        converged=converged,
        start=start,
        finals=tuple(finals),
        theta=float(theta[i, j]),
        growth=float(growth[i, j]),
        ridge=float(state.ridge[i, j]),
        orthogonal=bool(state.orthogonal[i, j]),
        longer_steps=longer,
    )
