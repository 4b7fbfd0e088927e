"""Projections of matrices onto and away from subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from ...errors import ArgumentError
from ._maps import DenseMap
from .batching import in_threads
from .sharded import Sharded, check_matrix, cut_like, dense

if TYPE_CHECKING:
    import torch

__all__ = ["project"]

KINDS = ("block", "left", "right", "keep", "outer")
ORTHONORMAL = 1e-5  # largest ||U^T U - I||_F / sqrt(k) of a basis

Kind = Literal["block", "left", "right", "keep", "outer"]


@overload
def project(
    G: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None = ..., kind: Kind = ...
) -> torch.Tensor: ...
@overload
def project(G: Sharded, u: torch.Tensor | None, v: torch.Tensor | None = ..., kind: Kind = ...) -> Sharded: ...
@overload
def project(
    G: Sequence[torch.Tensor | Sharded],
    u: Sequence[torch.Tensor | None] | None,
    v: Sequence[torch.Tensor | None] | None = ...,
    kind: Kind = ...,
) -> list[Any]: ...
def project(G: Any, u: Any, v: Any = None, kind: Kind = "block") -> Any:
    """G without, or with only, its part in given subspaces.

    G : a matrix (m, n), Sharded, or a list of them. u : (m, k) and v : (n, l), orthonormal columns, k and l may be 0;
    None where the kind does not need it; lists of them for a list.
    kind : "block" G - U (U^T G V) V^T; "left" G - U (U^T G), needs u only; "right" G - (G V) V^T, needs v only;
    "keep" U (U^T G V) V^T, with one of the two bases only that side; "outer" both complements,
    G - U U^T G - G V V^T + U U^T G V V^T. "block" removes less than "left" or "right".
    Where k > m / 2, "keep" with a basis of the complement gives "left" for less work.
    Returns a matrix of G's kind, dtype and shards; computed in float32 (float64 if G or a basis is). What a complement
    leaves is projected a second time, so that U^T Y V vanishes to rounding.
    Errors: ArgumentError for shapes that do not fit and for bases with ||U^T U - I||_F > 1e-5 sqrt(k); DataError for
    NaN or Inf.
    """
    if kind not in KINDS:
        raise ArgumentError("unknown kind", code="argument.kind", expected=", ".join(KINDS), got=str(kind))
    if not isinstance(G, (list, tuple)):
        return _project(G, u, v, kind, "")
    us = [None] * len(G) if u is None else list(u)
    vs = [None] * len(G) if v is None else list(v)
    if len(us) != len(G) or len(vs) != len(G):
        raise ArgumentError(
            "project needs one basis per matrix",
            code="argument.basis",
            expected=str(len(G)),
            got=f"{len(us)} and {len(vs)}",
        )
    tasks = [(g, a, b, f"[{i}]") for i, (g, a, b) in enumerate(zip(G, us, vs, strict=True))]
    return in_threads(tasks, lambda task: _project(task[0], task[1], task[2], kind, task[3]))


def _project(g: Any, u: Any, v: Any, kind: str, which: str) -> Any:
    import torch

    matrix = check_matrix(g, f"G{which}")
    left = _basis(u, matrix.shape[0], f"u{which}", needed=kind in ("block", "left", "outer"))
    right = _basis(v, matrix.shape[1], f"v{which}", needed=kind in ("block", "right", "outer"))
    if kind == "keep" and left is None and right is None:
        raise ArgumentError("project: 'keep' needs u, v or both", code="argument.basis")
    dtype = matrix.dtype
    for basis in (left, right):
        if basis is not None:
            dtype = torch.promote_types(dtype, basis.dtype)
    x = dense(matrix).to(dtype)
    left = None if left is None else left.to(x)
    right = None if right is None else right.to(x)
    if kind == "keep":
        y = _keep(x, left, right)
    else:
        sides = [(left, right)] if kind == "block" else [(left, None)] if kind == "left" else [(None, right)]
        if kind == "outer":
            sides = [(left, None), (None, right)]
        y = x
        for one, other in sides:
            y = y - _keep(y, one, other)
            y = y - _keep(y, one, other)
    return cut_like(y.to(g.dtype), matrix)


def _keep(x: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None) -> torch.Tensor:
    """The part of x in span(u) on the left and span(v) on the right; None stands for the whole space."""
    map_of = DenseMap(x)
    if v is None:
        assert u is not None
        return u @ map_of.adjoint(u).mT
    within = map_of.times(v)
    return (within if u is None else u @ (u.mT @ within)) @ v.mT


def _basis(basis: Any, rows: int, name: str, *, needed: bool) -> torch.Tensor | None:
    import torch

    if basis is None:
        if needed:
            raise ArgumentError(f"project needs {name} for this kind", code="argument.basis")
        return None
    b = dense(check_matrix(basis, name))
    if b.shape[0] != rows or b.shape[1] > rows:
        raise ArgumentError(
            f"{name} does not fit the matrix",
            code="argument.basis",
            expected=f"({rows}, at most {rows})",
            got=str(tuple(b.shape)),
        )
    wide = b.to(torch.float64)
    off = wide.mT @ wide
    off.diagonal().sub_(1.0)
    error = float(torch.linalg.matrix_norm(off)) / max(1, b.shape[1]) ** 0.5
    if error > ORTHONORMAL:
        raise ArgumentError(
            f"the columns of {name} are not orthonormal",
            code="argument.basis",
            expected=f"||U^T U - I||_F / sqrt(k) <= {ORTHONORMAL}",
            got=f"{error:.2e}",
            hint="Pass the q of tall_qr.",
        )
    return b
