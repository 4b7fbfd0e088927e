"""Alternating least squares on cores, for a batch of problems (module, start) of one shape.

    X[t] = b_t a_t^T ~ sum_k C[t, k] u_k v_k^T,     F <- (M + prox g F)(G + (prox + ridge) g I)^-1

for F = C, U, V in turn, with M the product of `mttkrp`, G the product of the Grams of the other two factors and
g = tr(G) / c. A sweep costs 4 R c (p + q) operations for each start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .tasks import Tasks

__all__ = ["Batch", "State", "extrapolate", "normalised", "sweep"]

STEPS = (1.25, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Lengths of the last step that the line search tries."""


@dataclass
class Batch:
    """Cores of N modules. b : (N, p, R). a : (N, q, R). norm2 : ||X||^2, (N). bases : leading vectors already made."""

    b: torch.Tensor
    a: torch.Tensor
    tasks: Tasks
    norm2: torch.Tensor
    bases: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of(self, index: torch.Tensor) -> Batch:
        """Some of the modules."""
        return Batch(self.b[index], self.a[index], self.tasks, self.norm2[index])


@dataclass
class State:
    """s starts of N modules. c : (N, s, T, c). u : (N, s, p, c). v : (N, s, q, c). su : b^T u, (N, s, R, c).

    sv : a^T v, likewise. ridge : (N, s, 1, 1). orthogonal : (N, s), True where the out factor is kept orthonormal.
    """

    c: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    su: torch.Tensor
    sv: torch.Tensor
    ridge: torch.Tensor
    orthogonal: torch.Tensor

    @staticmethod
    def start(batch: Batch, c: torch.Tensor, u: torch.Tensor, v: torch.Tensor, ridge: float) -> State:
        """The state before the first sweep."""
        import torch

        ridges = torch.full((*u.shape[:2], 1, 1), ridge, dtype=u.dtype, device=u.device)
        flags = torch.zeros(u.shape[:2], dtype=torch.bool, device=u.device)
        return State(c, u, v, _inner(batch.b, u), _inner(batch.a, v), ridges, flags)

    def of(self, modules: torch.Tensor, starts: torch.Tensor | None = None) -> State:
        """Some of the modules; of each only the starts (N', s') listed."""
        fields = [self.c, self.u, self.v, self.su, self.sv, self.ridge, self.orthogonal]
        fields = [x[modules] for x in fields]
        if starts is not None:
            rows = starts.new_tensor(range(len(starts)))[:, None]
            fields = [x[rows, starts] for x in fields]
        return State(*fields)

    def where(self, mask: torch.Tensor, other: State) -> State:
        """This state where the mask (N, s) holds, elsewhere the other."""
        import torch

        wide = mask[..., None, None]
        pairs = ((self.c, other.c), (self.u, other.u), (self.v, other.v), (self.su, other.su), (self.sv, other.sv))
        c, u, v, su, sv = (torch.where(wide, x, y) for x, y in pairs)
        return State(c, u, v, su, sv, self.ridge, self.orthogonal)


