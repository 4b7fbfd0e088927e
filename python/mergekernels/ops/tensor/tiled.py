"""Dense updates that are read in row tiles: `TileStack`, and its core between two thin bases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ..arguments import check_integer

if TYPE_CHECKING:
    import torch

__all__ = ["Projected", "TileStack", "projected", "tile_stacks"]


class TileStack:
    """T dense updates of one module, (m, n) each, of which only some rows are in memory at a time.

    read : read(first, last) gives rows first to last - 1 of all updates, a float tensor (T, last - first, n); the same
    values whenever it is asked. shape : (T, m, n). memory : bytes that the rows and their copies may take, default
    64 MiB; at least one row of each update is read. passes : how often all rows are read to find the bases, 1 or more,
    default 3; once more they are read to project. Besides the rows there are (T + 1)(m + n) s float64 numbers, where s
    is the size of the core: for CP rank c the larger of 2 c and c + 8, for Tucker bases p + 8.
    `checkpoint_stacks` makes them from checkpoints.
    """

    def __init__(
        self,
        read: Callable[[int, int], torch.Tensor],
        shape: tuple[int, int, int],
        *,
        memory: int = 64 << 20,
        passes: int = 3,
    ) -> None:
        if len(shape) != 3:
            raise ArgumentError("shape is not usable", code="tiles.shape", expected="(T, m, n)", got=repr(shape))
        sizes = [check_integer(size, 1, 1 << 40, f"shape[{i}]") for i, size in enumerate(shape)]
        self.shape: tuple[int, int, int] = (sizes[0], sizes[1], sizes[2])
        self.passes = check_integer(passes, 1, 1 << 16, "passes")
        self._rows = max(1, check_integer(memory, 1, 1 << 50, "memory") // (20 * sizes[0] * sizes[2]))
        self._read = read

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows (T, h, n)), all rows in order.

        Raises
        ------
        ArgumentError : what is read is not of that shape. DataError : NaN or Inf.
        """
        import torch

        count, m, n = self.shape
        for first in range(0, m, self._rows):
            last = min(m, first + self._rows)
            rows = self._read(first, last)
            want = (count, last - first, n)
            if not isinstance(rows, torch.Tensor) or not rows.is_floating_point() or tuple(rows.shape) != want:
                raise ArgumentError(
                    "the reader of a stack gives something else than its rows",
                    code="tiles.read",
                    expected=f"a float tensor {want}",
                    got=f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, torch.Tensor) else type(rows).__name__,
                )
            if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
                task = int((~torch.isfinite(rows)).flatten(1).any(1).to(torch.int8).argmax())
                raise DataError(
                    f"update {task} holds NaN or Inf in rows {first} to {last - 1}",
                    code="data.nonfinite",
                    tensor=f"stack[{task}]",
                )
            yield first, rows


@dataclass(frozen=True)
class Projected:
    """D_t ~ u core_t v^T with u (m, p), v (n, q) of orthonormal columns, float64, and core (T, p, q) = u^T D_t v.

    norm2 : ||D_t||^2, (T). dtype : of results. What lies outside the bases, ||D_t||^2 - ||core_t||^2, is orthogonal to
    every model between them, so that its error is known.
    """

    u: torch.Tensor
    v: torch.Tensor
    core: torch.Tensor
    norm2: torch.Tensor
    dtype: torch.dtype

    @property
    def inside(self) -> torch.Tensor:
        """||core_t||^2, (T)."""
        return self.core.square().sum((1, 2))


def tile_stacks(stack: Any) -> list[TileStack] | None:
    """The stacks of tiles in the argument of an op; None if there is none.

    Raises
    ------
    ArgumentError : some modules are tiles and others are not.
    """
    if isinstance(stack, TileStack):
        return [stack]
    if not isinstance(stack, (list, tuple)) or not any(isinstance(s, TileStack) for s in stack):
        return None
    if not all(isinstance(s, TileStack) for s in stack):
        raise ArgumentError(
            "some modules are tiles and others are not",
            code="tiles.mixed",
            expected="only tiles, or none",
            got=", ".join(sorted({type(s).__name__ for s in stack})),
        )
    return list(stack)


def projected(stack: TileStack, size: tuple[int, int], weights: list[float] | None, relative: bool, seed: int) -> Any:
    """The core of a stack between bases of at most `size` columns that hold most of sum_t w_t ||D_t||^2.

    From random bases, every pass takes the dominant subspaces of [D_1 v .. D_T v] and of [D_1^T u .. D_T^T u].
    relative : slices count by w_t / ||D_t||^2.
    """
    import torch

    from ._starts import gaussian

    count, m, n = stack.shape
    p, q = min(size[0], m, count * n), min(size[1], n, count * m)
    u, v = (torch.linalg.qr(gaussian((d, k), seed, 0, 0, mode))[0] for d, k, mode in ((m, p, 5), (n, q, 6)))
    shares = torch.tensor(weights or [1.0] * count, dtype=torch.float64)
    norm2, dtype = torch.zeros(count, dtype=torch.float64), torch.float32
    for turn in range(stack.passes):
        left = torch.zeros((count, m, v.shape[1]), dtype=torch.float64)
        right = torch.zeros((count, n, u.shape[1]), dtype=torch.float64)
        for first, rows in stack.tiles():
            dtype = torch.float64 if rows.dtype == torch.float64 else dtype
            wide = rows.to("cpu", torch.float64)
            if turn == 0:
                norm2 += wide.square().sum((1, 2))
            left[:, first : first + wide.shape[1]] = wide @ v
            right += wide.mT @ u[first : first + wide.shape[1]]
            del rows, wide
        scale = shares / torch.where(norm2 > 0, norm2, torch.ones_like(norm2)) if relative else shares
        u, v = (_dominant(x * scale.sqrt()[:, None, None], k) for x, k in ((left, p), (right, q)))
        del left, right
    core = torch.zeros((count, u.shape[1], v.shape[1]), dtype=torch.float64)
    for first, rows in stack.tiles():
        wide = rows.to("cpu", torch.float64)
        core += u[first : first + wide.shape[1]].mT @ (wide @ v)
        del rows, wide
    return Projected(u, v, core, norm2, dtype)


def _dominant(x: torch.Tensor, k: int) -> torch.Tensor:
    """Orthonormal columns, at most k, at least one, that span most of the columns of all x_t, (T, d, s)."""
    import torch

    from ..spectral.subspace import subspace

    flat = x.movedim(0, 1).flatten(1)
    found: torch.Tensor = subspace(flat, min(k, *flat.shape), side="left").basis
    if found.shape[1]:
        return found
    first = torch.zeros((flat.shape[0], 1), dtype=torch.float64)
    first[0, 0] = 1.0
    return first
