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
        matrix = weight.data.reshape(expected)
        with torch.no_grad():
            merged = _sum(matrix.T if flipped else matrix, modules)
            merged = (merged.T.contiguous() if flipped else merged).reshape(weight.shape)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise NotServed("a result that is not finite, of which PEFT says whose it is")
            if safe_merge:
                weight.data = merged
            else:
                weight.data.copy_(merged)
        layer.merged_adapters.extend(names)


def _sum(matrix: torch.Tensor, modules: list[Any]) -> torch.Tensor:
    """The matrix plus all products, each value rounded once to the matrix's dtype."""
    import torch

    factors = [m.factors() for m in modules]
    wide = torch.float64 if torch.float64 in {matrix.dtype, *(f.b.dtype for f in factors)} else torch.float32
    b = torch.cat([f.b.to(wide) for f in factors], 1)
    a = torch.cat([f.a.to(wide) for f in factors], 0)
    out = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    step = max(1, _ROWS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        part = slice(start, start + step)
        out[part] = torch.addmm(matrix[part].to(wide), b[part], a)
    return out
