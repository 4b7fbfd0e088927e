"""One tensor of a merge with a method over matrices: task vectors in, the merged tensor out."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._checks import check_tensor, nonfinite
from ._matrix_call import MatrixCall
from ._methods.matrix import MatrixSpec, Merged, measured_state
from ._methods.spectral.layout import Layout, merge_plain
from .errors import ArgumentError, DataError, MergeError
from .ops.inputs import Inputs, gather
from .ops.selection import Scope
from .tensors import F64

if TYPE_CHECKING:
    import torch

    from .adapters.model import Delta

__all__ = ["Task", "resolved"]

_log = logging.getLogger("mergekernels")


@dataclass(frozen=True)
class Task:
    """One tensor of a merge: what the method gets of it, and how its result becomes the merged tensor.

    wholes : of the models, put together and in the compute dtype; task vectors unless the method subtracts no base.
    """

    call: MatrixCall
    inputs: Inputs
    layout: Layout
    wholes: list[torch.Tensor]
    base: torch.Tensor | None
    companions: list[torch.Tensor] = field(default_factory=list)

    @staticmethod
    def of(call: MatrixCall, models: Sequence[Any], base: Any, companions: Sequence[Any], name: str) -> Task:
        """Gather one tensor of all models, put shards together, subtract the base, look for NaN and Inf.

        Raises
        ------
        DataError, ArgumentError
        """
        import torch

        inputs = gather(models, base, name, call.shard_dim)
        layout = call.layout(name, inputs.shape)
        if call.method.info.companions and any(c is None for c in companions):
            layout = Layout(1, 1, inputs.n, plain=True)
        wide = torch.float64 if inputs.compute is F64 else torch.float32
        columns = [_whole(inputs, i, call.shard_dim) for i in range(len(inputs.tensors[0]))]
        common = columns.pop().to(wide) if inputs.has_base else None
        wholes = []
        for i, column in enumerate(columns):
            delta = column.to(wide) if common is None else column.to(wide) - common
            if not _all_finite(delta):
                raise _nonfinite(inputs, i, column, common, delta)
            wholes.append(delta)
        extra = []
        if not layout.plain:
            for i, c in enumerate(companions):
                label = f"{call.method.info.companions} {i}"
                checked = check_tensor(c, label, inputs.name).to(wide)
                if checked.ndim != 2:
                    raise ArgumentError(
                        f"{label} is not a matrix",
                        code="tensor.shape",
                        tensor=inputs.name or None,
                        expected="two dimensions",
                        got=str(tuple(checked.shape)),
                    )
                if not bool(torch.isfinite(checked).all()):
                    first = int((~torch.isfinite(checked)).flatten().to(torch.int8).argmax())
                    count = int((~torch.isfinite(checked)).sum())
                    raise nonfinite(label, first, count, _scope(inputs), [inputs.name])
                extra.append(checked)
        return Task(call, inputs, layout, wholes, common, extra)

    def _matrices(self, index: int) -> list[Delta]:
        """What the method gets of matrix `index`: zeros as factors of rank 0."""
        from .adapters.model import Factors

        shape = (self.layout.count, self.layout.m, self.layout.n)
        result: list[Delta] = []
        for whole in self.wholes:
            x = whole.reshape(shape)[index]
            if self.base is not None and not (bool(x[:1].any()) or bool(x.any())):
                result.append(Factors(x.new_zeros(x.shape[0], 0), x.new_zeros(0, x.shape[1])))
            else:
                result.append(x)
        return [*result, *self.companions]

    def measure(self, state: Any) -> dict[str, Any]:
        """Scope "model": the measurements of this tensor's matrices by name."""
        specs = [self.call.spec(self.inputs.name, self.layout, i) for i in range(self.layout.count)]
        return {spec.name: self.call.method.measure(spec, self._matrices(i), state) for i, spec in enumerate(specs)}

    def merged(self, state: Any, dtype: torch.dtype, report: MutableMapping[str, Any] | None) -> torch.Tensor:
        """The merged tensor, whole.

        Raises
        ------
        DataError : it overflows its dtype.
        """
        import torch

        results = []
        for i in range(self.layout.count):
            spec = self.call.spec(self.inputs.name, self.layout, i)
            found = self._merge(spec, i, state)
            for sentence in found.warnings:
                _log.warning("tensor '%s': %s", spec.name, sentence)
            if report is not None:
                report[spec.name] = {**found.report, **({"warnings": found.warnings} if found.warnings else {})}
            results.append(self._written(found, i, dtype))
        whole = results[0] if len(results) == 1 else torch.stack(results)
        if not _all_finite(whole):
            bad = (~torch.isfinite(whole)).flatten()
            first, count = int(bad.to(torch.int8).argmax()), int(bad.sum())
            raise nonfinite("", first, count, _scope(self.inputs), [self.inputs.name], output=True)
        return whole.reshape(self.inputs.shape)

    def _merge(self, spec: MatrixSpec, index: int, state: Any) -> Merged:
        matrices = self._matrices(index)
        try:
            if self.layout.plain:
                return merge_plain(self.call.method, spec, matrices, state)
            return self.call.method.merge(spec, matrices, state)
        except MergeError as error:
            if error.tensor or not spec.name:
                raise
            fields = {**error.to_dict(), "tensor": spec.name}
            raise MergeError.from_dict(fields) from error

    def _written(self, merged: Merged, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Base + lambda delta, rounded once."""
        import torch

        from .adapters.model import Factors

        scale, delta = self.call.params.get("lambda", 1.0), merged.delta
        shape = (self.layout.count, self.layout.m, self.layout.n)
        base = None if self.base is None else self.base.reshape(shape)[index]
        if isinstance(delta, Factors):
            if base is None or delta.rank:
                delta = (delta.b * scale) @ delta.a if scale != 1.0 else delta.dense()
            else:
                delta = torch.zeros_like(base)
        elif scale != 1.0:
            delta = delta * scale
        return (delta if base is None else base + delta).to(dtype)


def _all_finite(x: torch.Tensor) -> bool:
    """Whether no entry is NaN or Inf: one pass, without a tensor of flags."""
    import math

    import torch

    if not x.numel():
        return True
    low, high = torch.aminmax(x)  # a NaN anywhere is both
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _whole(inputs: Inputs, position: int, dim: int) -> torch.Tensor:
    import torch

    parts = [shard[position] for shard in inputs.tensors]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p.to(parts[0].device) for p in parts], dim)


def _scope(inputs: Inputs) -> Scope:
    return Scope((0,), (inputs.tensor,), inputs.n, "F64" if inputs.compute is F64 else "F32")


def _nonfinite(
    inputs: Inputs, model: int, column: torch.Tensor, base: torch.Tensor | None, delta: torch.Tensor
) -> DataError:
    """Who is to blame: the base, the model, or a difference beyond the compute dtype."""
    import torch

    label = inputs.labels[model] if inputs.labels else f"model {model}"
    for what, x in (("the base", base), (label, column)):
        bad = None if x is None else (~torch.isfinite(x)).flatten()
        if bad is not None and bool(bad.any()):
            return nonfinite(what, int(bad.to(torch.int8).argmax()), int(bad.sum()), _scope(inputs), [inputs.name])
    bad = (~torch.isfinite(delta)).flatten()
    return DataError(
        f"the difference of {label} and the base overflows float32 at flat index {int(bad.to(torch.int8).argmax())}",
        code="data.overflow",
        tensor=inputs.name or None,
        hint="Give one of them as float64.",
    )


def resolved(call: MatrixCall, tasks: Any) -> Any:
    """The state with which `call.method` merges. tasks : a function that yields every tensor's Task, anew each time."""

    def measure(state: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for task in tasks():
            if not task.layout.plain or hasattr(call.method, "merge_plain"):
                found |= task.measure(state)
        return found

    return measured_state(call.method, call.params, call.dialect, measure)
