"""A family of awkward shapes, and a method that asks for one round of any kind and keeps what it is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

import engine_cases as cases
from mergekernels._backends import cpu
from mergekernels._methods.protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats
from mergekernels.ops.keep import Draw, RankDraw, Rows
from mergekernels.ops.program import Program, Table
from mergekernels.ops.selection import Selection
from mergekernels.ops.sums import Gram, Reduce, Segments, Sums

SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.odd.weight": (31, 257),
    "model.layers.0.tall.weight": (5000, 7),
    "model.layers.0.wide.weight": (3, 9000),
    "model.layers.1.conv.weight": (6, 5, 7),
    "model.layers.1.norm.weight": (300,),
    "model.scalar": (),
}
MODELS = 3


def tensors(dtype: torch.dtype = torch.bfloat16) -> list[dict[str, torch.Tensor]]:
    """The base, then the models."""
    generator = torch.Generator().manual_seed(3)
    base = {n: (torch.randn(s, generator=generator) * 0.02).to(dtype) for n, s in SHAPES.items()}
    noise = [
        {n: (t.float() + torch.randn(t.shape, generator=generator) * 0.001).to(dtype) for n, t in base.items()}
        for _ in range(MODELS)
    ]
    return [base, *noise]


def family(root: Path) -> Path:
    """Folders base, tuned1, ... under `root`."""
    names = ["base", *(f"tuned{i + 1}" for i in range(MODELS))]
    for name, state in zip(names, tensors(), strict=True):
        cases.save(root / name, state, files=2)
    return root


def recipe(root: Path, method: str, name: str, *, models: int = MODELS, base: bool = True, **top: Any) -> Path:
    """A recipe over the first `models` of the family."""
    data: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(root / f"tuned{i + 1}")} for i in range(models)],
    }
    if base:
        data["base_model"] = str(root / "base")
    path = root / f"{name}.yml"
    path.write_text(json.dumps(data | top))
    return path


def backend(features: frozenset[str]) -> str:
    """The C++ backend where it can do what is asked for, else the reference."""
    return "cpu" if features <= cpu.FEATURES else "reference"


_KINDS = ("gram", "gram-rows", "gram-columns", "reduce", "reduce-ranks", "divergence", "variance", "two-points")


class Probe:
    """Runs one round of the kind asked for and keeps its statistics by tensor in `seen`. The result is the mean of the
    models in which weights depend on every bit of a sum's leading digits.
    """

    info = MethodInfo(
        name="probe",
        purpose="",
        formula="",
        params=(
            Param("kind", "str", "the round", choices=_KINDS),
            Param("scope", "str", "its scope", default="tensor", choices=("tensor", "model")),
        ),
        base="required",
        passes="",
        source="",
    )

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        scope: Literal["tensor", "model"] = params["scope"]
        return scope

    def start(self, spec: Spec) -> Round | Coeffs:
        kind, scope = spec.params["kind"], self.scope(spec.params, "")
        last = spec.shape[-1] if spec.shape else 1
        if kind.startswith("gram"):
            first = spec.shape[0] if spec.shape else 1
            segments = Segments("tensor", 1, spec.n)
            if kind == "gram-rows":
                segments = Segments("rows", spec.n // last, last)
            elif kind == "gram-columns":
                segments = Segments("columns", spec.n // first, first)
            return Round("gram", scope, gram=Gram(segments, True))
        if kind.startswith("reduce"):
            return Round("reduce", scope, coeffs=Coeffs(), reduce=Reduce(("abs", "kept_abs", "merged_abs")))
        if kind == "divergence":
            return Round("divergence", scope, row_length=last)
        ranks = (
            ((0, -(-spec.scope.n // 3)),)
            if kind == "variance"
            else ((0, 1), (1, -(-spec.scope.n // 2)), (0, spec.scope.n))
        )
        key: Literal["delta", "variance"] = "variance" if kind == "variance" else "delta"
        selection = Selection.of(ranks, spec.scope, policy="hash", seed=spec.seed, base=True, key=key)
        return Round("select", scope, selection=selection)

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        if round_.op == "select":
            assert round_.selection is not None
            selection = round_.selection.advance(stats, visited)  # type: ignore[arg-type]
            if not selection.done:
                return Round("select", round_.scope, selection=selection)
            self.seen[spec.name] = selection.points
            return Coeffs(points=selection.points)
        assert isinstance(stats, Sums)
        if round_.op == "divergence":  # the rows then weigh a selection
            self.seen[spec.name] = stats.values
            rows = Table("rows", round_.row_length, stats.segments(0))
            ranks = ((0, -(-spec.n // 4)),)
            return Round(
                "select",
                "tensor",
                selection=Selection.of(
                    ranks, spec.scope, policy="hash", seed=spec.seed, base=True, key="importance", rows=rows
                ),
            )
        self.seen[spec.name] = stats.values
        return Coeffs()

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        models = spec.num_models
        kind = spec.params["kind"]
        options: dict[str, Any] = {"seed": spec.seed, "tensor": spec.tensor}
        keep: tuple[Any, ...] = (Draw(1 << 31),) * models
        if kind == "reduce-ranks":
            length = spec.shape[1] if len(spec.shape) > 1 else spec.n
            stride = spec.n // (spec.shape[0] * length) if len(spec.shape) > 1 else 1
            keep = (RankDraw(1 << 28, 1 << 31, 1 << 30),) * models
            options["rows"] = Rows(length, stride)
        elif kind.startswith("gram"):
            keep = (None,) * models
        elif kind == "variance":
            keep, options["joint"] = (None,) * models, coeffs.points[0] if coeffs.points else None
        return Program((0.5,) * models, keep, **options)


FEATURES = {
    "gram": frozenset({"gram"}),
    "gram-rows": frozenset({"gram"}),
    "gram-columns": frozenset({"gram"}),
    "reduce": frozenset({"reduce", "draw"}),
    "reduce-ranks": frozenset({"reduce", "rank"}),
    "divergence": frozenset({"divergence", "draw", "key:importance"}),
    "variance": frozenset({"key:variance", "joint"}),
    "two-points": frozenset({"draw"}),
}
