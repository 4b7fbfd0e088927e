"""RegMean: FusionBench's Grams of inputs, solved in float64."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from fusion_bench.method.regmean import RegMeanAlgorithm, RegMeanAlgorithmForCLIP, RegMeanAlgorithmForGPT2
from fusion_bench.method.regmean.utils import get_modules_to_merge, get_param_names_to_merge

from .functions import regmean_parameter
from .pool import as_pool

__all__ = ["RegMean", "RegMeanForCLIP", "RegMeanForGPT2"]


class _Solved:
    """The run that all three share."""

    def run(self: Any, modelpool: Any, **kwargs: Any) -> Any:
        """The pretrained model with the merged parameters; what cannot be averaged stays as it was."""
        self.modelpool = pool = as_pool(modelpool)
        self.on_regmean_start()
        parameters: dict[str, list[torch.Tensor]] = defaultdict(list)
        grams: list[dict[str, torch.Tensor]] = []
        with torch.no_grad():
            for name, model in pool.named_models():
                values = model.state_dict()
                excluded = self.config.get("exclude_param_names_regex", [])
                for key in get_param_names_to_merge(list(values), excluded):
                    parameters[key].append(values[key])
                layers = get_modules_to_merge(model=model, include_module_types=self._include_module_type)
                if not layers:
                    raise ValueError(f"model '{name}' has no layer of {self._include_module_type}")
                data = pool.load_train_dataset(name)
                grams.append(self.get_regmean_weights(name, model, data, layers))
            ratio, transposed = float(self.reduce_non_diagonal_ratio), self.config.get("weight_transpose", True)
            merged = {
                key: regmean_parameter(values, grams, key, ratio, transposed)
                for key, values in parameters.items()
                if values[0].is_floating_point()
            }
            model = pool.load_model("_pretrained_")
            model.load_state_dict(merged, strict=False)
        return model


class RegMean(_Solved, RegMeanAlgorithm):  # type: ignore[misc]
    """FusionBench's RegMeanAlgorithm, for subclasses that compute Grams; parameters as there."""


class RegMeanForCLIP(_Solved, RegMeanAlgorithmForCLIP):  # type: ignore[misc]
    """FusionBench's RegMeanAlgorithmForCLIP; parameters as there."""


class RegMeanForGPT2(_Solved, RegMeanAlgorithmForGPT2):  # type: ignore[misc]
    """FusionBench's RegMeanAlgorithmForGPT2; parameters as there."""
