"""Checks of tensors handed to the library, and the wording of what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, DataError
from .tensors import dtype_of

if TYPE_CHECKING:
    import torch

    from .ops.selection import Scope

__all__ = ["check_out", "check_tensor", "nonfinite", "refuse_unequal", "split"]


def check_tensor(tensor: Any, what: str, name: str) -> torch.Tensor:
    """A dense, strided float tensor that kernels can read, without its autograd history."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{what} is not a tensor", code="tensor.type", tensor=name, got=type(tensor).__name__)
    if type(tensor).__name__ == "DTensor":
        raise ArgumentError(
            f"{what} is a DTensor",
            code="tensor.dtensor",
            tensor=name,
            expected="plain tensors, or lists of row or column shards",
            hint="Pass the local shards as a list.",
        )
    kind = _why_no_memory(tensor)
    if kind is not None:
        raise ArgumentError(
            f"{what} has no plain memory", code="tensor.layout", tensor=name, expected="dense", got=kind
        )
    dtype = dtype_of(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or not dtype.is_float:
        raise ArgumentError(
            f"{what} has a dtype that cannot be merged",
            code="tensor.dtype",
            tensor=name,
            expected="bfloat16, float16, float32 or float64",
            got=str(tensor.dtype),
        )
    plain = tensor.detach()
    if plain.is_neg() or plain.is_conj():
        plain = plain.resolve_neg().resolve_conj()
    if plain.data_ptr() % plain.element_size():
        raise ArgumentError(
            f"{what} is not aligned to its dtype",
            code="tensor.alignment",
            tensor=name,
            expected=f"an address that is a multiple of {plain.element_size()}",
            hint="Copy it first.",
        )
    return plain


def _why_no_memory(tensor: torch.Tensor) -> str | None:
    import torch

    if tensor.is_meta:
        return "a meta tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    try:
        tensor.detach().data_ptr()
    except RuntimeError:  # traced, batched and fake tensors
        kind = type(tensor).__name__
        return "a tensor inside a transform such as torch.func.grad" if kind == "Tensor" else kind
    return None


def refuse_unequal(labels: Sequence[str], values: Sequence[Any], what: str, name: str) -> None:
    """Refuse inputs whose shape or device differs from the first one's."""
    for label, value in zip(labels, values, strict=True):
        if value != values[0]:
            raise ArgumentError(
                f"{what} of {label} differs from that of {labels[0]}",
                code=f"tensor.{what}",
                tensor=name,
                expected=str(_plain(values[0])),
                got=str(_plain(value)),
            )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (tuple, list)) else value


def split(value: Any, cuts: Sequence[int] | None, dim: int, what: str, name: str) -> list[torch.Tensor]:
    """The shards of an input: a list as it is, a whole tensor cut at `cuts` along `dim`."""
    if isinstance(value, (list, tuple)):
        shards = [check_tensor(t, f"shard {i} of {what}", name) for i, t in enumerate(value)]
        if not shards:
            raise ArgumentError(f"{what} is an empty list of shards", code="shards.empty", tensor=name)
        for i, shard in enumerate(shards):
            if shard.ndim <= dim:
                raise ArgumentError(
                    f"shard {i} of {what} has too few dimensions to be cut along dimension {dim}",
                    code="shards.dimension",
                    tensor=name,
                    got=str(tuple(shard.shape)),
                )
        sizes = [s.shape[dim] for s in shards]
        if cuts is not None and sizes != list(cuts):
            raise ArgumentError(
                f"{what} is cut into other shards than the first sharded input",
                code="shards.cuts",
                tensor=name,
                expected=f"sizes {list(cuts)} along dimension {dim}",
                got=str(sizes),
            )
        return shards
    whole = check_tensor(value, what, name)
    if cuts is None:
        return [whole]
    if whole.ndim <= dim or whole.shape[dim] != sum(cuts):
        raise ArgumentError(
            f"{what} cannot be cut like the sharded inputs",
            code="shards.cuts",
            tensor=name,
            expected=f"{sum(cuts)} along dimension {dim}",
            got=str(tuple(whole.shape)),
        )
    return list(whole.split(list(cuts), dim))  # type: ignore[no-untyped-call]


def check_out(
    out: Any,
    like: torch.Tensor,
    dtype: torch.dtype,
    inputs: Sequence[torch.Tensor],
    name: str,
    others: Sequence[torch.Tensor] = (),
) -> None:
    """Refuse an output that does not fit or whose memory is also something else's.

    inputs : of the same shard, one of which `out` may be exactly. others : memory that it must not touch.
    """
    import torch

    if not isinstance(out, torch.Tensor):
        raise ArgumentError("out is not a tensor", code="out", tensor=name, got=type(out).__name__)
    kind = _why_no_memory(out)
    if kind is None and (out.is_neg() or out.is_conj()):
        kind = "a view that negates its memory"
    if kind is not None:
        raise ArgumentError("out has no plain memory", code="out", tensor=name, expected="dense", got=kind)
    if out.shape != like.shape or out.dtype != dtype or out.device != like.device:
        raise ArgumentError(
            "out does not fit the result",
            code="out",
            tensor=name,
            expected=f"{tuple(like.shape)} {dtype} on {like.device}",
            got=f"{tuple(out.shape)} {out.dtype} on {out.device}",
        )
    if out.requires_grad:
        raise ArgumentError("out requires grad, and no gradient flows through a merge", code="out", tensor=name)
    extent = 1
    for stride, size in sorted((st, si) for st, si in zip(out.stride(), out.shape, strict=True) if si > 1):
        if stride < extent:
            raise ArgumentError(
                "out has elements that share memory", code="out", tensor=name, got=f"strides {tuple(out.stride())}"
            )
        extent += (size - 1) * stride
    for x in (*inputs, *others):
        same = x.data_ptr() == out.data_ptr() and x.stride() == out.stride() and x.dtype == out.dtype
        if _overlap(x, out) and not (same and any(x is y for y in inputs)):
            raise ArgumentError(
                "out and another tensor of the call lie in one range of memory",
                code="out",
                tensor=name,
                expected="memory of its own, or exactly one input (of the same shard)",
            )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    start_a, end_a = _extent(a)
    start_b, end_b = _extent(b)
    return start_a < end_b and start_b < end_a


def _extent(t: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def nonfinite(
    source: str, first: int, count: int, scope: Scope, names: Sequence[str], *, output: bool = False
) -> DataError:
    """The error for NaN or Inf in the data; `first` is a scope index. names : of the scope's tensors, in order."""
    position = max(i for i, offset in enumerate(scope.offsets) if offset <= first)
    what = "the result overflows its dtype, or is NaN" if output else f"{source} holds NaN or Inf"
    return DataError(
        f"{what} at flat index {first - scope.offsets[position]} ({count} in all)",
        code="data.overflow" if output else "data.nonfinite",
        tensor=names[position] or None,
        hint="Use a wider output dtype." if output else 'Repair the input, or say nan="propagate".',
    )
