"""magnitude_prune, dare_linear, ties and dare_ties of adapters: on the factors, and on the deltas (_svd)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..matrix import MatrixSpec, Merged, Wants
from ..permatrix import PerMatrix
from ..protocol import REQUIRED, MethodInfo, Param
from .clamp import SVD_CLAMP, clamping
from .common import LAMBDA, WEIGHT
from .elementwise import Rule, combine, terms
from .linear import roots
from .peft import DEVIATIONS, PEFT

if TYPE_CHECKING:
    from ...adapters.model import Delta, Factors
    from ...ops.inputs import Inputs

__all__ = ["PRUNED"]

_DENSITY = Param(
    "density",
    "float",
    "share of the entries that is kept; 1 keeps everything, 0 nothing",
    per_model=True,
    default=REQUIRED,
    low=0.0,
    high=1.0,
)
_TIES = Param(
    "tie_policy",
    "str",
    "who survives among equal magnitudes",
    default="hash",
    choices=("hash", "index", "all"),
)
_MAJORITY = Param(
    "majority_sign_method",
    "str",
    "what elects a sign: the sum of the pruned values, or of their signs",
    default="total",
    choices=("total", "frequency"),
)
_NAMES = {
    ("magnitude", False): "magnitude_prune",
    ("random", False): "dare_linear",
    ("magnitude", True): "ties",
    ("random", True): "dare_ties",
}
_PURPOSE = {
    "magnitude_prune": "Keep the largest entries of each adapter's {what}, add them.",
    "dare_linear": "Drop a random share of each adapter's {what}, rescale the rest, add them.",
    "ties": "Keep the largest entries of each adapter's {what}, elect signs, average what agrees.",
    "dare_ties": "Drop a random share of each adapter's {what}, rescale the rest, elect signs, average what agrees.",
}


class _Pruned(PerMatrix):
    """One of the four rules, on factors or on deltas."""

    def __init__(self, prune: Literal["magnitude", "random"], elects: bool, *, dense: bool) -> None:
        self._prune: Literal["magnitude", "random"] = prune
        self._elects = elects
        self._dense = dense
        self.info = _info(prune, elects, dense)

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """Factors as they are and of one rank, or a truncation."""
        if self._dense:
            return Wants(rank="largest", peft=True)
        return Wants(raw=True, equal_ranks=True, peft=True)

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The rule on A and on B, or on the products."""
        from ...adapters.model import Factors

        factors = [d for d in deltas if isinstance(d, Factors)]
        rule = self._rule(spec)
        if self._dense:
            return self._products(spec, factors, rule)
        sides = []
        for inputs, weights in zip(_sides(spec, factors), roots(spec), strict=True):
            out = inputs.tensors[0][0].new_empty(inputs.shape)
            combine(inputs, [out], rule, weights)
            sides.append(out)
        return Merged(Factors(sides[1], sides[0]))

    def separate(self, spec: MatrixSpec, deltas: Sequence[Delta]) -> list[Factors] | None:
        """What each adapter contributes; None for the rules on deltas, whose terms are dense."""
        from ...adapters.model import Factors

        if self._dense:
            return None
        factors = [d for d in deltas if isinstance(d, Factors)]
        sides = []
        for inputs in _sides(spec, factors):
            outs = [inputs.tensors[0][0].new_empty(inputs.shape) for _ in factors]
            terms(inputs, [[out] for out in outs], self._rule(spec))
            sides.append(outs)
        return [Factors(b, a) for a, b in zip(*sides, strict=True)]

    def _rule(self, spec: MatrixSpec) -> Rule:
        return Rule(
            self._prune,
            spec.params["density"],
            spec.params["majority_sign_method"] if self._elects else "none",
            spec.params.get("tie_policy", "hash"),
            spec.seed,
        )

    def _products(self, spec: MatrixSpec, factors: Sequence[Factors], rule: Rule) -> Merged:
        from ...ops.products import product_inputs

        inputs = product_inputs(factors, spec.name)
        out = factors[0].b.new_empty(spec.shape)
        combine(inputs, inputs.boxes_of(out), rule, spec.params["weight"])
        return Merged(out, {"route": "tiles of the products"}, finish=clamping(spec.params))


def _sides(spec: MatrixSpec, factors: Sequence[Factors]) -> tuple[Inputs, Inputs]:
    """All A and all B as inputs of element-wise passes; an adapter without the module has zeros there."""
    from ...ops.inputs import gather

    module, rank = spec.name.removesuffix(".weight"), max(f.rank for f in factors)
    a = [f.a if f.rank else f.a.new_zeros((rank, spec.shape[1])) for f in factors]
    b = [f.b if f.rank else f.b.new_zeros((spec.shape[0], rank)) for f in factors]
    return gather(a, None, f"{module}.lora_A.weight", 0), gather(b, None, f"{module}.lora_B.weight", 0)


def _info(prune: Literal["magnitude", "random"], elects: bool, dense: bool) -> MethodInfo:
    short = _NAMES[prune, elects]
    params = [WEIGHT, _DENSITY]
    if prune == "magnitude":
        params.append(_TIES)
    if elects:
        params.append(_MAJORITY)
    params.append(LAMBDA)
    if dense:
        params.append(SVD_CLAMP)
    deviations = ["scale", "rslora", "single", "half", "clamp"] if dense else ["rslora", "ranks", "single", "half"]
    deviations += ["ties"] if prune == "magnitude" else ["masks", "zero"]
    purpose = _PURPOSE[short].format(what="delta" if dense else "factors")
    return MethodInfo(
        name=f"{short}_svd" if dense else short,
        purpose=purpose + (" Truncated to a rank." if dense else ""),
        formula=_formula(prune, elects, dense),
        params=tuple(params),
        base="optional",
        passes=(
            "1 read of the factors; tiles of the products are formed "
            + ("2 to 4 times" if prune == "magnitude" else "once")
            + ", the merged delta is the only dense matrix"
            if dense
            else "1 read of the factors"
        ),
        source=PEFT,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "the rule",
            "peft": "PEFT 0.21.2: one adapter alone is neither pruned nor truncated; if the first adapter asks for "
            "rsLoRA, times the square root of the rank",
        },
        deviations=tuple(DEVIATIONS[d] for d in deviations),
    )


def _formula(prune: Literal["magnitude", "random"], elects: bool, dense: bool) -> str:
    x, w = ("Xt = Bt At, wt the weights", "wt") if dense else ("", "vt")
    pruned = (
        "X~t = the floor(density n) largest |Xt|, the others 0"
        if prune == "magnitude"
        else "X~t = mt Xt / density, mt = 1 where the element's random word is below floor(density 2^32), else 0"
    )
    if elects:
        merge = (
            f"s = +1 if X~1 + ... + X~T >= 0, else -1; X = (sum of the {w} X~t of sign s) / max(1, number of them); "
            "majority_sign_method frequency: s by the sum of the signs"
        )
    else:
        merge = f"X = sum of {w} X~t"
    if dense:
        return f"{x}: {pruned}; {merge}; Delta = X truncated to a rank as in svd"
    return (
        f"on A with vt = sgn(wt st) sqrt|wt st| and on B with vt = sqrt|wt st|, X = A or B: {pruned}; {merge}; "
        "Delta = B A; st = alpha / r of adapter t"
    )


PRUNED = tuple(
    _Pruned(prune, elects, dense=dense)
    for dense in (False, True)
    for elects in (False, True)
    for prune in ("magnitude", "random")
)
"""magnitude_prune, dare_linear, ties, dare_ties, and the same four with _svd."""
