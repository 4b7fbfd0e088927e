"""Methods over matrices for the tests of their drivers: plain float64 arithmetic, and a record of what came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mergekernels._methods import matrix_table
from mergekernels._methods.common import LAMBDA
from mergekernels._methods.matrix import Again, MatrixSpec, Merged
from mergekernels._methods.protocol import MethodInfo, Param
from mergekernels.adapters.model import Factors


def dense(delta: Any) -> torch.Tensor:
    """A task vector in float64."""
    if isinstance(delta, Factors):
        return delta.b.double() @ delta.a.double()
    return delta.double()


def plain_iso(total: torch.Tensor) -> torch.Tensor:
    """Every direction of the sum with the mean strength, in float64."""
    u, s, vh = torch.linalg.svd(total.double(), full_matrices=False)
    keep = s > 1e-5 * s.max()
    return s.sum() / min(total.shape) * (u[:, keep] @ vh[keep])


class Flat:
    """Iso-C in float64: delta = mean(s) U V^T of the weighted sum; `note` is a word for the report."""

    info = MethodInfo(
        name="test_flat",
        purpose="For tests.",
        formula="mean(s) U V^T",
        params=(
            Param("weight", "float", "weight", python="weights", per_model=True, default=1.0),
            Param("note", "str", "a word", default="none", choices=("none", "loud", "factors")),
            LAMBDA,
        ),
        base="required",
        passes="1",
        source="tests",
        tier="T2",
        modifiable=True,
        takes=("models", "adapters"),
    )

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[Any]]] = []

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        return ["weights of 13 are bad luck"] if 13.0 in params["weight"] else []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Any:
        return "tensor"

    def measure(self, spec: MatrixSpec, deltas: Sequence[Any], state: Any = None) -> Any:
        raise AssertionError

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any], state: Any = None) -> Any:
        raise AssertionError

    def merge(self, spec: MatrixSpec, deltas: Sequence[Any], state: Any = None) -> Merged:
        self.seen.append((spec.name, [type(d).__name__ for d in deltas]))
        total = sum((dense(d) * w for d, w in zip(deltas, spec.params["weight"], strict=True)))
        assert isinstance(total, torch.Tensor)
        assert total.shape == spec.shape
        result = plain_iso(total)
        warnings = ("it was loud",) if spec.params["note"] == "loud" else ()
        report = {"rank": torch.tensor(min(spec.shape)), "residual": float("inf"), "route": "svd"}
        if spec.params["note"] == "factors":
            return Merged(Factors(result, torch.eye(spec.shape[1], dtype=torch.float64)), report)
        return Merged(result, report, warnings)


class ByNorm(Flat):
    """Each task vector over the largest norm of its model's; measured twice, the second time to see the state."""

    info = MethodInfo(
        name="test_norm",
        purpose="For tests.",
        formula="sum of d_t / max norm",
        params=(LAMBDA,),
        base="required",
        passes="2",
        source="tests",
        tier="T2",
    )

    class _Again(Again):
        norms: dict[str, list[float]]

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Any:
        return "model"

    def measure(self, spec: MatrixSpec, deltas: Sequence[Any], state: Any = None) -> Any:
        if state is not None:
            return state.norms[spec.name]
        return [float(dense(d).norm()) for d in deltas]

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any], state: Any = None) -> Any:
        if state is None:
            again = self._Again()
            object.__setattr__(again, "norms", dict(measured))
            return again
        assert measured == state.norms
        return [max(column) for column in zip(*measured.values(), strict=True)]

    def merge(self, spec: MatrixSpec, deltas: Sequence[Any], state: Any = None) -> Merged:
        return Merged(sum((dense(d) / top for d, top in zip(deltas, state, strict=True))), {})  # type: ignore[arg-type]


@contextmanager
def registered(*methods: Any) -> Iterator[None]:
    """The table of methods with these before the others."""
    before = matrix_table._ALL
    matrix_table._ALL = (*methods, *before)
    try:
        yield
    finally:
        matrix_table._ALL = before
