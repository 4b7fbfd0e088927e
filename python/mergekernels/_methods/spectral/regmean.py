"""regmean: the weight that fits every model's outputs on its own inputs best, by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import CONV, EXCLUDE

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta

__all__ = ["RegMean"]


class RegMean(PerMatrix):
    """W^T = (sum of G_t)^-1 (sum of G_t W_t^T)."""

    info = MethodInfo(
        name="regmean",
        purpose="Merge each linear layer by least squares on every model's own inputs, given the Grams of the inputs "
        "(RegMean).",
        formula="W (out, in); G~t = alpha Gt + (1 - alpha) diag(Gt), Gt = Xt^T Xt / nt (in, in) as supplied; W^T = "
        "(sum of ct G~t + ridge mean(diag) I)^-1 (sum of ct G~t Wt^T). Tensors without a Gram: weighted mean",
        params=(
            Param("weight", "float", "weight ct of each model", python="weights", per_model=True, default=1.0, low=0.0),
            Param(
                "alpha",
                "float",
                "what the entries of the Grams off the diagonal are multiplied by; 0 is a weighted mean per column",
                default=1.0,
                low=0.0,
                high=1.0,
            ),
            Param("ridge", "float", "added to the diagonal of the sum, relative to its mean", default=0.0, low=0.0),
            EXCLUDE,
            CONV,
        ),
        base="input",
        companions="gram",
        max_models=32,
        tier="T2",
        passes="1 read of the models and their Grams, 1 write; one Cholesky decomposition in float64 per matrix",
        source="Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849; "
        "bloomberg/dataless-model-merging src/model_merge/avg_merger.py; fusion_bench method/regmean",
        dialects={"default": "the authors' formula in float64"},
        deviations=(
            "the authors shrink with alpha 0.1 or 0.9, fusion_bench with 0.1 to 0.95; here alpha is 1 until it is set",
            "a sum of Grams that is singular is an error naming the tensor; the authors invert without a ridge",
            "a weight of shape (in, out) is known by its Gram, which is then as large as its first side",
            "the Grams are supplied; estimating them is the caller's",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """Weights must not all be 0."""
        if not any(w > 0.0 for w in params["weight"]):
            return [f"no weight is above 0; expected a sum above 0; got {list(params['weight'])}"]
        return []

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged weight: `deltas` are the models' weights, then their Grams."""
        import torch

        weights, grams = _dense(deltas[: spec.num_models]), _dense(deltas[spec.num_models :])
        transposed = _orientation(spec, grams)
        c = [w / sum(spec.params["weight"]) for w in spec.params["weight"]]
        alpha = spec.params["alpha"]
        size = grams[0].shape[0]
        total = torch.zeros(size, size, dtype=torch.float64, device=grams[0].device)
        right = torch.zeros(size, min_other(spec, transposed), dtype=torch.float64, device=grams[0].device)
        for w, g, ct in zip(weights, grams, c, strict=True):
            if ct == 0.0:
                continue
            shrunk = _shrink(_symmetric(spec, g), alpha) * ct
            total += shrunk
            right += shrunk @ (w if transposed else w.T).to(torch.float64)
        if spec.params["ridge"]:
            total.diagonal().add_(spec.params["ridge"] * total.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(total)
        diagonal = factor.diagonal()
        if int(info) or float(diagonal.min()) <= 1e-7 * float(diagonal.max()):
            raise DataError(
                "the sum of the Grams is singular",
                code="gram.singular",
                tensor=spec.name or None,
                expected="a positive definite matrix",
                hint="Use more inputs than columns, alpha below 1, or a ridge of 1e-6.",
            )
        solved = torch.cholesky_solve(right, factor)
        condition = float(diagonal.max() / diagonal.min()) ** 2
        result = (solved if transposed else solved.T).to(weights[0].dtype)
        return Merged(result, {"condition": condition, "route": "cholesky"})

    def merge_plain(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The weighted mean."""
        import torch

        models = _dense(deltas[: spec.num_models])
        weights = spec.params["weight"]
        total = sum(weights)
        result = torch.zeros_like(models[0], dtype=torch.float64)
        for model, weight in zip(models, weights, strict=True):
            result += model.to(torch.float64) * (weight / total)
        return Merged(result.to(models[0].dtype), {"route": "mean"})


def min_other(spec: MatrixSpec, transposed: bool) -> int:
    """The side of the weight that has no Gram."""
    return spec.shape[1] if transposed else spec.shape[0]


def _dense(matrices: Sequence[Delta]) -> list[torch.Tensor]:
    from ...adapters.model import Factors

    return [x.dense() if isinstance(x, Factors) else x for x in matrices]


def _orientation(spec: MatrixSpec, grams: Sequence[torch.Tensor]) -> bool:
    """Whether the weight is (in, out): its Grams are as large as its first side. Refuse those that fit neither."""
    m, n = spec.shape
    for t, g in enumerate(grams):
        side = tuple(g.shape)
        if side not in ((n, n), (m, m)) or side != tuple(grams[0].shape):
            raise ArgumentError(
                f"gram {t} does not fit the weight",
                code="gram.shape",
                tensor=spec.name or None,
                expected=f"({n}, {n}), or ({m}, {m}) for a weight of shape (in, out); the same for all models",
                got=str(side),
            )
    return int(grams[0].shape[0]) != n


def _symmetric(spec: MatrixSpec, g: torch.Tensor) -> torch.Tensor:
    import torch

    wide = g.to(torch.float64)
    scale = float(wide.abs().max())
    if float((wide - wide.T).abs().max()) > 1e-3 * scale or float(wide.diagonal().min()) < 0.0:
        raise DataError(
            "a Gram is not symmetric with a diagonal of at least 0",
            code="gram.symmetric",
            tensor=spec.name or None,
            expected="X^T X of the layer's inputs",
        )
    return (wide + wide.T) / 2


def _shrink(g: torch.Tensor, alpha: float) -> torch.Tensor:
    """Alpha g + (1 - alpha) diag(g)."""
    diagonal = g.diagonal().clone()
    shrunk = g * alpha
    shrunk.diagonal().copy_(diagonal)
    return shrunk
