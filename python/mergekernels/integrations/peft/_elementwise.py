"""The functions of `peft.utils.merge_utils` over lists of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._hooks import NotServed
from ._layers import plain_tensor

if TYPE_CHECKING:
    import torch

    from .._integration import Integration
    from ._options import Options

__all__ = ["FUNCTIONS", "elementwise"]

FUNCTIONS = ("task_arithmetic", "magnitude_prune", "dare_linear", "ties", "dare_ties")


def elementwise(state: Integration[Options], options: Options, name: str) -> Callable[[Any], Any]:
    """What takes the place of one of the functions, or of `prune`."""

    def combination(
        task_tensors: list[torch.Tensor],
        weights: torch.Tensor,
        density: float = 1.0,
        majority_sign_method: str = "total",
    ) -> torch.Tensor:
        vote = majority_sign_method if "ties" in name else "none"
        random = "dare" in name
        return _combined(task_tensors, weights, density, vote, random, options)

    def prune(tensor: torch.Tensor, density: float, method: str, rescale: bool = False) -> torch.Tensor:
        if method not in ("magnitude", "random") or (method == "random" and not rescale):
            raise NotServed("random pruning without rescaling" if method == "random" else "an unknown method")
        if density >= 1:
            raise NotServed("nothing is pruned")
        import torch

        one = torch.ones(1, dtype=tensor.dtype if isinstance(tensor, torch.Tensor) else None)
        return _combined([tensor], one, density, "none", method == "random", options)

    return state.served(name, prune if name == "prune" else combination)


def _combined(
    tensors: Sequence[Any], weights: Any, density: Any, vote: str, random: bool, options: Options
) -> torch.Tensor:
    import torch

    from ..._methods.adapters.elementwise import Rule, combine
    from ...ops.inputs import gather

    tensors = list(tensors)
    if not 1 <= len(tensors) <= 64 or not all(plain_tensor(t) for t in tensors):
        raise NotServed("no list of plain tensors of floats")
    first = tensors[0]
    if any(t.shape != first.shape or t.device != first.device or t.dtype != first.dtype for t in tensors):
        raise NotServed("tensors of unequal shapes, devices or dtypes")
    if not isinstance(weights, torch.Tensor) or weights.ndim != 1 or len(weights) != len(tensors):
        raise NotServed("weights that are not one number per tensor")
    if not weights.is_floating_point():
        raise NotServed("weights that are no floats")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, weights)):
        raise NotServed("a gradient is wanted")
    if not isinstance(density, (int, float)) or not density >= 0:
        raise NotServed("a density that is no number of at least 0")
    if random and density == 0:
        raise NotServed("density 0, by which PEFT divides")
    if vote not in ("none", "total", "frequency"):
        raise NotServed("an unknown majority_sign_method")
    if first.numel() == 0:
        raise NotServed("tensors without elements")
    numbers = [float(w) for w in weights.tolist()]
    if not all(abs(w) < 3e38 for w in numbers):
        raise NotServed("weights beyond float32")
    seed = options.seed if options.seed is not None else int(torch.randint(1 << 62, ())) if random else 0
    out = torch.empty(first.shape, dtype=torch.promote_types(first.dtype, weights.dtype), device=first.device)
    rule = Rule("random" if random else "magnitude", (min(float(density), 1.0),) * len(tensors), vote, seed=seed)  # type: ignore[arg-type]
    combine(gather(tensors, None, "", 0), [out], rule, tuple(numbers))
    return out
