"""TIES over whole models, without stacking flattened copies of them."""

from __future__ import annotations

from typing import Any

import torch
from fusion_bench.compat.modelpool import to_modelpool
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm

from .arithmetic import ties
from .pool import loaded

__all__ = ["TIES", "restored"]

_SHARED = "transformer.shared.weight"


class TIES(TiesMergingAlgorithm):  # type: ignore[misc]
    """FusionBench's TiesMergingAlgorithm; parameters as there. A threshold of 1 keeps everything."""

    @torch.no_grad()
    def run(self, modelpool: Any, **kwargs: Any) -> Any:
        """The pretrained model with `scaling_factor` times the merged task vectors."""
        pool = to_modelpool(modelpool)
        pretrained = pool.load_model("_pretrained_")
        removed = set(self.config.get("remove_keys", []) or [])
        base = pretrained.state_dict()
        kept = {k: base[k] for k in base.keys() if k not in removed}  # noqa: SIM118
        models = [pool.load_model(name).state_dict() for name in pool.model_names]
        models = [{k: m[k] for k in kept} for m in models]
        merged = ties(models, kept, self.threshold, self.config.get("merge_func", "sum"), self.scaling_factor)
        return loaded(pretrained, restored(merged, base))


def restored(merged: dict[str, torch.Tensor], base: Any) -> dict[str, torch.Tensor]:
    """The keys that took no part: what they share with a T5's embeddings, else as they were."""
    return {k: merged[k] if k in merged else merged.get(_SHARED, base[k]) for k in base.keys()}  # noqa: SIM118
