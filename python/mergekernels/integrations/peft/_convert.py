"""`save_as_lora` and `convert_to_lora`: the factors of one layer's update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._hooks import NotServed
from ._layers import module_of, plain_tensor

if TYPE_CHECKING:
    from .._integration import Integration
    from ._options import Options

__all__ = ["Converting"]


class Converting:
    """In place of `_convert_module_to_lora`."""

    def __init__(self, state: Integration[Options]) -> None:
        self._served = state.served("convert_to_lora", _convert)

    def make(self, original: Any) -> Any:
        """Ours, which `torch.compile` leaves as it is."""
        import torch

        return torch.compiler.disable(self._served(original))  # type: ignore[no-untyped-call]


def _convert(module: Any, rank: Any, adapter_name: str = "default") -> tuple[Any, Any, int]:
    import torch

    from ...ops.spectral.lowrank import lowrank

    if type(module).__name__ == "MissLinear":
        raise NotServed("MiSS, whose factors PEFT knows")
    share = None if isinstance(rank, int) else rank
    if isinstance(rank, bool) or (share is not None and not (isinstance(share, float) and 0.0 < share < 1.0)):
        raise NotServed("a rank that is neither a number of rows nor a share below 1")
    base = module.get_base_layer()
    flipped = type(base).__name__ == "Conv1D"
    with torch.no_grad():
        found: Any = _product(module, adapter_name)
        dtype = found[1] if found is not None else None
        if found is not None:
            delta = found[0]
        else:
            delta = module.get_delta_weight(adapter_name)
            if not plain_tensor(delta) or delta.ndim != 2:
                raise NotServed("an update that is no plain matrix of floats")
            dtype = delta.dtype
            # As PEFT, what a transposed base stores is (in, out); the singular values go where PEFT puts them.
            delta = delta.float()
        if share is None and not 1 <= rank <= min(delta.shape):
            raise NotServed("a rank beyond the layer's")
        cut = lowrank(delta, None if share is not None else rank, share).factors
        effective = cut.rank if share is not None else rank
        lacking = effective - cut.rank
        b = torch.cat([cut.b, cut.b.new_zeros(cut.b.shape[0], lacking)], 1).to(dtype)
        a = torch.cat([cut.a, cut.a.new_zeros(lacking, cut.a.shape[1])], 0).to(dtype)
    if flipped and found is None:
        return b.T.contiguous(), a.T.contiguous(), effective
    return a.contiguous(), b.contiguous(), effective


def _product(module: Any, adapter: str) -> Any:
    """(Factors, their dtype) of a LoRA layer, None of anything else."""
    if not hasattr(module, "lora_embedding_A") or adapter not in module.lora_A:
        return None
    transposed = type(module.get_base_layer()).__name__ == "Conv1D"
    if type(module).__name__ != "Linear" or bool(module.fan_in_fan_out) is not transposed:
        return None
    try:
        found = module_of(module, adapter, "")
    except NotServed:
        return None
    return None if found is None else (found.factors(), module.lora_B[adapter].weight.dtype)
