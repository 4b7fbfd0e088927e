"""The plan: what is read, what is written, where, and what it costs. Immutable and hashed; made from headers only."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from .._backends._device import place
from .._backends.dispatch import load, pick, requested, require
from .._methods.protocol import Method
from ..errors import ArgumentError, BackendError, InputError, MergeError, OutputError, PlanError
from ..tensors import BF16, TensorView, dtype_of
from .generated import SPARE_SLOTS
from .identity import plan_hash
from .io import Io
from .layout import OutputFile, index_json, lay_out
from .memory import TILE_BYTES, Budget, cut_budget, default_threads, memory_limit
from .resolved import ResolvedMerge, sources_of
from .smallfiles import SmallFile, small_files
from .specs import Specs, method_of
from .staging import OutState, inspect_out
from .summary import summarise
from .survey import Survey, survey, widest
from .target import check_target

__all__ = ["Plan", "make_plan"]

_GPU_TILE = 16 << 20
"""Bytes of one source in a tile that goes to a GPU: large enough that launches and transfers are not many."""


@dataclass(frozen=True)
class Plan:
    """A merge laid out. `to_dict` is the dry run that `mergekernels plan` prints.

    merge : the resolved recipe. hash : of all that determines the published bytes. files : the output's safetensors
    files, one unit each. small : other published files, index included, manifest not. budget : how memory is cut.
    backend, device : where tiles are computed. out : None if no output was named; state : what is there.
    survey : what the passes need.
    """

    merge: ResolvedMerge
    hash: str
    files: tuple[OutputFile, ...]
    small: tuple[SmallFile, ...]
    budget: Budget
    backend: str
    device: str
    out: Path | None
    state: OutState
    survey: Survey
    specs: Specs
    method: Method
    warnings: tuple[str, ...]

    @property
    def reads(self) -> int:
        """Expected full reads of the merged tensors."""
        return self.survey.reads

    @property
    def bytes_in(self) -> int:
        """Bytes of all input tensors that contribute, once."""
        merge = self.merge
        places = range(len(merge.tensors))
        return sum(merge.inputs[s.input].tensors[s.tensor].nbytes for i in places for s in self.specs.read_sources(i))

    @property
    def bytes_read(self) -> int:
        """Bytes that are expected to be read, repeated reads included."""
        merge = self.merge
        members = set(self.specs.members)
        total = 0
        for i, t in enumerate(merge.tensors):
            size = sum(merge.inputs[s.input].tensors[s.tensor].nbytes for s in self.specs.read_sources(i))
            total += size * (self.reads if i in members else 1)
            if self.specs.whole is not None and i in members and t.base is not None:
                # The base is read again when the result is added to it.
                total += merge.inputs[t.base.input].tensors[t.base.tensor].nbytes
        return total

    @property
    def bytes_written(self) -> int:
        """Bytes of all published files, the manifest excepted. Of an adapter at the rank asked for, 0 for an energy."""
        if self.merge.output is not None:
            return adapter_bytes(self.merge)
        return sum(f.size for f in self.files) + sum(s.size for s in self.small)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data.

        Keys: plan_hash, method, then [{modifier: parameters}], dialect, seed, nan, backend, device, threads, memory
        (bytes), tile_bytes, inputs [{label, path, files, tensors, bytes}], output {kind ("checkpoint" or "adapter"),
        files: [{name, bytes, tensors}], small_files: [names], tensors, bytes, merged, buffers, copies, aliases}, scope
        ("tensor" or "model"), computed (for methods of tier T2 {tier, by: "torch-cpu"}, else None), passes {reads,
        sampled, writes}, bytes_read, bytes_written, peak_memory, disk {path, needed, free} or None, time {seconds,
        read_rate, write_rate, assumed}, parameters [{params, tensors: count, examples: [names]}], state ("absent",
        "done", "resumable", "exists", "other-plan" or None), warnings [str].
        """
        return summarise(self)


