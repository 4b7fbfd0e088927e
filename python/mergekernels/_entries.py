"""The entries of several state dicts: names that all must have, floats to be merged, integer buffers to be copied."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._checks import refuse_unequal
from .errors import ArgumentError, DataError, InputError
from .ops.inputs import check_name

__all__ = ["Entry", "are_mappings", "common_buffer", "is_float", "same_names"]

_log = logging.getLogger("mergekernels")


def are_mappings(everything: Sequence[Any], what: str = "state dict") -> None:
    """Refuse what has no names or no values."""
    for i, m in enumerate(everything):
        if not (hasattr(m, "keys") and hasattr(m, "__getitem__")):
            raise ArgumentError(f"{what} {i} is not a mapping", code="models.type", got=type(m).__name__)


@dataclass(frozen=True)
class Entry:
    """One entry of all state dicts, each read once."""

    name: str
    models: list[Any]
    base: Any
    companions: list[Any]

    @property
    def is_float(self) -> bool:
        """True if it is a tensor to be merged."""
        return is_float(self.models if self.base is None else [self.base, *self.models], self.name)


def same_names(everything: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Refuse state dicts that have different tensors."""
    union = {name for m in everything for name in m.keys()}  # noqa: SIM118 - keys() is all that is asked of a mapping
    for name in union:
        check_name(name)
    lacking = []
    for label, m in zip(labels, everything, strict=True):
        missing = sorted(union.difference(m.keys()))
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            lacking.append(f"{label} lacks {', '.join(missing[:5])}{more}")
    if lacking:
        raise InputError("the state dicts have different tensors: " + "; ".join(lacking), code="names")


def is_float(values: Sequence[Any], name: str) -> bool:
    """True if the tensor is to be merged, False if it is an integer or bool buffer; all inputs must agree on that."""
    import torch

    dtypes = []
    for value in values:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        dtypes.append(getattr(first, "dtype", None))
    merged = [d is None or d.is_floating_point or d.is_complex for d in dtypes]
    if any(merged) and not all(merged):
        raise InputError(
            "some inputs hold floats, others integers",
            code="tensor.dtype",
            tensor=name,
            expected="one kind of dtype",
            got=", ".join(str(d) for d in dtypes),
        )
    if merged[0]:
        return True  # dtypes that cannot be merged are refused where the tensors are gathered
    quantised = (torch.qint8, torch.quint8, torch.qint32)
    return any(d in quantised for d in dtypes)


def common_buffer(values: list[Any], base: Any, name: str) -> Any:
    """The common value of an integer or bool buffer, else the base's."""
    import torch

    everything = values if base is None else [base, *values]
    labels = (["the base"] if base is not None else []) + [f"model {i}" for i in range(len(values))]
    shards = [list(v) if isinstance(v, (list, tuple)) else [v] for v in everything]
    refuse_unequal(labels, [[str(t.dtype) for t in s] for s in shards], "dtype", name)
    refuse_unequal(labels, [[tuple(t.shape) for t in s] for s in shards], "shape", name)
    if not all(all(map(torch.equal, s, shards[0])) for s in shards):
        if base is None:
            raise DataError(
                "an integer or bool tensor differs between the models, and there is no base to decide",
                code="buffer.unequal",
                tensor=name,
            )
        _log.warning("tensor '%s': integer values differ between the models; the base's are taken", name)
    chosen = [t.clone() for t in shards[0]]
    return chosen if isinstance(everything[0], (list, tuple)) else chosen[0]
