"""A stack of low-rank updates of one module, and its core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.model import Factors
from ...errors import ArgumentError
from ..spectral.qr import tall_qr
from ..spectral.sharded import Matrix, Sharded, check_matrix, cut_like
from .tasks import Tasks

if TYPE_CHECKING:
    import torch

__all__ = ["Core", "Stack", "core_of", "cores_of", "is_module", "stack_of", "stacks_of"]


@dataclass(frozen=True)
class Stack:
    """The T updates of a module, side by side. b : (m, R), columns task after task. at : (n, R), the A_t^T likewise.

    ranks : of each task; their sum is R. dtype : of the results, float32 or float64.
    """

    b: Matrix
    at: Matrix
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of every update."""
        return self.b.shape[0], self.at.shape[0]


@dataclass(frozen=True)
class Core:
    """A stack in orthonormal bases: D_t = scale qb @ b_t @ a_t^T @ qa^T, with b_t and a_t the columns of task t.

    b : (p, R). a : (q, R), float64 on one device; the a_t and the largest b_t have entries near 1. scale : a power of
    two, so that no square leaves the range of float64. qb, qa : bases (m, p) and (n, q), None where p = m or q = n and
    the core is the stack itself. cuts : the stack's shards, None where a side is whole. norm2 : of each b_t a_t^T,
    squared, float64 (T).
    """

    b: torch.Tensor
    a: torch.Tensor
    scale: float
    qb: Matrix | None
    qa: Matrix | None
    cuts: tuple[Sharded | None, Sharded | None]
    tasks: Tasks
    norm2: torch.Tensor
    dtype: torch.dtype

    def expand(self, u: torch.Tensor, v: torch.Tensor) -> list[Matrix]:
        """Columns u (p, c) and v (q, c) in the coordinates of the stack and its dtype, cut as it is."""
        return [
            _expanded(basis, cut, small, self.dtype)
            for basis, cut, small in ((self.qb, self.cuts[0], u), (self.qa, self.cuts[1], v))
        ]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each task."""
        return self.tasks.ranks


def is_module(x: Any) -> bool:
    """Whether `x` is the stack of one module, not a list of them."""
    import torch

    if isinstance(x, torch.Tensor) and x.ndim == 3 and len(x):
        return True
    if not isinstance(x, (list, tuple)) or not x:
        raise ArgumentError(
            "this is not a stack",
            code="stack.type",
            got=type(x).__name__,
            expected="a list of (B, A) pairs or of matrices, a tensor (T, m, n), or a list of these",
        )
    first = x[0]
    if isinstance(first, (Factors, Sharded)) or (isinstance(first, torch.Tensor) and first.ndim != 3):
        return True
    if not isinstance(first, (list, tuple)) or len(first) != 2 or isinstance(first[0], (list, tuple, Factors)):
        return False
    shapes = [tuple(y.shape) if hasattr(y, "shape") else None for y in first]
    if isinstance(first, list) and len(shapes[0] or ()) == 2 and shapes[0] == shapes[1]:
        raise ArgumentError(
            "a list of two matrices of equal shape can be a pair of factors or two updates",
            code="stack.ambiguous",
            expected="tuples (B, A), or updates as one tensor (T, m, n)",
            got=str(shapes[0]),
        )
    return all(len(shape or ()) == 2 for shape in shapes)


def stacks_of(x: Any) -> list[Stack]:
    """The stacks of one or several modules.

    Raises
    ------
    ArgumentError : what is not a stack, or does not fit together. DataError : NaN or Inf.
    """
    if is_module(x):
        return [stack_of(x, "stack")]
    return [stack_of(module, f"stack[{i}]") for i, module in enumerate(x)]


def stack_of(pairs: Sequence[Any], what: str) -> Stack:
    """The stack of (B, A) pairs, Factors or dense (m, n); B (m, r) may be row shards, A (r, n) column shards."""
    import torch

    if not isinstance(pairs, (list, tuple, torch.Tensor)) or not len(pairs):
        raise ArgumentError(f"{what} holds no update", code="stack.empty", tensor=what, expected="at least one")
    bs: list[Matrix] = []
    ats: list[Matrix] = []
    for t, pair in enumerate(pairs):
        b, a = _pair(pair, f"{what}[{t}]")
        b, a = check_matrix(b, f"B of {what}[{t}]"), check_matrix(a, f"A of {what}[{t}]")
        if b.shape[1] != a.shape[0]:
            raise ArgumentError(
                "B and A do not fit together",
                code="stack.rank",
                tensor=f"{what}[{t}]",
                expected=f"A with {b.shape[1]} rows, as many as B has columns",
                got=str(a.shape[0]),
            )
        if (isinstance(b, Sharded) and b.dim != 0) or (isinstance(a, Sharded) and a.dim != 1):
            raise ArgumentError(
                "these shards cut the ranks",
                code="stack.shards",
                tensor=f"{what}[{t}]",
                expected="B in row shards (dim 0), A in column shards (dim 1)",
                got="the other cut",
            )
        bs.append(b)
        ats.append(a.mT)
    for name, found in (("B", bs), ("A", ats)):
        sizes = {x.shape[0] for x in found}
        if len(sizes) > 1:
            raise ArgumentError(
                f"the {name} of a stack differ in size",
                code="stack.shape",
                tensor=what,
                expected="equal sizes",
                got=", ".join(map(str, sorted(sizes))),
            )
    wide = any(x.dtype == torch.float64 for x in [*bs, *ats])
    dtype = torch.float64 if wide else torch.float32
    return Stack(_beside(bs, dtype, what), _beside(ats, dtype, what), tuple(int(b.shape[1]) for b in bs), dtype)


def _pair(update: Any, what: str) -> tuple[Any, Any]:
    """(B, A) of one update; a dense one is itself times an identity on its smaller (or whole) side."""
    import torch

    if isinstance(update, Factors):
        return update.b, update.a
    if isinstance(update, (torch.Tensor, Sharded)) and len(update.shape) == 2:
        m, n = update.shape
        rows = update.dim == 0 if isinstance(update, Sharded) else n <= m
        eye = torch.eye(n if rows else m, dtype=update.dtype, device=update.device)
        return (update, eye) if rows else (eye, update)
    if isinstance(update, (list, tuple)) and len(update) == 2:
        return update[0], update[1]
    raise ArgumentError(
        "this is not an update",
        code="stack.update",
        tensor=what,
        expected="(B, A), Factors, or a matrix (m, n)",
        got=f"{type(update).__name__} {tuple(update.shape)}" if hasattr(update, "shape") else type(update).__name__,
    )


def _beside(columns: list[Matrix], dtype: torch.dtype, what: str) -> Matrix:
    """Matrices of equal height side by side, in the cut of the first that is cut."""
    import torch

    cut = next((x for x in columns if isinstance(x, Sharded)), None)
    if cut is None:
        return torch.cat([x.to(dtype) for x in columns], 1)  # type: ignore[union-attr]
    parts: list[list[torch.Tensor]] = []
    for x in columns:
        if isinstance(x, Sharded):
            if x.sizes != cut.sizes:
                raise ArgumentError(
                    "the shards of a stack are cut differently",
                    code="stack.cuts",
                    tensor=what,
                    expected=str(cut.sizes),
                    got=str(x.sizes),
                )
            parts.append(list(x.parts))
        else:
            parts.append(list(x.split(cut.sizes, 0)))  # type: ignore[no-untyped-call]
    rows = zip(*parts, strict=True)
    return Sharded([torch.cat([p.to(row[0].device, dtype) for p in row], 1) for row in rows], 0)


def cores_of(stacks: Sequence[Stack]) -> list[Core]:
    """The cores of all stacks."""
    wide = [s for s in stacks if sum(s.ranks) < s.b.shape[0]], [s for s in stacks if sum(s.ranks) < s.at.shape[0]]
    left = dict(zip(map(id, wide[0]), tall_qr([s.b for s in wide[0]]), strict=True)) if wide[0] else {}
    right = dict(zip(map(id, wide[1]), tall_qr([s.at for s in wide[1]]), strict=True)) if wide[1] else {}
    return [_core(s, left.get(id(s)), right.get(id(s))) for s in stacks]


def core_of(stack: Stack) -> Core:
    """The core of one stack. Sums in float64; a basis is taken only where it is smaller than the stack's side."""
    return cores_of([stack])[0]


