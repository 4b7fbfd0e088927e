"""tc_lora: one joint factorisation of all adapters, merged from its shared terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ..factor_space import all_factors
from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import FOLD_SCALE, LAMBDA, MANY

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors
    from ...ops import CP

__all__ = ["CP_PARAMS", "TcLora", "joint_fits", "sharing"]

CP_PARAMS = (
    Param(
        "cp_rank",
        "int",
        "terms of the factorisation, at most the sum of the ranks; the largest rank among the adapters, in the dialect "
        "code 1",
        default=None,
        low=1,
        high=65536,
    ),
    Param(
        "normalize",
        "str",
        "fro divides every adapter's update by its norm for the fit, so that weak adapters count alike; none does not",
        default="none",
        choices=("none", "fro"),
    ),
    Param("n_starts", "int", "starts of the factorisation; the best fit is taken", default=4, low=1, high=1024),
    Param("max_iter", "int", "sweeps of a start", default=100, low=1, high=1000000),
    Param("tol", "float", "stop where the relative error changes by less", default=1e-7, low=0.0),
    Param("strict", "bool", "what would be a warning about the factorisation is an error", default=False),
)
"""Parameters of methods that factorise a stack."""


def joint_fits(specs: Sequence[MatrixSpec], stacks: Sequence[Sequence[Any]], default: int | None = None) -> list[CP]:
    """The joint factorisation of the stack of each module, those of equal rank in one call.

    default : terms where the parameters name none; None for the largest rank of the stack. Random starts depend on
    the seed and the module's name. Errors: DataError for what would be a warning, with the parameter strict.
    """
    from ...ops.tensor.cp import fits

    found: dict[int, CP] = {}
    ranks = [spec.params["cp_rank"] or default or max(f.rank for f in s) for spec, s in zip(specs, stacks, strict=True)]
    for rank in sorted(set(ranks)):
        chosen = [i for i, r in enumerate(ranks) if r == rank]
        spec = specs[chosen[0]]
        options: dict[str, Any] = {name: spec.params[name] for name in ("n_starts", "max_iter", "tol")}
        options |= {"normalize": None if spec.params["normalize"] == "none" else spec.params["normalize"]}
        options |= {"seed": spec.seed, "keys": [specs[i].tensor for i in chosen]}
        found |= zip(chosen, fits([list(stacks[i]) for i in chosen], max(1, rank), **options), strict=True)
    for i, spec in enumerate(specs):
        said = found[i].diagnostics["warnings"]
        if said and spec.params["strict"]:
            raise DataError(
                f"the factorisation: {said[0]}",
                code="cp.strict",
                tensor=spec.name,
                hint="strict=False gives the result with a warning.",
            )
    return [found[i] for i in range(len(specs))]


def sharing(c: torch.Tensor) -> list[float]:
    """The sharing index of each term, (sum C^2)^2 / (T sum C^4): 1 for equal use by all tasks, 1/T for one task."""
    squares = c.double().square()
    total, fourth = squares.sum(0), squares.square().sum(0)
    return [t * t / (len(c) * f) if f > 0 else 0.0 for t, f in zip(total.tolist(), fourth.tolist(), strict=True)]


class TcLora(PerMatrix):
    """Delta = sum_k (sum_t w_t C[t, k]) u_k v_k^T, where B_t A_t ~ sum_k C[t, k] u_k v_k^T."""

    info = MethodInfo(
        name="tc_lora",
        purpose="Factorise the updates of all adapters jointly into shared rank-1 terms with a weight per adapter, and "
        "merge the terms.",
        formula="Bt At ~ sum over k of C[t,k] uk vk^T, all t at once, by alternating least squares; "
        "Delta = sum over k of (w1 C[1,k] + ... + wT C[T,k]) uk vk^T; with shared_min only terms of sharing index "
        "(sum_t C^2)^2 / (T sum_t C^4) at least that",
        params=(
            Param(
                "weight",
                "float",
                "weight of each adapter in the merge, not in the fit; 1 / T",
                python="weights",
                per_model=True,
                default=None,
            ),
            LAMBDA,
            *CP_PARAMS,
            Param(
                "shared_min",
                "float",
                "keep terms that several adapters use: sharing index at least this; 1/T is one adapter, 1 all alike",
                default=0.0,
                low=0.0,
                high=1.0,
            ),
            FOLD_SCALE,
        ),
        base="required",
        passes="2 QR decompositions of the stacked factors per module, sweeps on the cores, 1 write",
        source="TC-LoRA, arXiv 2508.03999; microsoft/mttl, branch lora_soup, library_transforms.py",
        min_models=1,
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "the tensor of the products Bt At: does not depend on how a product is factored, mixed ranks",
            "code": "the authors' branch: two tensors, of the At and of the Bt, cp_rank terms each, and the product of "
            "their task means; equal ranks, alpha / r ignored (fold_scale false)",
        },
        deviations=(
            "the paper's equations are not public; which of the public transforms made its numbers is not known",
            "weights are of any sign; the authors take the plain mean",
            "the authors' product form on GPUs leaves the task factor out, so that its scale is whatever the "
            "iteration leaves; not offered",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """The factor form has no terms to choose from."""
        if dialect == "code" and params["shared_min"] > 0.0:
            return ["shared_min chooses among terms of the products; expected dialect default; got code"]
        return []

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """Factorise, weigh the terms, add."""
        return self.merge_together([spec], [deltas])[0]

    def merge_together(self, specs: Sequence[MatrixSpec], deltas: Sequence[Sequence[Delta]]) -> list[Merged]:
        """Factorise the stacks of all modules, those of one shape in one batch."""
        stacks = []
        for given in deltas:
            factors = all_factors(given)
            assert factors is not None
            stacks.append(factors)
        empty = {
            i: Merged(s[0], {"fit": 1.0, "cp_rank": 0}) for i, s in enumerate(stacks) if not any(f.rank for f in s)
        }
        rest = [i for i in range(len(specs)) if i not in empty]
        form = _factors if specs[0].dialect == "code" else _products
        found = zip(rest, form([specs[i] for i in rest], [stacks[i] for i in rest]), strict=True)
        merged = {**empty, **dict(found)}
        return [merged[i] for i in range(len(specs))]


def _weights(spec: MatrixSpec) -> torch.Tensor:
    import torch

    given = spec.params["weight"]
    return torch.tensor([1.0 / len(given) if w is None else w for w in given], dtype=torch.float64)


def _products(specs: Sequence[MatrixSpec], stacks: Sequence[Sequence[Factors]]) -> list[Merged]:
    import torch

    from ...adapters.model import Factors

    merged = []
    for spec, found in zip(specs, joint_fits(specs, stacks), strict=True):
        c, u, v = found.factors
        shares = sharing(c)
        kept = torch.tensor([s >= spec.params["shared_min"] for s in shares])
        b = (u.double() * (_weights(spec).to(c.device) @ c.double()))[:, kept]
        report = _report(found) | {"sharing": tuple(round(s, 6) for s in shares), "terms": int(kept.sum())}
        merged.append(Merged(Factors(b.to(u.dtype), v[:, kept].mT), report, _warnings(found)))
    return merged


def _factors(specs: Sequence[MatrixSpec], stacks: Sequence[Sequence[Factors]]) -> list[Merged]:
    """The A_t and the B_t as two dense stacks, each a stack of products with an identity."""
    import torch

    from ...adapters.model import Factors

    downs, ups = [], []
    for spec, factors in zip(specs, stacks, strict=True):
        there = [f for f in factors if f.rank]
        if len({f.rank for f in there}) > 1:
            raise ArgumentError(
                "dialect code of tc_lora stacks factors of equal rank",
                code="tc_lora.ranks",
                tensor=spec.name,
                expected="equal ranks",
                got=", ".join(str(f.rank) for f in factors),
                hint="The default dialect takes mixed ranks.",
            )
        r = there[0].rank
        eye = torch.eye(r, dtype=there[0].a.dtype, device=there[0].a.device)
        filled = [f if f.rank else Factors(f.b.new_zeros(f.shape[0], r), f.a.new_zeros(r, f.shape[1])) for f in factors]
        downs.append([Factors(eye, f.a) for f in filled])
        ups.append([Factors(f.b, eye) for f in filled])
    merged = []
    for spec, *pair in zip(specs, joint_fits(specs, downs, 1), joint_fits(specs, ups, 1), strict=True):
        sides = []
        for found in pair:
            c, u, v = (x.double() for x in found.factors)
            sides.append(((u * (_weights(spec).to(c.device) @ c)) @ v.mT).to(found.factors[1].dtype))
        report = {f"{name}_{k}": x for name, cp in zip("ab", pair, strict=True) for k, x in _report(cp).items()}
        warnings = (*_warnings(pair[0], "the stack of A: "), *_warnings(pair[1], "the stack of B: "))
        merged.append(Merged(Factors(sides[1], sides[0]), report, warnings))
    return merged


def _report(found: CP) -> dict[str, Any]:
    diagnostics = found.diagnostics
    return {
        "fit": found.fit,
        "cp_rank": diagnostics["rank"],
        "sweeps": diagnostics["sweeps"],
        "spread": diagnostics["spread"],
    }


def _warnings(found: CP, what: str = "") -> tuple[str, ...]:
    return tuple(f"{what}{text}" for text in found.diagnostics["warnings"])