def _inner(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """x^T f for each start: (N, p, R), (N, s, p, c) -> (N, s, R, c), one product per module."""
    n, s, p, c = f.shape
    flat = x.mT @ f.permute(0, 2, 1, 3).reshape(n, p, s * c)
    return flat.reshape(n, -1, s, c).permute(0, 2, 1, 3)


def _outer(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """X g for each start: (N, p, R), (N, s, R, c) -> (N, s, p, c)."""
    n, s, r, c = g.shape
    flat = x @ g.permute(0, 2, 1, 3).reshape(n, r, s * c)
    return flat.reshape(n, -1, s, c).permute(0, 2, 1, 3)


def _gram(f: torch.Tensor) -> torch.Tensor:
    return f.mT @ f


def _update(m: torch.Tensor, g: torch.Tensor, old: torch.Tensor, prox: float, ridge: torch.Tensor) -> torch.Tensor:
    """One factor. A Gram that is not positive definite gets a larger proximal weight."""
    import torch

    size = g.shape[-1]
    mean = g.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(size, dtype=g.dtype, device=g.device)
    weight = torch.full_like(mean, max(prox, 0.0))
    for _ in range(40):
        lower, info = torch.linalg.cholesky_ex(g + (weight + ridge) * mean * eye)
        failed = (info != 0)[..., None, None] & torch.isfinite(mean)
        if not bool(failed.any()):
            break
        weight = torch.where(failed, torch.clamp(weight * 2.0, min=1e-14), weight)
    right = m + weight * mean * old
    return torch.cholesky_solve(right.mT, lower).mT


def sweep(batch: Batch, state: State, prox: float) -> tuple[State, torch.Tensor]:
    """One sweep in the order task, out, in; the state after it, and err^2 (N, s) of that state."""
    import torch

    c, u, v = state.c, state.u, state.v
    gu, gv = _gram(u), _gram(v)
    c = _update(batch.tasks.total(state.su * state.sv), gu * gv, c, prox, state.ridge)
    spread = batch.tasks.rows(c)
    gc = _gram(c)
    m = _outer(batch.b, state.sv * spread)
    fresh = _update(m, gc * gv, u, prox, state.ridge)
    if bool(state.orthogonal.any()):
        left, _, right = torch.linalg.svd(m[state.orthogonal], full_matrices=False)
        fresh[state.orthogonal] = left @ right
    u = fresh
    su = _inner(batch.b, u)
    gu = _gram(u)
    m = _outer(batch.a, su * spread)
    v = _update(m, gc * gu, v, prox, state.ridge)
    error = batch.norm2[:, None] + (gc * gu * _gram(v)).sum((-2, -1)) - 2.0 * (m * v).sum((-2, -1))
    after = State(c, u, v, su, _inner(batch.a, v), state.ridge, state.orthogonal)
    return normalised(after), error


def normalised(state: State) -> State:
    """The same model with columns of u and v of norm 1 and their size in c."""
    import torch

    nu = torch.linalg.vector_norm(state.u, dim=-2, keepdim=True)
    nv = torch.linalg.vector_norm(state.v, dim=-2, keepdim=True)
    one = torch.ones_like(nu)
    nu, nv = torch.where(nu > 0, nu, one), torch.where(nv > 0, nv, one)
    return State(
        state.c * (nu * nv), state.u / nu, state.v / nv, state.su / nu, state.sv / nv, state.ridge, state.orthogonal
    )


def extrapolate(batch: Batch, before: State, after: State, error: torch.Tensor) -> tuple[State, torch.Tensor]:
    """The best of some longer steps along the last one, where the error falls below `error`.

    Along the step the error is a polynomial, whose parts are small: Grams (c, c) and sums over each task (T, c).
    """
    import torch

    moves = [y - x for x, y in ((before.c, after.c), (before.u, after.u), (before.v, after.v))]
    du, dv = after.su - before.su, after.sv - before.sv
    sums = [batch.tasks.total(product) for product in (after.su * after.sv, du * after.sv + after.su * dv, du * dv)]
    values = [[(f * x).sum((-2, -1)) for x in sums] for f in (after.c, moves[0])]
    lengths = torch.tensor([step - 1.0 for step in STEPS], dtype=error.dtype, device=error.device)[:, None, None]
    wide = lengths[..., None, None]
    product: torch.Tensor | float = 1.0
    for f, d in zip((after.c, after.u, after.v), moves, strict=True):
        g0, g1, g2 = _along(f, d)
        product = product * (g0 + wide * (g1 + wide * g2))  # of every step at once, (steps, N, s, c, c)
    assert isinstance(product, torch.Tensor)
    parts = (values[0][0], values[0][1] + values[1][0], values[0][2] + values[1][1], values[1][2])
    inner = parts[0] + lengths * (parts[1] + lengths * (parts[2] + lengths * parts[3]))
    found, which = (batch.norm2[:, None] + product.sum((-2, -1)) - 2.0 * inner).min(0)
    better = (found < error) & ~after.orthogonal
    best = torch.where(better, lengths[:, 0, 0][which], torch.zeros_like(error))
    error = torch.where(better, found, error)
    if not bool(best.any()):
        return after, error
    length = best[..., None, None]
    c, u, v = (f + length * d for f, d in zip((after.c, after.u, after.v), moves, strict=True))
    return State(c, u, v, after.su + length * du, after.sv + length * dv, after.ridge, after.orthogonal), error


def _along(f: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Gram of f + t d as coefficients of 1, t, t^2."""
    cross = f.mT @ d
    return _gram(f), cross + cross.mT, _gram(d)
