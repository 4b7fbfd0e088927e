"""`merge` of LoRA layers: several adapters into the base's weight with one product and one rounding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .._hooks import NotServed
from ._layers import module_of, plain_tensor, slot_of

if TYPE_CHECKING:
    import torch

    from .._integration import Integration
    from ._options import Options

__all__ = ["Folding"]

_ROWS = 1 << 22
"""Entries of a weight that are computed at a time."""


class Folding:
    """In place of `merge` of the layer classes."""

    def __init__(self, state: Integration[Options], options: Options) -> None:
        self._options = options
        self.make = state.served("merge", self._merge)

    def _merge(self, layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        import torch

        check = importlib.import_module("peft.tuners.tuners_utils").check_adapters_to_merge
        if self._options.exact:
            raise NotServed("dialect peft: adapter by adapter")
        asked = layer.active_adapters if adapter_names is None else adapter_names
        names = [n for n in dict.fromkeys(asked) if n not in layer.merged_adapters and slot_of(layer, n) is not None]
        if len(names) < 2:
            raise NotServed("fewer than two adapters at once")
        if any(layer.lora_bias.get(n) for n in names):
            raise NotServed("lora_bias")
        base = layer.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        if not plain_tensor(weight):
            raise NotServed("a base weight that is no plain tensor of floats")
        modules = [m for n in names if (m := module_of(layer, n, "")) is not None]
        rows, columns = modules[0].site.shape
        flipped = bool(getattr(layer, "fan_in_fan_out", False)) or type(layer).__name__ == "Embedding"
        expected = (columns, rows) if flipped else (rows, columns)
        if any(m.site.shape != (rows, columns) for m in modules) or weight.numel() != rows * columns:
            raise NotServed("factors that do not fit the weight")
        if (weight.ndim == 2 and tuple(weight.shape) != expected) or (weight.ndim > 2 and flipped):
            raise NotServed("factors that do not fit the weight")
        if any(b.device != weight.device for m in modules for b in m.load()):
            raise NotServed("factors on another device than the weight")
        check(layer, adapter_names)  # warns of adapters that are merged already
        with torch.no_grad():
            left, right, wide = _product(modules)
            if flipped:
                left, right = right.T, left.T
            target = weight.data if not safe_merge else torch.empty_like(weight.data)
            try:
                out = target.view(expected)
            except RuntimeError:  # strides of a convolution's weight that is not contiguous
                raise NotServed("a weight whose rows are not in one piece") from None
            _add(weight.data.view(expected), left, right, out, wide)
            if safe_merge:
                if not bool(torch.isfinite(target).all()):
                    raise NotServed("a result that is not finite, of which PEFT says whose it is")
                weight.data = target
        layer.merged_adapters.extend(names)


def _product(modules: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """(B, A) of the sum of all products, and the dtype that they have."""
    import torch

    factors = [m.factors() for m in modules]
    wide = torch.float64 if any(f.b.dtype == torch.float64 for f in factors) else torch.float32
    return torch.cat([f.b.to(wide) for f in factors], 1), torch.cat([f.a.to(wide) for f in factors], 0), wide


def _add(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, wide: torch.dtype) -> None:
    """Writes weight + left @ right into `out` (which may be the weight), each value rounded once to its dtype."""
    import torch

    wide = torch.promote_types(wide, weight.dtype)
    left, right = left.to(wide), right.to(wide)
    if weight.dtype == wide:
        torch.addmm(weight, left, right, out=out)
        return
    step = max(1, _ROWS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        out[part] = torch.addmm(weight[part].to(wide), left[part], right)