def _core(stack: Stack, left: Any, right: Any) -> Core:

    b = _whole(stack.b) if left is None else left.r
    a = (_whole(stack.at) if right is None else right.r).to(b.device)
    tasks = Tasks(stack.ranks)
    b_powers, a_powers = (_powers(x, tasks) for x in (b, a))
    powers = b_powers + a_powers
    there = tasks.total(((b != 0).any(0) & (a != 0).any(0)).double()[:, None])[:, 0] > 0
    top = int(powers[there].max()) if bool(there.any()) else 0
    b = b * tasks.spread(_two(-b_powers)) * tasks.spread(_two((powers - top).clamp(-1074, 0)))
    a = a * tasks.spread(_two(-a_powers))
    norm2 = (b * tasks.within(b, a)).sum(0)  # of each column: sum_j <b_i, b_j> <a_i, a_j> over the task
    cuts = stack.b if isinstance(stack.b, Sharded) else None, stack.at if isinstance(stack.at, Sharded) else None
    return Core(
        b,
        a,
        2.0**top,
        None if left is None else left.q,
        None if right is None else right.q,
        cuts,
        tasks,
        tasks.total(norm2[:, None])[:, 0].clamp_min(0.0),
        stack.dtype,
    )


def _powers(x: torch.Tensor, tasks: Tasks) -> torch.Tensor:
    """Exponents of two above the largest entry of each task, (T); 0 for a task of zeros."""
    import torch

    largest = tasks.largest(x.abs().amax(0) if len(x) else x.new_zeros(x.shape[1]))
    return torch.frexp(largest).exponent


def _two(powers: torch.Tensor) -> torch.Tensor:
    """Powers of two, exact: torch.pow need not be."""
    import torch

    return torch.tensor([2.0**e for e in powers.tolist()], dtype=torch.float64, device=powers.device)


def _whole(x: Matrix) -> torch.Tensor:
    import torch

    return (x.dense() if isinstance(x, Sharded) else x).to(torch.float64)


def _expanded(basis: Matrix | None, cut: Sharded | None, small: torch.Tensor, dtype: torch.dtype) -> Matrix:
    """Basis @ small in `dtype` (small itself without a basis)."""
    from ..spectral.gram import times

    whole = small.to(dtype) if basis is None else times(basis, small, dtype)
    return whole if cut is None else cut_like(whole, cut)
