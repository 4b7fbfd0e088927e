"""TSV-M, Iso-C and Iso-CTS: without full decompositions, on the support of the task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fusion_bench.method.isotropic_merging.iso import (
    IsotropicMergingInCommonAndTaskSubspace,
    IsotropicMergingInCommonSubspace,
)
from fusion_bench.method.task_singular_vector.TSVM import TaskSingularVectorMerging

from ...merging import merge
from .arithmetic import added, summed
from .pool import loaded

__all__ = ["TSVM", "IsoC", "IsoCTS"]


class TSVM(TaskSingularVectorMerging):  # type: ignore[misc]
    """FusionBench's TaskSingularVectorMerging; parameters as there."""

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        """The pretrained model with `alpha` times the merged task vectors; a list of alphas weighs each beforehand.

        With `return_single_task_models`, FusionBench's own run.
        """
        if self.return_single_task_models:
            return super().run(modelpool)
        names = modelpool.model_names
        one = self.alpha is None or isinstance(self.alpha, (int, float))
        weights = [1.0] * len(names) if one else [float(a) for a in self.alpha]
        if len(weights) != len(names):
            raise ValueError(f"alpha has {len(weights)} values for {len(names)} models")
        scale = float(self.alpha) if one and self.alpha is not None else 1.0
        return _run(self, modelpool, "tsv_m", scale, weights)


class IsoC(IsotropicMergingInCommonSubspace):  # type: ignore[misc]
    """FusionBench's IsotropicMergingInCommonSubspace (ISO_C_Merge); parameters as there."""

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        """The pretrained model with `scaling_factor` times the merged task vectors."""
        return _run(self, modelpool, "iso_c", float(self.scaling_factor))


class IsoCTS(IsotropicMergingInCommonAndTaskSubspace):  # type: ignore[misc]
    """FusionBench's IsotropicMergingInCommonAndTaskSubspace (ISO_CTS_Merge); parameters as there."""

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        """The pretrained model with `scaling_factor` times the merged task vectors."""
        fraction = float(self.common_space_fraction)
        return _run(self, modelpool, "iso_cts", float(self.scaling_factor), common_space_fraction=fraction)


def _run(
    algorithm: Any, modelpool: Any, method: str, scale: float, weights: Sequence[float] | None = None, **options: Any
) -> Any:
    """Matrices by `method` on the algorithm's device, everything else by the mean of the task vectors."""
    pretrained = modelpool.load_pretrained_model()
    base = pretrained.state_dict()
    models = [modelpool.load_model(name).state_dict() for name in modelpool.model_names]
    weights = [1.0] * len(models) if weights is None else weights
    excluded = set(algorithm.exclude_keys or [])
    merged: dict[str, torch.Tensor] = {}
    for key in base.keys():  # noqa: SIM118
        value = base[key]
        tensors = [m[key] for m in models]
        if value.dim() == 2 and value.is_floating_point() and key not in excluded:
            device = algorithm.fabric.device
            moved = [t.to(device) for t in tensors]
            below = value.to(device)
            if method == "tsv_m" and min(value.shape) < len(models):
                merged[key] = value  # not one direction per task: FusionBench keeps none
                continue
            result = merge(
                moved, method, base=below, name=key, scale=scale, weights=weights, out_dtype=value.dtype, **options
            )
            merged[key] = result.to(value.device)
        else:
            merged |= _mean_added(key, value, tensors, weights, scale)
    return loaded(pretrained, merged)


def _mean_added(
    key: str, value: torch.Tensor, tensors: Sequence[torch.Tensor], weights: Sequence[float], scale: float
) -> Mapping[str, torch.Tensor]:
    base = {key: value}
    if value.is_floating_point():
        share = [w / len(tensors) for w in weights]
        found = merge(
            tensors,
            "task_arithmetic",
            base=value,
            name=key,
            weights=share,
            scale=scale,
            nan="propagate",
            out_dtype=value.dtype,
        )
        return {key: found}
    total, count = summed([{key: t} for t in tensors], base)
    return added(base, total, scale / count)
