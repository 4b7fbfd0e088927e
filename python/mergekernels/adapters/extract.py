"""A fine-tuned checkpoint as an adapter of its base: the best approximation of low rank of every changed weight."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from .._version import __version__
from ..errors import ArgumentError, MergeError, PlanError
from .changes import Changes, difference, equal_bytes, load_tensor, pair_up
from .model import Factors, Site

if TYPE_CHECKING:
    from ..engine.pool import Reader
    from ..tensors import DType

__all__ = ["ExtractReport", "Extracted", "extract_adapter"]

_WORK = 5
"""Float64 copies of a matrix to count for the work of a truncation, beside the difference itself."""


@dataclass(frozen=True)
class Extracted:
    """One module. shape : (m, n) of its matrix. rank : of the factors. norm : of the difference, Frobenius.

    kept_energy : share of its sum of squares that the factors hold. error : ||D - B A|| / ||D||. route : how.
    """

    shape: tuple[int, int]
    rank: int
    norm: float
    kept_energy: float
    error: float
    route: str


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did.

    modules : path -> what became factors. unchanged : modules with a difference of zero, which the adapter leaves out.
    saved : tensors that are in it whole. left_out : tensors that differ and are not in it.
    """

    out: str
    modules: Mapping[str, Extracted]
    unchanged: tuple[str, ...]
    saved: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return asdict(self)


@dataclass
class _Run:
    """One extraction."""

    changes: Changes
    rank: int | None
    energy: float | None
    spread: Literal["b", "sqrt", "a"]
    dtype: DType
    device: str
    progress: Callable[[int, int, str], None] | None
    factors: dict[Site, Factors] = field(default_factory=dict)
    modules: dict[str, Extracted] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def work(self, reader: Reader) -> None:
        """All tensors, one after the other."""
        changes = self.changes
        total = sum(t.nbytes for t in changes.base.tensors.values())
        done = 0
        for site in changes.sites:
            self._tell(done, total, site.module)
            self._module(site, reader)
            done += changes.base.tensors[site.weight].nbytes
        for name in changes.rest:
            self._tell(done, total, name)
            if not equal_bytes(changes, name, reader):
                self.changed.append(name)
            done += changes.base.tensors[name].nbytes
        self._tell(total, total, "")

    def _tell(self, done: int, total: int, name: str) -> None:
        if self.progress is not None:
            self.progress(done, total, name)

    def _module(self, site: Site, reader: Reader) -> None:
        import torch

        from ..ops.spectral.lowrank import lowrank

        delta = site.to_matrix(difference(self.changes, site.weight, reader)).to(self.device)
        if not bool(delta.any()):
            self.unchanged.append(site.module)
            return
        try:
            found = lowrank(delta, self.rank, self.energy, self.spread)
        except MergeError as error:
            raise MergeError.from_dict({**error.to_dict(), "tensor": site.weight}) from error
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        kind = getattr(torch, self.dtype.torch)
        wide = torch.float64 if self.dtype.name == "F64" else torch.float32
        b, a = (f.to("cpu", kind).to(wide).contiguous() for f in (found.factors.b, found.factors.a))
        self.factors[site] = Factors(b, a)
        self.modules[site.module] = Extracted(
            site.shape, found.factors.rank, norm, found.kept_energy, found.error, found.route
        )


