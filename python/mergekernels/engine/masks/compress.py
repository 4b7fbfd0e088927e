"""From experts to one vector and one packed bit per weight each."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ..._backends.dispatch import require
from ..._methods.protocol import Coeffs, Round
from ...errors import ArgumentError, InputError, MergeError, PlanError
from ...formats.safetensors import build_header
from ...formats.safetensors import layout as place
from ...tensors import CANONICAL_BLOCK, DType, dtype_of
from ..adapted import AdaptedCheckpoint
from ..committer import Committer
from ..context import Context
from ..events import Progress, ProgressSink
from ..fileops import fsync_dir, output_error, publish_swap, write_small
from ..identity import canonical_json
from ..inputs import Stream, streams_of
from ..io import Io
from ..layout import OutputFile, PlacedTensor
from ..memory import cut_budget, memory_limit
from ..plan import Plan, make_plan
from ..readahead import ReadAhead
from ..receipts import Receipt
from ..resolved import ResolvedMerge, sources_of
from ..scheduler import Scheduler
from ..staging import Staging
from ..target import check_target
from ..unit import Unit, sync_failure
from ..waves import run_waves
from .buffers import warn_of_unequal
from .index import contents, experts_of, scales_of
from .job import CompressJob, Found, MaskWorker
from .layout import FORMAT, INDEX, VECTOR, index_bytes, mask_name

__all__ = ["CompressReport", "compress"]

_KINDS: dict[str, Literal["agreeing", "useful"]] = {"emr": "agreeing", "tall_mask": "useful"}
"""Method -> which marks of its program are the masks."""

_WHOLE = 1 << 62


@dataclass(frozen=True)
class CompressReport:
    """out : the folder. experts : names. scales : of each. bytes_in : of base and experts. bytes_out : written.

    seconds : wall time. memory : the budget; peak_tensor_memory : most bytes of it in use.
    """

    out: str
    experts: tuple[str, ...]
    scales: tuple[float, ...]
    bytes_in: int
    bytes_out: int
    seconds: float
    memory: int
    peak_tensor_memory: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def compress(
    recipe: str | PathLike[str] | ResolvedMerge,
    out: str | PathLike[str],
    *,
    backend: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: str | int | None = None,
    lenient: bool = False,
    progress: ProgressSink | None = None,
    tile: int | None = None,
    io: Io | None = None,
) -> CompressReport:
    """Write the vector of a recipe with method `emr` or `tall_mask`, and the mask of each of its models, to `out`.

    The vector has the recipe's out_dtype (else dtype, else the inputs' common dtype). `out` is absent until it is
    complete. lambda, which scales a merge, has no effect; a warning says so. One read of base and models (more where
    the method measures first). tile : elements, to force it (tests).

    Raises
    ------
    ArgumentError : another method, or one that measures every tensor by itself. RecipeError, InputError, PlanError,
    DataError, OutputError, BackendError : as `run`.
    """
    start = time.monotonic()
    io = io or Io()
    merge = recipe if isinstance(recipe, ResolvedMerge) else _resolved(recipe, lenient)
    if merge.method not in _KINDS or merge.then:
        raise ArgumentError(
            f"{merge.method} has no masks" if merge.method not in _KINDS else "then: does not go with masks",
            code="masks.method",
            expected="merge_method: " + " or ".join(_KINDS),
            got=merge.method + ("" if not merge.then else ", then " + ", ".join(n for n, _ in merge.then)),
        )
    plan = make_plan(
        merge,
        memory=memory,
        threads=threads,
        backend=backend,
        device=device,
        out=None,
        shard_size=_WHOLE,
        io=io,
    )
    if not plan.specs.members:
        raise ArgumentError("there is no tensor to compress", code="masks.empty", expected="floating tensors")
    target = Path(os.path.abspath(out))
    problems: list[MergeError] = check_target(target, merge, ())
    if any(isinstance(c, AdaptedCheckpoint) for c in merge.inputs):
        problems.append(
            InputError(
                "masks are made of full models, not of adapters on one",
                code="masks.adapters",
                hint="Write the models first with `mergekernels lora apply`.",
            )
        )
    if problems:
        raise PlanError(problems)
    run = _Compression(_budgeted(plan, memory, device, tile), target, io, progress)
    try:
        digest = run.run()
    except OSError as error:
        raise output_error("the output cannot be written", error.filename or target, error) from error
    finally:
        run.ctx.inputs.close()
        run.staging.unlock()
    return replace(digest, seconds=time.monotonic() - start)


def _resolved(recipe: str | PathLike[str], lenient: bool) -> ResolvedMerge:
    from ..recipe import load_recipe, resolve

    return resolve(load_recipe(recipe, lenient=lenient, collect=True))


def _budgeted(plan: Plan, memory: str | int | None, device: str, tile: int | None) -> Plan:
    """The plan with a budget that also holds task vectors and masks."""
    specs = [plan.specs.spec(i) for i in plan.specs.members]
    models = max((s.num_models for s in specs), default=1)
    wide = max((8 if s.compute.name == "F64" else 4 for s in specs), default=4)
    itemsize = max(plan.budget.itemsize, wide)
    blocks = -(-max((s.n for s in specs), default=1) // CANONICAL_BLOCK)
    budget = cut_budget(
        memory_limit(memory),
        plan.budget.threads,
        2 * models + 1 + -(-models // (8 * itemsize)),
        itemsize,
        max(plan.survey.floor, 8 * 4 * models * blocks),
        tile=tile,
        best=max(plan.budget.tile * plan.budget.itemsize, CANONICAL_BLOCK * itemsize),
    )
    return replace(plan, budget=budget)


class _Compression:
    """One run of `compress`."""

    def __init__(self, plan: Plan, out: Path, io: Io, progress: ProgressSink | None) -> None:
        self.plan = plan
        self.io = io
        self.progress = progress
        self.kind = _KINDS[plan.merge.method]
        self.ctx = Context.of(plan, io)
        self.members = plan.specs.members
        self.models = plan.specs.spec(self.members[0]).num_models
        self.files = self._files()
        identity = [FORMAT, plan.hash, [f.header_sha256 for f in self.files]]
        self.staging = Staging(io, out, hashlib.sha256(canonical_json(identity)).hexdigest())
        self.found = {i: Found() for i in self.members}

    def _files(self) -> list[OutputFile]:
        merge = self.plan.merge
        byte = dtype_of("U8")
        assert byte is not None
        vector = [(merge.tensors[i].name, merge.tensors[i].dtype, merge.tensors[i].shape) for i in self.members]
        bits: list[tuple[str, DType, tuple[int, ...]]] = [(n, byte, (-(-prod(s) // 8),)) for n, _, s in vector]
        found = [_file(VECTOR, vector, self.members)]
        return found + [_file(mask_name(m), bits, self.members) for m in range(self.models)]

    def run(self) -> CompressReport:
        """Everything between the lock and the report."""
        plan, budget = self.plan, self.plan.budget
        needs = plan.survey.features | {"mark"} | ({"reduce"} if self.kind == "agreeing" else set())
        require(self.ctx.backend, needs)
        self.staging.enter(overwrite=False)
        slots, mask_bytes = 2 * self.models + 2, budget.tile // 8
        workers = [MaskWorker(slots, budget.buffer, self.models, mask_bytes) for _ in range(budget.threads)]
        scheduler: Scheduler[MaskWorker] = Scheduler(workers, budget.window, budget.pool)
        coeffs = run_waves(self.ctx, self.staging, scheduler, lambda d, t, n: self._tell("measure", d, t, n))  # type: ignore[arg-type]
        receipts = self._merge(scheduler, coeffs)
        warn_of_unequal(self.ctx, workers[0])
        scales = scales_of(self.kind, self.models, [self.found[i] for i in self.members])
        text = index_bytes(contents(plan.merge, self.files, receipts, self.found, scales))
        write_small(self.io, self.staging.temporary(INDEX), self.staging.tree / INDEX, text)
        fsync_dir(self.io, self.staging.tree)
        publish_swap(self.io, self.staging.tree, self.staging.out, self.staging.root / "replaced", replace=False)
        self.staging.remove()
        fsync_dir(self.io, self.staging.out.parent)
        tiles = sum(len(w.tiles.buffers) * w.tiles.nbytes + len(w.masks.buffers) * w.masks.nbytes for w in workers)
        return CompressReport(
            str(self.staging.out),
            tuple(experts_of(plan.merge, self.members)),
            tuple(scales),
            plan.bytes_in,
            sum(f.size for f in self.files) + len(text),
            0.0,
            budget.limit,
            tiles + scheduler.peak,
            (*plan.warnings, *self._warnings(), *sorted(self.ctx.warnings)),
        )

    def _warnings(self) -> list[str]:
        scaled = any(self.plan.specs.spec(i).params["lambda"] != 1.0 for i in self.members)
        return ["lambda has no effect here: an expert is base + scale * vector under its mask"] if scaled else []

    def _tell(self, phase: str, done: int, total: int, name: str) -> None:
        if self.progress is not None:
            try:
                self.progress(Progress(phase, done, total, 0, name))  # type: ignore[arg-type]
            except Exception:
                self.progress = None

    def _coeffs(self, index: int, common: Coeffs | None) -> Coeffs:
        if common is not None:
            return common
        spec = self.plan.specs.spec(index)
        state = self.plan.method.start(spec)
        if isinstance(state, Round):
            raise ArgumentError(
                "masks are not made of what each tensor measures by itself",
                code="masks.scope",
                tensor=spec.name,
                expected="a method that measures nothing, or the whole model (scope: model)",
                got=f"{self.plan.merge.method} with scope: tensor",
            )
        return state

    def _merge(self, scheduler: Scheduler[MaskWorker], common: Coeffs | None) -> list[Receipt]:
        plan = self.plan
        coeffs = {i: self._coeffs(i, common) for i in self.members}
        units = [Unit(self.io, self.staging, self.staging.plan_hash, n, f) for n, f in enumerate(self.files)]
        placed = [{t.index: t for t in f.tensors} for f in self.files]
        committer = Committer(scheduler.fail)
        streams = self._streams
        order = [t.index for t in self.files[0].tensors]
        ahead = ReadAhead(self.ctx.inputs, (streams(i) for i in order), scheduler.fail)

        def jobs() -> Iterator[CompressJob]:
            for i in order:
                outputs = [(unit, p[i]) for unit, p in zip(units, placed, strict=True)]
                yield CompressJob(
                    self.ctx,
                    i,
                    coeffs[i],
                    self.kind,
                    outputs,
                    ahead.passed,
                    committer.sync,
                    committer.commit,
                    self.found[i],
                )

        total = plan.bytes_in

        def tick(done: int, name: str) -> None:
            self._tell("merge", min(done, total), total, name)

        try:
            with committer, ahead:
                scheduler.run(jobs(), tick, reserved=plan.survey.held)
            if committer.error is not None:
                raise committer.error
            if committer.failed:
                unit, error = committer.failed[0]
                raise sync_failure(unit.file, error)
        finally:
            for unit in units:
                unit.abandon()
        return committer.receipts

    def _streams(self, index: int) -> list[Stream]:
        return streams_of(self.plan.merge.inputs, sources_of(self.plan.merge.tensors[index]), self.ctx.inputs.first)


def _file(name: str, tensors: Sequence[tuple[str, DType, tuple[int, ...]]], members: Sequence[int]) -> OutputFile:
    entries = place(tensors)
    header = build_header(entries, {"format": "pt"})
    where = {n: i for (n, _, _), i in zip(tensors, members, strict=True)}
    placed = tuple(PlacedTensor(where[n], n, len(header) + e.begin, e.nbytes) for n, e in entries.items())
    return OutputFile(name, header, len(header) + sum(t.nbytes for t in placed), placed)
