"""DARE: random masks on task vectors, then a sum, a mean or TIES."""

from __future__ import annotations

from typing import Any

import torch
from fusion_bench.method.dare import DareSimpleAverage as TheirSimpleAverage
from fusion_bench.method.dare import DareTaskArithmetic as TheirTaskArithmetic
from fusion_bench.method.dare import DareTiesMerging as TheirTies

from ...merging import merge
from .arithmetic import added, dropped, summed, ties
from .pool import as_pool, loaded, names_of_linear_weights
from .ties import restored

__all__ = ["DareSimpleAverage", "DareTIES", "DareTaskArithmetic"]

_STEP = 0x9E3779B97F4A7C15


class _Seeded:
    """The seed of the masks."""

    seed: int | None = None

    def __init__(self, *args: Any, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def drawn_seed(self) -> int:
        """The seed that was given, or one from torch's global generator, so that `torch.manual_seed` decides."""
        return int(torch.randint(2**62, ())) if self.seed is None else self.seed


def _checked(sparsity: float) -> float:
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity_ratio is {sparsity}; expected 0 to 1")
    return float(sparsity)


class DareTaskArithmetic(_Seeded, TheirTaskArithmetic):  # type: ignore[misc]
    """FusionBench's DareTaskArithmetic; parameters as there, and `seed` of the masks. Models are not changed."""

    _config_mapping = TheirTaskArithmetic._config_mapping | {"seed": "seed"}

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        """The pretrained model with `scaling_factor` times the sum of the masked task vectors."""
        return _task_arithmetic(self, modelpool, self.scaling_factor)


class DareSimpleAverage(_Seeded, TheirSimpleAverage):  # type: ignore[misc]
    """FusionBench's DareSimpleAverage; parameters as there, and `seed` of the masks. Models are not changed."""

    _config_mapping = TheirSimpleAverage._config_mapping | {"seed": "seed"}

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        """The pretrained model with the mean of the masked task vectors."""
        self.only_on_linear_weights = self.only_on_linear_weight
        return _task_arithmetic(self, modelpool, 1 / len(as_pool(modelpool)))


def _task_arithmetic(algorithm: Any, modelpool: Any, scale: float) -> Any:
    """Trainable parameters only, as FusionBench."""
    pool, sparsity = as_pool(modelpool), _checked(algorithm.sparsity_ratio)
    pretrained = pool.load_pretrained_model()
    models = [pool.load_model(name) for name in pool.model_names]
    seed = algorithm.drawn_seed()
    linear = names_of_linear_weights(models[0]) if algorithm.only_on_linear_weights else None
    for name, parameter in models[0].named_parameters():
        if not parameter.requires_grad:
            continue
        target = pretrained.get_parameter(name).data
        tensors = [m.get_parameter(name).data for m in models]
        options: dict[str, Any] = {"base": target, "weights": 1.0, "scale": float(scale), "name": name}
        if linear is not None and name not in linear:
            merged = merge(tensors, "task_arithmetic", nan="propagate", out_dtype=target.dtype, **options)
        else:
            options |= {"density": 1.0 - sparsity, "rescale": bool(algorithm.rescale), "dialect": "paper"}
            merged = merge(tensors, "dare_linear", seed=seed, nan="propagate", out_dtype=target.dtype, **options)
        target.copy_(merged)
    return pretrained


class DareTIES(_Seeded, TheirTies):  # type: ignore[misc]
    """FusionBench's DareTiesMerging; parameters as there, and `seed` of the masks. Buffers count as differences."""

    _config_mapping = TheirTies._config_mapping | {"seed": "seed"}

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        """The pretrained model with `scaling_factor` times the TIES merge of the masked task vectors."""
        pool, sparsity = as_pool(modelpool), _checked(self.sparsity_ratio)
        pretrained = pool.load_pretrained_model()
        base, removed = pretrained.state_dict(), set(self.remove_keys or [])
        kept = {k: v for k, v in base.items() if k not in removed}
        masked = names_of_linear_weights(pretrained)
        if not self.only_on_linear_weights:
            masked = {k for k, _ in pretrained.named_parameters(remove_duplicate=False)}
        vectors, seed = [], self.drawn_seed()
        for t, name in enumerate(pool.model_names):
            vector, _ = summed([pool.load_model(name).state_dict()], kept)
            own = (seed + t * _STEP) % 2**64
            for key in masked & vector.keys():
                vector[key] = dropped(vector[key], sparsity, bool(self.rescale), own, key)
            vectors.append(vector)
        zero = {k: v.new_zeros(()).expand(v.shape) for k, v in vectors[0].items()}
        merged = ties(vectors, zero, self.threshold, self.merge_func, 1.0)
        result = added(kept, merged, self.scaling_factor)
        return loaded(pretrained, restored(result, base))
