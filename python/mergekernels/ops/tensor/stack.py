"""A stack of low-rank updates of one module, and its core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.model import Factors
from ...errors import ArgumentError
from ..spectral.qr import tall_qr
from ..spectral.sharded import Matrix, Sharded, check_matrix

if TYPE_CHECKING:
    import torch

__all__ = ["Core", "Stack", "core_of", "cores_of", "expand", "is_module", "stack_of", "stacks_of"]


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
    """A stack in orthonormal bases: D_t = qb @ b_t @ a_t^T @ qa^T, with b_t and a_t the columns of task t.

    b : (p, R). a : (q, R), float64 on one device. qb, qa : bases (m, p) and (n, q), None where p = m or q = n and the
    core is the stack itself. norm2 : of each task, ||D_t||_F^2, float64 (T).
    """

    b: torch.Tensor
    a: torch.Tensor
    qb: Matrix | None
    qa: Matrix | None
    ranks: tuple[int, ...]
    norm2: torch.Tensor
    dtype: torch.dtype

    @property
    def tasks(self) -> torch.Tensor:
        """(T, R), float64: 1 where a stacked column belongs to the task."""
        import torch

        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        return (torch.arange(len(self.ranks))[:, None] == owner).to(self.b)


def is_module(x: Any) -> bool:
    """Whether `x` is the stack of one module, not a list of them."""
    if not isinstance(x, (list, tuple)) or not x:
        raise ArgumentError(
            "a stack is a list of (B, A) pairs, or a list of such lists", code="stack.type", got=type(x).__name__
        )
    first = x[0]
    return isinstance(first, Factors) or (
        isinstance(first, (list, tuple)) and len(first) == 2 and not isinstance(first[0], (list, tuple, Factors))
    )


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
    """The stack of (B, A) pairs or Factors; B (m, r) may be row shards, A (r, n) column shards."""
    import torch

    if not pairs:
        raise ArgumentError(f"{what} holds no update", code="stack.empty", tensor=what, expected="at least one")
    bs: list[Matrix] = []
    ats: list[Matrix] = []
    for t, pair in enumerate(pairs):
        b, a = (pair.b, pair.a) if isinstance(pair, Factors) else pair
        b, a = check_matrix(b, f"B of {what}[{t}]"), check_matrix(a, f"A of {what}[{t}]")
        if b.shape[1] != a.shape[0]:
            raise ArgumentError(
                "B and A do not fit together", code="stack.rank", tensor=f"{what}[{t}]",
                expected=f"A with {b.shape[1]} rows, as many as B has columns", got=str(a.shape[0]),
            )  # fmt: skip
        if (isinstance(b, Sharded) and b.dim != 0) or (isinstance(a, Sharded) and a.dim != 1):
            raise ArgumentError(
                "these shards cut the ranks", code="stack.shards", tensor=f"{what}[{t}]",
                expected="B in row shards (dim 0), A in column shards (dim 1)", got="the other cut",
            )  # fmt: skip
        bs.append(b)
        ats.append(a.mT)
    for name, found in (("B", bs), ("A", ats)):
        sizes = {x.shape[0] for x in found}
        if len(sizes) > 1:
            raise ArgumentError(
                f"the {name} of a stack differ in size", code="stack.shape", tensor=what, expected="equal sizes",
                got=", ".join(map(str, sorted(sizes))),
            )  # fmt: skip
    wide = any(x.dtype == torch.float64 for x in [*bs, *ats])
    dtype = torch.float64 if wide else torch.float32
    return Stack(_beside(bs, dtype, what), _beside(ats, dtype, what), tuple(int(b.shape[1]) for b in bs), dtype)


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
                    "the shards of a stack are cut differently", code="stack.cuts", tensor=what,
                    expected=str(cut.sizes), got=str(x.sizes),
                )  # fmt: skip
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
    a = _whole(stack.at) if right is None else right.r
    a = a.to(b.device)
    grams = [
        ((x.mT @ x) * (y.mT @ y)).sum()
        for x, y in zip(b.split(stack.ranks, 1), a.split(stack.ranks, 1), strict=True)
    ]  # fmt: skip
    import torch

    return Core(
        b, a, None if left is None else left.q, None if right is None else right.q, stack.ranks,
        torch.stack(grams).clamp_min(0.0), stack.dtype,
    )  # fmt: skip


def _whole(x: Matrix) -> torch.Tensor:
    import torch

    return (x.dense() if isinstance(x, Sharded) else x).to(torch.float64)


def expand(basis: Matrix | None, small: torch.Tensor, dtype: torch.dtype) -> Any:
    """Basis @ small in `dtype` (small itself without a basis); row shards where the basis has them."""
    from ..spectral.gram import times

    return small.to(dtype) if basis is None else times(basis, small, dtype)
