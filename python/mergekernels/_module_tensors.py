"""The tensors of live modules by name: which are merged, which are tied, whether several modules fit together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._entries import same_names
from .errors import ArgumentError, InputError, MergeError, PlanError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Named", "is_dtensor", "refuse_overlap", "same_module", "tensors_of", "under_names_of"]


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


def refuse_overlap(target: Named, inputs: Iterable[Named]) -> None:
    """Refuse to write into tensors of a module some memory of which is read, or written, under another name.

    Views of different shapes are not seen as tied; a merge in place would read there what it has already written.

    Raises
    ------
    ArgumentError
    """
    everything = [(name, True, tensor) for name, tensor in target.tensors.items()]
    everything += [(name, False, given[name]) for given in inputs for name in target.tensors]
    spans = [(span, name, written, t) for name, written, t in everything if (span := _span(t)) is not None]
    spans.sort(key=lambda entry: entry[0])
    near: list[Any] = []
    for entry in spans:
        (device, start, _), name, written, tensor = entry
        near = [(span, *rest) for span, *rest in near if span[0] == device and span[2] > start]
        for _, other, other_written, held in near:
            if other != name and (written or other_written) and _meet(tensor, held):
                raise ArgumentError(
                    f"'{other}' lies in the same memory, with another shape or in another model",
                    code="module.overlap",
                    tensor=name,
                    expected="tensors that are tied as a whole, or memory of their own",
                    hint="Without out= the result is a new module.",
                )
        near.append(entry)


def _span(tensor: Any) -> tuple[str, int, int] | None:
    """Device and range of addresses."""
    if is_dtensor(tensor):
        tensor = tensor.to_local()
    if not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()


def _meet(one: Any, two: Any) -> bool:
    """Whether two tensors whose ranges of addresses meet have elements in common: columns of a matrix have none."""
    import torch

    one, two = (t.to_local() if is_dtensor(t) else t for t in (one, two))
    size = one.element_size()
    if size != two.element_size() or (one.data_ptr() - two.data_ptr()) % size:
        return True
    first = min(one.data_ptr(), two.data_ptr())
    offsets = [(t.data_ptr() - first) // size for t in (one, two)]
    total = max((e[2] - first) // size for e in map(_span, (one, two)) if e is not None)
    seen = torch.zeros(total, dtype=torch.bool)
    seen.as_strided(one.shape, one.stride(), offsets[0]).fill_(True)
    return bool(seen.as_strided(two.shape, two.stride(), offsets[1]).any())


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    import torch

    if is_dtensor(one) or is_dtensor(two):
        return False
    return one.dtype == two.dtype and torch.equal(one.detach(), two.detach().to(one.device))
