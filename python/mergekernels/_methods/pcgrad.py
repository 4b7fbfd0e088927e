"""pcgrad: gradient surgery, of gradients or of task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from ..ops.surgery import projected, random_order
from .gram import Combine, Rule, symmetric
from .protocol import MethodInfo, Param, Spec

__all__ = ["Pcgrad"]


class Pcgrad(Combine):
    """Each vector minus its projections onto those that it conflicts with, summed or averaged."""

    info = MethodInfo(
        name="pcgrad",
        purpose="Remove from each gradient or task vector what conflicts with the others, then add them (PCGrad).",
        formula="for each i: h = vi, and for the j != i in order: if <h, vj> < 0: h = h - <h, vj> / |vj|^2 vj; y = sum "
        "(or mean) of the h; vt = xt, or with a base vt = xt - x0 and y + x0",
        params=(
            Param(
                "order",
                "str",
                "order in which vector i meets the others: by Philox words of the seed, or by number",
                default="random",
                choices=("random", "fixed"),
            ),
            Param("reduction", "str", "what becomes of the projected vectors", default="sum", choices=("sum", "mean")),
            Param("scope", "str", "over what dot products are taken", default="model", choices=("model", "tensor")),
        ),
        base="optional",
        passes="2 reads of every tensor, 1 write",
        source="Yu et al. 2020, Gradient Surgery for Multi-Task Learning, arXiv 2001.06782; tianheyu927/PCGrad; "
        "WeiChengTseng/Pytorch-PCGrad",
        dialects={"default": "the paper's algorithm; a vector never meets itself"},
        deviations=(
            "both public codes also project a vector onto itself, and the original discards its shuffle; here j != i, "
            "and the order is random as in the paper",
            "the PyTorch port averages where it is asked for a sum; here a sum is a sum",
            "a zero vector is never projected onto; the original divides 0 by 0",
        ),
        tier="T1",
        modifiable=True,
    )

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """The scope asked for."""
        return cast(Literal["tensor", "model"], params["scope"])

    def rule(self, spec: Spec) -> Rule:
        """The coefficients of the sum of all projected vectors."""
        # In scope "model" all tensors share one order, so no tensor's own number enters it.
        tensor = spec.tensor if spec.params["scope"] == "tensor" else 0
        order = random_order(spec.num_models, spec.seed, tensor) if spec.params["order"] == "random" else None
        mean = spec.params["reduction"] == "mean"

        def rule(entries: Sequence[float]) -> Sequence[float]:
            total = projected(symmetric(entries, spec.num_models), order)
            return [x / spec.num_models for x in total] if mean else total

        return rule
