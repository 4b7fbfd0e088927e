"""One step of a continual merge: the next model into the state."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from math import fsum, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import refuse_unequal
from .._matrix_call import MatrixCall
from .._matrix_task import Task
from .._methods.spectral.common import cut_of
from .._methods.spectral.opcm import project_away, square_norm
from ..errors import ArgumentError, InputError
from ..tensors import F32, F64, DType
from .state import Continual, Writer, commit, locked

if TYPE_CHECKING:
    import torch

__all__ = ["as_mapping", "continual_merge"]

_log = logging.getLogger("mergekernels")


def continual_merge(
    state: str | os.PathLike[str],
    model: Any,
    *,
    base: Any,
    alpha: float | None = None,
    exclude: str | list[str] | None = None,
    conv: str | None = None,
    experts: str | list[str] | None = None,
    rank_tol: float | None = None,
    label: str = "",
) -> Continual:
    """Merge the next model of a stream into a state on disk (OPCM); the first call makes the state.

    After every call the state is what `merge_state_dicts(models so far, "opcm", base=base, ...)` merges, in memory and
    on disk of one model, whatever the length of the stream.

    Parameters
    ----------
    state : folder of the state; made if absent. model, base : mappings from name to tensor, or the path of a
        safetensors file or checkpoint folder. The base is the same in every call, which is checked. Tensors are read
        one at a time.
    alpha, exclude, conv, experts, rank_tol : of opcm (`mergekernels.methods()["opcm"]`), for the first call; later
        ones take them from the state and refuse others.
    label : of the model, so that a step can be repeated after a crash: a label that the state holds already is not
        merged again, and the state is returned as it is.

    Returns
    -------
    Continual : `.merged(base)` is the merged model, a mapping that computes each tensor when it is read.

    Raises
    ------
    ArgumentError, InputError : inputs that do not fit together or to the state. DataError : NaN or Inf. OutputError :
    the folder cannot be written, or another process works in it. In all cases the state stays what it was.
    """
    folder = Path(state)
    model, base = as_mapping(model, "the model"), as_mapping(base, "the base")
    given = {"alpha": alpha, "exclude": exclude, "conv": conv, "experts": experts, "rank_tol": rank_tol}
    with locked(folder):
        before = Continual.open(folder) if (folder / "state.json").exists() else None
        if label and before is not None and label in before.labels:
            return before
        call = _call(before, {k: v for k, v in given.items() if v is not None})
        return _step(folder, before, call, model, base, label)


def _call(before: Continual | None, given: dict[str, Any]) -> MatrixCall:
    stored = dict(before.parameters) if before is not None else {}
    arguments = {**{k: v for k, v in stored.items() if v is not None}, **given}
    call = MatrixCall.of("opcm", arguments, None, 1, True, "default", "error", 0, None, 0, ())
    for name, value in stored.items():
        if call.params[name] != value:
            raise ArgumentError(
                f"'{name}' differs from what the state was begun with",
                code="continual.parameter",
                expected=repr(value),
                got=repr(call.params[name]),
            )
    return call


def _step(
    folder: Path,
    before: Continual | None,
    call: MatrixCall,
    model: Mapping[str, Any],
    base: Mapping[str, Any],
    label: str,
) -> Continual:
    names = _names(model, base)
    floats, widths = [], []
    for name in names:
        x, y = base[name], model[name]
        _same_kind(x, y, name)
        if x.is_floating_point():
            wide: DType = F64 if "torch.float64" in (str(x.dtype), str(y.dtype)) else F32
            floats.append(name)
            widths.append((name, wide, tuple(x.shape)))
    step = before.step + 1 if before is not None else 1
    digest, squares, totals = hashlib.sha256(), [], []
    report: dict[str, Any] = {}
    writer = Writer(folder, step, widths)
    try:
        wanted = set(floats)
        for name in names:
            x = base[name]
            _digest(digest, name, x)
            if name not in wanted:
                if not x.equal(model[name]):
                    _log.warning("tensor '%s': integer values differ from the base's, which are taken", name)
                continue
            task = Task.of(call, [model[name]], x, [], name)
            new = _next(task, None if before is None else before._sum(name), report)
            squares.append(square_norm(task.wholes[0]))
            totals.append(square_norm(new))
            writer.put(name, new)
        if before is not None and digest.hexdigest() != before.base:
            raise InputError(
                "the base differs from the one that the state was begun with",
                code="continual.base",
                file=str(folder),
                expected=f"SHA-256 {before.base}",
                got=digest.hexdigest(),
            )
        writer.finish()
    finally:
        writer.close()
    kept = {p.name: call.params[p.name] for p in call.method.info.params if p.name != "lambda"}
    after = Continual(
        folder,
        kept,
        (*(before.norms if before is not None else ()), sqrt(fsum(squares))),
        sqrt(fsum(totals)),
        (*(before.labels if before is not None else ()), label),
        digest.hexdigest(),
        writer.name,
        report,
    )
    commit(after)
    return after


def _next(task: Task, total: torch.Tensor | None, report: dict[str, Any]) -> torch.Tensor:
    """The sum with the projected task vector."""
    import torch

    delta, layout, params = task.wholes[0], task.layout, task.call.params
    if total is None:
        return delta
    if total.shape != delta.shape:
        raise InputError(
            "the shape differs from that in the state",
            code="continual.shape",
            tensor=task.inputs.name,
            expected=str(tuple(total.shape)),
            got=str(tuple(delta.shape)),
        )
    total = total.to(delta.device, torch.promote_types(total.dtype, delta.dtype))
    if layout.plain:
        return total + delta.to(total.dtype)
    shape = (layout.count, layout.m, layout.n)
    parts, ks = [], []
    for merged, one in zip(total.reshape(shape), delta.to(total.dtype).reshape(shape), strict=True):
        if not bool(one.any()):
            parts.append(merged)
            continue
        kept, k = project_away(merged, one, params["alpha"], cut_of(params, (layout.m, layout.n)))
        parts.append(merged + kept)
        ks.append(k)
    report[task.inputs.name] = {"k": ks}
    return torch.stack(parts).reshape(total.shape)


def _names(model: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    names = list(base.keys())
    if set(names) != set(model.keys()):
        different = sorted(set(names) ^ set(model.keys()))
        raise InputError("the model and the base have different tensors: " + ", ".join(different[:5]), code="names")
    return sorted(names, key=lambda n: n.encode())


def _same_kind(x: Any, y: Any, name: str) -> None:
    labels = ["the base", "the model"]
    refuse_unequal(labels, [tuple(x.shape), tuple(y.shape)], "shape", name)
    if x.is_floating_point() != y.is_floating_point():
        refuse_unequal(labels, [str(x.dtype), str(y.dtype)], "dtype", name)


def _digest(digest: Any, name: str, x: torch.Tensor) -> None:
    import torch

    digest.update(f"{len(name.encode())} {name} {x.dtype} {tuple(x.shape)}\n".encode())
    flat = x.detach().cpu().contiguous().flatten().view(torch.uint8) if x.numel() else x.new_empty(0)
    for part in torch.split(flat, 1 << 24):
        digest.update(part.numpy().tobytes())


def as_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """A mapping as it is; a path as a mapping that reads each tensor when it is asked for.

    Raises
    ------
    ArgumentError : it is neither. FormatError, InputError : it cannot be read.
    """
    if isinstance(value, (str, os.PathLike)):
        return _Files(value)
    if not (hasattr(value, "keys") and hasattr(value, "__getitem__")):
        raise ArgumentError(
            f"{what} is no model",
            code="models.type",
            expected="a mapping from names to tensors, or a path",
            got=type(value).__name__,
        )
    return value  # type: ignore[no-any-return]


class _Files(Mapping[str, Any]):
    """A checkpoint, read tensor by tensor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from ..formats.checkpoint import open_checkpoint

        self._checkpoint = open_checkpoint(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        file = self._checkpoint.files[self._checkpoint.tensors[name].file].path
        with safe_open(file, framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
            return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)
