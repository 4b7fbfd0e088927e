"""What a fine-tuned checkpoint changes in its base: which tensors become modules of an adapter, and what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from ..engine.pool import Reader
from ..engine.sites import site_for
from ..errors import DataError, InputError, MergeError, PlanError
from ..formats.checkpoint import Checkpoint, TensorInfo
from ..tensors import DType
from .model import Site

if TYPE_CHECKING:
    import torch

__all__ = ["Changes", "difference", "equal_bytes", "load_tensor", "pair_up", "read_elements"]

_CHUNK = 1 << 22
"""Elements that are read and widened at a time."""


@dataclass(frozen=True)
class Changes:
    """Two checkpoints beside one another.

    sites : modules whose weights may become factors, in order of name. rest : names of the other tensors, which are
    compared.
    """

    base: Checkpoint
    tuned: Checkpoint
    sites: tuple[Site, ...]
    rest: tuple[str, ...] = field(default=())


def pair_up(base: Checkpoint, tuned: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> Changes:
    """Sorts the tensors of two checkpoints with equal names.

    include, exclude : patterns of module paths ("*.q_proj"); with `include` only what it names becomes factors, and
    never what `exclude` names.

    Raises
    ------
    PlanError, InputError : tensors that only one of them has, or of different shapes; patterns that name nothing.
    """
    problems: list[MergeError] = []
    for lacking, having in ((tuned, base), (base, tuned)):
        missing = sorted(set(having.tensors) - set(lacking.tensors))
        if missing:
            problems.append(
                InputError(
                    f"{len(missing)} tensors missing that the other checkpoint has: {_some(missing)}",
                    code="input.missing-tensor",
                    file=str(lacking.path),
                )
            )
    sites: list[Site] = []
    rest: list[str] = []
    used: set[str] = set()
    for name in sorted(set(base.tensors) & set(tuned.tensors), key=str.encode):
        info, other = base.tensors[name], tuned.tensors[name]
        if info.shape != other.shape or (info.dtype.is_float is not other.dtype.is_float):
            problems.append(
                InputError(
                    "the tensors of base and tune do not fit",
                    code="input.mismatch",
                    tensor=name,
                    expected=f"{info.dtype} {list(info.shape)}",
                    got=f"{other.dtype} {list(other.shape)}",
                )
            )
            continue
        site = site_for(base, name, info)
        module = name.removesuffix(".weight")
        named = {p for p in (*include, *exclude) if fnmatchcase(module, p)} if site is not None else set()
        used |= named
        chosen = not include or any(p in named for p in include)
        if site is not None and chosen and not any(p in named for p in exclude):
            sites.append(site)
        else:
            rest.append(name)
    for pattern in (*include, *exclude):
        if pattern not in used:
            problems.append(
                InputError(
                    "the pattern names no module",
                    code="extract.pattern",
                    expected="a pattern of module paths, such as '*.q_proj'",
                    got=repr(pattern),
                )
            )
    if not sites and not problems:
        problems.append(InputError("no module is left to extract", code="extract.empty", file=str(base.path)))
    if problems:
        raise problems[0] if len(problems) == 1 else PlanError(problems)
    return Changes(base, tuned, tuple(sites), tuple(rest))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(_CHUNK, n - start)) for start in range(0, n, _CHUNK))


def read_elements(reader: Reader, checkpoint: Checkpoint, info: TensorInfo, start: int, count: int, slot: int) -> Any:
    """Consecutive elements of a tensor as stored."""
    import torch

    size = info.dtype.itemsize
    raw = bytearray(count * size)
    reader.read(checkpoint.files[info.file].path, memoryview(raw), info.offset + start * size, slot)
    return torch.frombuffer(raw, dtype=_torch(info.dtype))


def _torch(dtype: DType) -> Any:
    import torch

    return getattr(torch, dtype.torch)


def difference(changes: Changes, name: str, reader: Reader) -> torch.Tensor:
    """Tune minus base of a tensor, in its shape, in float32; float64 if either is.

    Raises
    ------
    DataError : NaN or Inf in one of them.
    """
    import torch

    pair = ((changes.tuned, changes.tuned.tensors[name]), (changes.base, changes.base.tensors[name]))
    wide = torch.float64 if any(info.dtype.name == "F64" for _, info in pair) else torch.float32
    shape = pair[0][1].shape
    result = torch.empty(prod(shape), dtype=wide)
    for start, count in _chunks(result.numel()):
        values = []
        for slot, (checkpoint, info) in enumerate(pair):
            part = read_elements(reader, checkpoint, info, start, count, slot)
            bad = ~torch.isfinite(part)
            if bool(bad.any()):
                raise DataError(
                    f"'{checkpoint.label}' holds NaN or Inf, the first at flat index "
                    f"{start + int(bad.to(torch.int8).argmax())}",
                    code="data.nonfinite",
                    tensor=name,
                    file=str(checkpoint.files[info.file].path),
                    expected="finite values",
                )
            values.append(part.to(wide))
        torch.sub(values[0], values[1], out=result[start : start + count])
    return result.reshape(shape)


def equal_bytes(changes: Changes, name: str, reader: Reader) -> bool:
    """Whether a tensor has the same values in both; compared as numbers where the dtypes differ."""
    import torch

    one, two = changes.base.tensors[name], changes.tuned.tensors[name]
    for start, count in _chunks(prod(one.shape)):
        a = read_elements(reader, changes.base, one, start, count, 0)
        b = read_elements(reader, changes.tuned, two, start, count, 1)
        if a.dtype == b.dtype:
            if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                return False
        elif not torch.equal(a.to(torch.float64), b.to(torch.float64)):
            return False
    return True


def load_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A whole tensor as stored."""
    info = checkpoint.tensors[name]
    reader = Reader()
    try:
        found: torch.Tensor = read_elements(reader, checkpoint, info, 0, prod(info.shape), 0).reshape(info.shape)
        return found
    finally:
        reader.close()