def extract_adapter(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    out: str | PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    save_rest: bool = False,
    spread: Literal["b", "sqrt", "a"] = "b",
    out_dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> ExtractReport:
    """Write the difference of two checkpoints as a PEFT adapter of the first.

    Tensors are read one after the other; the differences are taken in float32 (float64 if an input is) and each is
    replaced by its best approximation of low rank. In memory are one matrix, what its truncation works with, and the
    adapter.

    Parameters
    ----------
    base, tuned : checkpoint folders or files with the same tensors, or org/name in the hub cache.
    out : folder to write; absent or complete.
    rank : ranks per module, 1 to the smaller side of every module. energy : instead of it, the least rank that holds
        this share of each difference's sum of squares, in (0, 1]. One of the two must be given.
    include, exclude : patterns of module paths ("*.q_proj"); default all linear layers, convolutions and embeddings.
    save_rest : put whole modules that changed and have no factors (norms) into modules_to_save. Otherwise they are
        reported and left out.
    spread : where singular values go: "b" (lora_B, as PEFT), "sqrt" (both) or "a".
    out_dtype : of the factors: "float32", "bfloat16", "float16", "float64".
    device : where truncations run. threads : of torch. memory : bound on tensor memory, as for `run`; what the
        largest matrix needs is compared with it before anything is read.
    progress : called with (bytes done, bytes in all, name).

    Raises
    ------
    ArgumentError : rank and energy, a rank above a module's smaller side, a budget that is too small.
    InputError, PlanError : the checkpoints do not fit. DataError : NaN or Inf. OutputError : out is taken.
    """
    from ..engine.pool import Reader
    from ..formats.adapters import write_peft
    from ..matrices import using_threads
    from .opening import check_device
    from .result import asked_dtype
    from .saving import check_target
    from .truncate import check_cut

    start = time.monotonic()
    check_cut(rank, energy, spread)
    if rank is None and energy is None:
        raise ArgumentError("neither rank nor energy is given", code="rank", expected="one of them")
    dtype = asked_dtype(out_dtype)
    assert dtype is not None
    check_target(out, overwrite=overwrite)
    check_device(device)
    first, second = _open(base, "base"), _open(tuned, "tuned")
    changes = pair_up(first, second, include, exclude)
    _check_ranks(changes, rank)
    _check_memory(changes, memory)
    run = _Run(changes, rank, energy, spread, dtype, device, progress)
    reader = Reader()
    try:
        with using_threads(threads):
            run.work(reader)
    finally:
        reader.close()
    saved, left_out, warnings = _rest(run, save_rest)
    if not run.modules:
        raise ArgumentError(
            "the checkpoints do not differ in any module that could have factors", code="extract.equal", got=str(out)
        )
    write_peft(
        out,
        run.factors,
        base_name=os.fspath(base),
        dtype=dtype.name,
        metadata=_provenance(run, first, second),
        extras={name: partial(load_tensor, second, name) for name in saved},
        base=first,
        overwrite=overwrite,
    )
    seconds = time.monotonic() - start
    return ExtractReport(
        os.fspath(out), run.modules, tuple(run.unchanged), tuple(saved), tuple(left_out), seconds, tuple(warnings)
    )


def _open(path: str | PathLike[str], what: str) -> Any:
    from ..engine.recipe.inputs import Inputs
    from ..engine.recipe.source import Document
    from ..engine.recipe.values import Reference

    inputs = Inputs(Document({}))
    position = inputs.add(Reference(os.fspath(path)), (what,))
    if position is None:
        problems = inputs.problems
        raise problems[0] if len(problems) == 1 else PlanError(problems)
    return inputs.checkpoints[position]


def _check_ranks(changes: Changes, rank: int | None) -> None:
    small = [s for s in changes.sites if rank is not None and min(s.shape) < rank]
    if small:
        raise ArgumentError(
            f"{len(small)} modules have a side below the rank",
            code="rank",
            tensor=small[0].weight,
            expected=f"a rank of at most {min(min(s.shape) for s in small)}",
            got=str(rank),
            hint=f"Leave them out with --exclude, '{small[0].module}' for one, or ask for an energy.",
        )


def _check_memory(changes: Changes, memory: str | int | None) -> None:
    from ..engine.memory import format_size, memory_limit

    limit = memory_limit(memory)
    needed, weight = max((_bytes(changes, s), s.weight) for s in changes.sites)
    if needed > limit:
        raise ArgumentError(
            "the memory budget cannot hold the largest matrix and the work of its truncation",
            code="memory.too-small",
            tensor=weight,
            expected=f"at least {format_size(needed)} ({needed} bytes)",
            got=format_size(limit),
            hint="Give more memory, or leave the module out.",
        )


def _bytes(changes: Changes, site: Site) -> int:
    m, n = site.shape
    wide = any(c.tensors[site.weight].dtype.name == "F64" for c in (changes.base, changes.tuned))
    return m * n * ((8 if wide else 4) + 8 * _WORK)


def _rest(run: _Run, save: bool) -> tuple[list[str], list[str], list[str]]:
    """(tensors to save, tensors that differ and are left out, warnings)."""
    # Neither a module with factors nor one that holds such a module can be saved whole.
    adapted = {"", *run.modules}
    for module in run.modules:
        adapted.update(module[:i] for i, c in enumerate(module) if c == ".")
    names = run.changes.base.tensors
    floats = [n for n in run.changed if names[n].dtype.is_float and n.rpartition(".")[0] not in adapted]
    chosen = {n.rpartition(".")[0] for n in floats} if save else set()
    saved = sorted(n for n in names if n.rpartition(".")[0] in chosen)
    left_out = [n for n in run.changed if n not in saved]
    warnings = []
    if left_out:
        shown = ", ".join(f"'{n}'" for n in left_out[:5]) + (" ..." if len(left_out) > 5 else "")
        hint = "" if save else "; --save-rest saves whole modules that have no factors"
        warnings.append(f"{len(left_out)} tensors differ and are not in the adapter: {shown}{hint}")
    return saved, left_out, warnings


def _provenance(run: _Run, base: Any, tuned: Any) -> dict[str, Any]:
    return {
        "version": __version__,
        "method": "extract",
        "base": base.label,
        "tuned": tuned.label,
        "rank": run.rank,
        "energy": run.energy,
        "modules": {name: {"rank": m.rank, "kept_energy": m.kept_energy} for name, m in run.modules.items()},
    }
