"""Matrix arguments: what they may be, their checks, and the maps they become."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Union

from ...adapters.model import Factors
from ...errors import ArgumentError
from ._maps import DenseMap, FactorMap, Map, MixMap
from .mix import Mix
from .sharded import Sharded, check_matrix, dense

if TYPE_CHECKING:
    import torch

__all__ = ["Input", "as_map"]

Input = Union["torch.Tensor", Sharded, Factors, Mix]
"""One matrix argument."""


def as_map(x: Any, name: str) -> Map:
    """The map of a matrix argument, checked: two dimensions, a float dtype, no NaN or Inf. `name` is for errors."""
    if isinstance(x, Factors):
        return _factors(x, name)
    if isinstance(x, Mix):
        return _mix(x, name)
    return DenseMap(check_matrix(x, name))


def _factors(x: Factors, name: str) -> FactorMap:
    import torch

    b, a = dense(check_matrix(x.b, f"{name}.b")), dense(check_matrix(x.a, f"{name}.a"))
    if b.shape[1] != a.shape[0] or b.device != a.device:
        raise ArgumentError(
            f"the factors of {name} do not fit together",
            code="argument.factors",
            expected=f"a with {b.shape[1]} rows, as b has columns, on one device",
            got=f"b {tuple(b.shape)} on {b.device}, a {tuple(a.shape)} on {a.device}",
        )
    wide = torch.promote_types(b.dtype, a.dtype)
    return FactorMap(b.to(wide), a.to(wide))


def _mix(mix: Mix, name: str) -> Map:
    import torch

    terms = [_factors(f, f"{name}.factors[{i}]") for i, (_, f) in enumerate(mix.factors)]
    whole = [DenseMap(check_matrix(d, f"{name}.dense[{i}]")) for i, (_, d) in enumerate(mix.dense)]
    shapes = {t.shape for t in (*terms, *whole)}
    if len(shapes) != 1:
        raise ArgumentError(
            f"the terms of {name} differ in shape",
            code="argument.shape",
            expected="at least one term, and one shape",
            got=", ".join(str(s) for s in sorted(shapes)) or "no term",
        )
    weights = [float(w) for w, _ in (*mix.factors, *mix.dense)]
    if not all(math.isfinite(w) for w in weights):
        raise ArgumentError(f"the weights of {name} must be finite", code="argument.weights", got=str(weights))
    product: FactorMap | None = None
    matrix: DenseMap | None = None
    if terms:
        wide = terms[0].dtype
        for t in terms:
            wide = torch.promote_types(wide, t.dtype)
        b = torch.cat([t.b.to(wide) * w for w, t in zip(weights, terms, strict=False)], 1)
        product = FactorMap(b, torch.cat([t.a.to(wide) for t in terms], 0))
    if whole:
        scales = weights[len(terms) :]
        if len(whole) == 1 and scales[0] == 1.0:
            matrix = whole[0]
        else:
            total = whole[0].dense() * scales[0]
            for w, d in zip(scales[1:], whole[1:], strict=True):
                total = total + d.dense().to(total.device) * w
            matrix = DenseMap(total)
    if product is None:
        assert matrix is not None
        return matrix
    return product if matrix is None else MixMap(product, matrix)
