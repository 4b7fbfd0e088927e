"""lori: sparse B by one threshold over the model, then the sum of the adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..factor_space import all_factors
from ..matrix import MatrixSpec, Merged, Wants, folds_scale
from ..protocol import MethodInfo, Param
from .common import FOLD_SCALE, LAMBDA, MANY, WEIGHT
from .masks import Masking, Sizes, Thresholds, begin, measure_masks, next_masks
from .sums import weighted_sum

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors

__all__ = ["Lori", "group_of"]


class Lori:
    """Delta = sum of w_t (B_t masked) A_t, or the product of the weighted sums of the factors."""

    info = MethodInfo(
        name="lori",
        purpose="Keep the largest entries of every adapter's B by one threshold over the model, then add the adapters: "
        "for adapters with frozen random A and sparse B (LoRI).",
        formula="mask = |B| >= the k-th largest over all B of the group, k = floor((1 - sparsity) N); cat: "
        "Delta = sum of wt (mask Bt) At; linear: A = sum of sgn(wt st) sqrt|wt st| At, B = sum of sqrt|wt st| mask Bt",
        params=(
            Param(
                "sparsity",
                "float",
                "share of the entries of B that become zero; 0 for adapters that are to stay as they are",
                default=0.9,
                low=0.0,
                high=1.0,
            ),
            Param(
                "granularity",
                "str",
                "what one threshold counts over: all B of an adapter (model), those of one kind of block (module: "
                "attention, mlp), of one kind of projection (q_proj in every layer), of one layer, or one matrix",
                default="model",
                choices=("model", "module", "projection", "layer", "matrix"),
            ),
            Param(
                "combination",
                "str",
                "cat: the exact sum; linear: sums of factors at the adapters' rank, with cross terms",
                default="cat",
                choices=("cat", "linear"),
            ),
            WEIGHT,
            LAMBDA,
            FOLD_SCALE,
        ),
        base="required",
        passes="1 to 3 reads of B for the thresholds, 1 read of the factors, 1 write",
        source="Zhang et al. 2025, LoRI, arXiv 2504.07448; juzhengz/LoRI src/extract_mask.py, src/merge_3_loras.py; "
        "peft tuners/lora/model.py",
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "each adapter's scale counts",
            "code": "the authors' code: alpha / r is ignored (fold_scale false)",
        },
        deviations=(
            "where k is 0 nothing is kept, with a warning; the authors' code fails",
            "thresholds count magnitudes that carry the adapter's scale, which matters where it differs by module",
            "adapters that share one A are added at its rank, exactly, with a warning: LoRI counts on different ones",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Thresholds count over modules, unless nothing is masked."""
        return "model" if params["sparsity"] > 0.0 else "tensor"

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """Adapters of one rank where factors are added. Truncation where it is asked for only: a sum is exact."""
        return Wants(equal_ranks=params["combination"] == "linear", rank="exact")

    def measure(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Any:
        """Sizes first, then passes of the selections over this module's B."""
        blocks = [f.b for f in _factors(deltas)]
        if state is None:
            group = group_of(spec.name, spec.params["granularity"])
            return Sizes(group, tuple(b.numel() for b in blocks), str(blocks[0].dtype))
        return measure_masks(state, spec.name, blocks)

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any], state: Any = None) -> Any:
        """The next pass, or all thresholds."""
        if isinstance(state, Masking):
            return next_masks(state, measured)
        return begin(measured, 1.0 - params["sparsity"])

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The sum of the masked adapters."""
        from ...adapters.model import Factors

        factors = _factors(deltas)
        kept = [1.0] * len(factors)
        warnings: list[str] = []
        if isinstance(state, Thresholds):
            masked = [state.mask(spec.name, t, f.b) for t, f in enumerate(factors)]
            kept = [
                float(x.count_nonzero()) / max(1, x.numel()) if f.rank else 0.0
                for x, f in zip(masked, factors, strict=True)
            ]
            factors = [Factors(x, f.a) for x, f in zip(masked, factors, strict=True)]
            warnings += state.warnings(spec.name)
        merged: Delta
        if spec.params["combination"] == "linear":
            merged, route = _linear(factors, spec), "linear"
        elif _shares_a(factors):
            merged, route = _on_one_a(factors, spec.params["weight"]), "one A"
            warnings.append(f"{spec.name}: all adapters have the same A; LoRI counts on A being different")
        else:
            merged, route = weighted_sum(factors, spec.params["weight"], spec.shape)
        return Merged(merged, {"kept": kept, "route": route or "cat"}, tuple(warnings))


def group_of(name: str, granularity: str) -> str:
    """The group of a module's B: modules with equal groups share a threshold.

    name : of the module, or of its weight. layer : the path up to the first number. module : the part before the last
    one, as in self_attn. projection : the last part.
    """
    name = name.removesuffix(".weight")
    parts = name.split(".")
    if granularity == "model":
        return ""
    if granularity == "matrix":
        return name
    if granularity == "projection":
        return parts[-1]
    if granularity == "module":
        return parts[-2] if len(parts) > 1 else ""
    numbers = [i for i, part in enumerate(parts) if re.fullmatch(r"\d+", part)]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ".".join(parts[:-1])


def _factors(deltas: Sequence[Delta]) -> list[Factors]:
    factors = all_factors(deltas)
    assert factors is not None
    return factors


def _shares_a(factors: Sequence[Factors]) -> bool:
    import torch

    used = [f for f in factors if f.rank > 0]
    return len(used) > 1 and all(
        f.a.shape == used[0].a.shape and f.a.dtype == used[0].a.dtype and torch.equal(f.a, used[0].a) for f in used[1:]
    )


def _on_one_a(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    from ...adapters.model import Factors

    used = [(f, w) for f, w in zip(factors, weights, strict=True) if f.rank > 0]
    b = used[0][0].b * used[0][1]
    for f, w in used[1:]:
        b = b + f.b * w
    return Factors(b, used[0][0].a)


def _linear(factors: Sequence[Factors], spec: MatrixSpec) -> Factors:
    """Sums of factors. A scale that is inside B is divided between both, as with B and A from the files.

    Raises
    ------
    ArgumentError : adapters of different ranks.
    """
    from ...adapters.model import Factors
    from ...errors import ArgumentError

    if len({f.rank for f in factors if f.rank > 0}) > 1:
        raise ArgumentError(
            "lori: combination linear adds factors, so their ranks must be equal",
            code="adapter.rank",
            tensor=spec.name,
            expected="equal ranks",
            got=", ".join(str(f.rank) for f in factors),
            hint="combination cat takes any ranks.",
        )
    used = [t for t, f in enumerate(factors) if f.rank > 0]
    if not used:
        return factors[0]
    inside = folds_scale(spec.params, spec.dialect)
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    for t in used:
        scale = spec.scales[t] if inside and spec.scales and spec.scales[t] != 0.0 else 1.0
        root = math.sqrt(abs(spec.params["weight"][t] * scale))
        more_a = factors[t].a * math.copysign(root, spec.params["weight"][t] * scale)
        more_b = factors[t].b * (root / scale)
        a = more_a if a is None else a + more_a
        b = more_b if b is None else b + more_b
    assert a is not None and b is not None
    return Factors(b, a)
