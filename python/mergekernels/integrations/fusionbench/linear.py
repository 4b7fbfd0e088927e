"""Simple average and task arithmetic: one model in memory at a time, sums in float32, one rounding."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.task_arithmetic.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.models.utils import get_target_state_dict, load_state_dict_into_target_modules
from torch import nn

from .arithmetic import added, mean, summed
from .pool import as_pool, loaded

__all__ = ["SimpleAverage", "TaskArithmetic"]


class SimpleAverage(SimpleAverageAlgorithm):  # type: ignore[misc]
    """FusionBench's SimpleAverageAlgorithm; parameters as there."""

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        """The first model of the pool (a copy unless `inplace`) with the mean of all models."""
        pool = as_pool(modelpool)
        first = pool.load_model(pool.model_names[0])
        target = get_target_state_dict(first)

        def models() -> Any:
            yield target
            for name in pool.model_names[1:]:
                yield get_target_state_dict(pool.load_model(name))

        total, count = summed(models())
        merged = mean(total, count, target)
        if not isinstance(first, nn.Module):
            return loaded(first, merged)
        model = first if self.inplace else deepcopy(first)
        result = load_state_dict_into_target_modules(model, merged, strict=False)
        if result.unexpected_keys:
            raise ValueError(f"Unexpected keys in the merged state dict: {result.unexpected_keys}")
        return model


class TaskArithmetic(TaskArithmeticAlgorithm):  # type: ignore[misc]
    """FusionBench's TaskArithmeticAlgorithm; parameters as there."""

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        """The pretrained model (a copy unless `inplace`) with `scaling_factor` times the sum of the task vectors."""
        pool = as_pool(modelpool)
        pretrained = pool.load_model("_pretrained_")
        base = pretrained.state_dict()
        total, _ = summed((pool.load_model(name).state_dict() for name in pool.model_names), base)
        merged = added(base, total, self.scaling_factor)
        return loaded(pretrained if self.inplace else deepcopy(pretrained), merged)
