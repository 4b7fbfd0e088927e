"""The tensors of live modules by name: which are merged, which are tied, whether several modules fit together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._entries import same_names
from .errors import ArgumentError, InputError, MergeError, PlanError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Named", "is_dtensor", "same_module", "tensors_of", "under_names_of"]


@dataclass(frozen=True)
class Named:
    """The parameters and persistent buffers of one module.

    tensors : by name, tied ones under the name that comes first. first : every name -> the name in `tensors`.
    """

    label: str
    module: nn.Module
    tensors: dict[str, torch.Tensor]
    first: dict[str, str]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.first[name]]

    @property
    def ties(self) -> dict[str, list[str]]:
        """The name in `tensors` -> the other names of that tensor."""
        found: dict[str, list[str]] = {name: [] for name in self.tensors}
        for name, first in self.first.items():
            if name != first:
                found[first].append(name)
        return found


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is spread over a device mesh."""
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def tensors_of(module: Any, label: str) -> Named:
    """Read the names of a module; wrappers of DataParallel, DistributedDataParallel and torch.compile are left out.

    Raises
    ------
    ArgumentError, InputError, PlanError : no module, or tensors that have no plain values.
    """
    from torch import nn

    if not isinstance(module, nn.Module):
        raise ArgumentError(
            f"{label} is not a module",
            code="models.type",
            expected="torch.nn.Module",
            got=type(module).__name__,
            hint="merge_state_dicts takes state dicts, merge tensors.",
        )
    module = _unwrapped(module)
    for part in module.modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise ArgumentError(
                f"{label} is wrapped by FullyShardedDataParallel, whose flat parameters have no shapes",
                code="module.fsdp1",
                hint="Merge its full state dict with merge_state_dicts, or shard with fully_shard.",
            )
    tensors: dict[str, torch.Tensor] = {}
    first: dict[str, str] = {}
    seen: dict[Any, str] = {}
    problems: list[MergeError] = []
    for name, tensor in _named(module):
        problem = _refused(tensor, name, label)
        if problem is not None:
            problems.append(problem)
            continue
        first[name] = seen.setdefault(_memory(tensor), name)
        if first[name] == name:
            tensors[name] = tensor
    if problems:
        raise problems[0] if len(problems) == 1 else PlanError(problems)
    return Named(label, module, tensors, first)


def _unwrapped(module: nn.Module) -> nn.Module:
    from torch import nn

    while True:
        inner = getattr(module, "_orig_mod", None)  # of torch.compile
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers under all of their names, in the order of a state dict."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield dot + name, parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield dot + name, buffer


def _refused(tensor: torch.Tensor, name: str, label: str) -> MergeError | None:
    """Why a tensor cannot be read."""
    import torch
    from torch import nn

    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return ArgumentError(f"{label} is not initialised here", code="module.lazy", tensor=name, hint="Run it once.")
    if tensor.is_meta:
        return ArgumentError(
            f"{label} is on the meta device here: it has no values",
            code="module.meta",
            tensor=name,
            hint="Load it first; offloaded weights need their hooks removed.",
        )
    if is_dtensor(tensor):
        return None
    parameter = isinstance(tensor, nn.Parameter)
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        kind = f"a {type(tensor).__name__}"
    elif parameter and not tensor.is_floating_point():
        kind = f"a parameter of {tensor.dtype}"
    else:
        return None
    return ArgumentError(
        f"{label} holds {kind}, whose numbers are not the weight's",
        code="module.quantised",
        tensor=name,
        expected="a plain parameter of floats",
        hint="Dequantise the model first.",
    )


def _memory(tensor: torch.Tensor) -> Any:
    """What two tensors have in common exactly if they are tied."""
    if is_dtensor(tensor):
        local = tensor.to_local()  # type: ignore[attr-defined]
        return (tuple(tensor.shape), str(tensor.placements), *_memory(local)) if local.numel() else id(tensor)  # type: ignore[attr-defined]
    if not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def under_names_of(like: Named, given: Named) -> dict[str, torch.Tensor]:
    """The tensors of a module under the names of another one's; what that one ties must be equal here.

    Raises
    ------
    InputError : names or shapes differ, or tensors are not equal that the other ties.
    """
    same_module(like, given)
    found = {}
    for name, others in like.ties.items():
        tensor = given[name]
        for other in others:
            if given.first[other] != given.first[name] and not _equal(tensor, given[other]):
                raise InputError(
                    f"{like.label} ties '{other}' to this tensor, and {given.label} has other values there",
                    code="module.tied",
                    tensor=name,
                    expected="equal values",
                    hint="Untie them in the module that determines the result (out, else the base, else the first).",
                )
        found[name] = tensor
    return found


def same_module(like: Named, given: Named) -> None:
    """Refuse a module with other names, shapes or kinds of dtype.

    Raises
    ------
    InputError, PlanError
    """
    same_names([like.first, given.first], [like.label, given.label])
    problems: list[MergeError] = []
    for name in like.first:
        one, two = like[name], given[name]
        if one.shape != two.shape or one.is_floating_point() != two.is_floating_point():
            problems.append(
                InputError(
                    f"{given.label} does not fit {like.label}",
                    code="module.shape",
                    tensor=name,
                    expected=f"{tuple(one.shape)} {one.dtype}",
                    got=f"{tuple(two.shape)} {two.dtype}",
                )
            )
    if problems:
        raise problems[0] if len(problems) == 1 else PlanError(problems)


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    import torch

    if is_dtensor(one) or is_dtensor(two):
        return False
    return one.dtype == two.dtype and torch.equal(one.detach(), two.detach().to(one.device))