def make_plan(
    merge: ResolvedMerge,
    *,
    memory: str | int | None,
    threads: int | None,
    backend: str | None,
    device: str,
    out: str | os.PathLike[str] | None,
    shard_size: int,
    io: Io,
    tile: int | None = None,
) -> Plan:
    """Lays out a resolved merge. tile : elements of a tile, to force it (tests).

    Raises
    ------
    PlanError : with every problem that was found. ArgumentError, BackendError : an option is not usable.
    """
    if shard_size < 1:
        raise ArgumentError("not a shard size", code="shard-size", expected="at least 1 byte", got=str(shard_size))
    method = method_of(merge)
    name = _pick_backend(backend, device)
    specs = Specs(merge, method)
    count = default_threads(threads)
    # For an adapter the groups in which statistics over the model are taken; nothing of this size is written.
    files = lay_out(merge.tensors, shard_size)
    small: tuple[SmallFile, ...] = ()
    if merge.output is None:
        small, warnings = small_files(io, merge)
        merge = replace(merge, warnings=(*merge.warnings, *warnings))
    index = index_json(files) if merge.output is None else None
    if index is not None:
        small = (*small, SmallFile.of("model.safetensors.index.json", index))
    digest = plan_hash(merge, files, small, f"torch-{device.partition(':')[0]}" if specs.whole is not None else None)
    target = None if out is None else Path(os.path.abspath(out))
    state: OutState = None
    problems = _check_sizes(merge)
    if target is not None:
        problems += check_target(target, merge, small)
        if not problems:
            state = inspect_out(io, target, digest)
            if merge.output is None:
                problems += _check_space(target, files, state)
    if problems:
        raise PlanError(problems)
    found = survey(specs, method)
    require(place(load(name), device), found.features)
    budget = _budget(specs, found, memory, count, device, tile)
    return Plan(merge, digest, files, small, budget, name, device, target, state, found, specs, method, merge.warnings)


def adapter_bytes(merge: ResolvedMerge) -> int:
    """About what the factors of an adapter take; 0 where their ranks follow from an energy."""
    output = merge.output
    dtype = None if output is None else dtype_of(output.dtype)
    if output is None or output.rank is None or dtype is None:
        return 0
    sides = ((t.shape[0], prod(t.shape[1:])) for t in merge.tensors)
    return sum(min(output.rank, m, n) * (m + n) * dtype.itemsize for m, n in sides)


def _pick_backend(backend: str | None, device: str) -> str:
    """The name of the backend that serves tiles on `device`.

    Raises
    ------
    BackendError : the one asked for cannot run there, with its reason; or none can.
    """
    request = requested(backend)
    name, module = pick("stream", [], request, device)
    if request is None and device == "cpu":
        return name
    reason = place(module, device).why_not("stream", [TensorView(0, (0,), (1,), BF16)])
    if reason is not None:
        raise BackendError(f"backend '{name}' cannot run on {device}: {reason}", code="backend.cannot")
    return name


def _budget(
    specs: Specs, found: Survey, memory: str | int | None, threads: int, device: str, tile: int | None
) -> Budget:
    sources = itemsize = 1
    for t in specs.merge.tensors:
        sources, itemsize = max(sources, len(sources_of(t)) + len(t.marks)), max(itemsize, widest(specs, t))
    if specs.whole is not None:
        sources = 2  # one model after the other, beside the base
    if specs.generated:
        sources += SPARE_SLOTS
    best = TILE_BYTES if device == "cpu" else _GPU_TILE
    return cut_budget(
        memory_limit(memory),
        threads,
        sources,
        itemsize,
        found.floor,
        needed=found.needed,
        roomy=found.roomy,
        best=best,
        tile=tile,
        whole=found.whole,
    )


def _check_sizes(merge: ResolvedMerge) -> list[MergeError]:
    """Sources whose bytes are not those of the output tensor's shape."""
    problems: list[MergeError] = []
    for t in merge.tensors:
        for s in sources_of(t):
            info = merge.inputs[s.input].tensors[s.tensor]
            same = info.dtype is t.dtype or t.action == "merge"
            if info.nbytes != prod(t.shape) * info.dtype.itemsize or not same:
                problems.append(
                    InputError(
                        f"input {merge.inputs[s.input].path} does not fit",
                        code="input.shape",
                        tensor=s.tensor,
                        expected=f"{t.dtype} {list(t.shape)}",
                        got=f"{info.dtype} {list(info.shape)}",
                    )
                )
    return problems


def _check_space(out: Path, files: tuple[OutputFile, ...], state: OutState) -> list[MergeError]:
    if state in ("done", "resumable"):
        return []
    needed, free = sum(f.size for f in files), shutil.disk_usage(out.parent).free
    if needed <= free:
        return []
    return [
        OutputError(
            "not enough space for the output",
            code="output.space",
            file=str(out),
            expected=f"{needed} bytes free",
            got=f"{free} bytes",
        )
    ]
