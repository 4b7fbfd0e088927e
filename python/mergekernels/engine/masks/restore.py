"""From vector and mask back to an expert: base + scale * v where its bit is set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path

from ..._methods.common import Direct
from ..._methods.protocol import Coeffs, MethodInfo, Param, Spec
from ...errors import InputError, PlanError
from ...formats.checkpoint import Checkpoint, open_checkpoint
from ...ops.keep import Marked
from ...ops.program import Program
from ...tensors import dtype_of
from ..events import ProgressSink, RunReport
from ..memory import default_threads
from ..pool import Reader, for_each
from ..resolved import ResolvedMerge, ResolvedTensor, Source
from ..run import SHARD_SIZE, run
from .layout import VECTOR, Masks, mask_name, read_masks

__all__ = ["restore"]

_READ = 1 << 20


class _Restored(Direct):
    """y = x0 + scale * v where the bit is set."""

    info = MethodInfo(
        name="masks restore",
        purpose="An expert from base, vector and mask.",
        formula="y = x0 + scale v where the bit is set, else x0",
        params=(Param("scale", "float", "factor of the vector"),),
        base="required",
        min_models=1,
        max_models=1,
        passes="1 read of base, vector and mask, 1 write",
        source="mergekernels masks compress",
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The vector, as it is, under the mask."""
        return Program((spec.params["scale"],), (Marked(),), subtract=False)


def restore(
    masks: str | PathLike[str],
    expert: str,
    out: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    backend: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: str | int | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    progress: ProgressSink | None = None,
) -> RunReport:
    """Write an expert of a folder of masks as a checkpoint.

    expert : its name, the last part of it, or its number. base : where the base is now, by default where it was.
    Base, vector and mask are read once to compare their digests, and once to compute. Tensors that were not merged
    (integer buffers) are the base's. The other arguments are those of `run`.

    Raises
    ------
    InputError, PlanError : no such expert; another base; masks that were changed or do not fit together.
    """
    found = read_masks(Path(masks))
    number = found.expert(expert)
    merge = _merge(found, number, base)
    _check_digests(found, number, merge, default_threads(threads))
    return run(
        merge,
        out,
        backend=backend,
        device=device,
        threads=threads,
        memory=memory,
        overwrite=overwrite,
        shard_size=shard_size,
        progress=progress,
    )


def _merge(masks: Masks, number: int, base: str | PathLike[str] | None) -> ResolvedMerge:
    """The merge that restores an expert."""
    data = masks.data
    stated = data["base"]
    where = Path(base) if base is not None else Path(stated["path"])
    if not where.exists():
        raise InputError(
            "the base of these masks is gone" if base is None else "no such base",
            code="masks.base",
            file=str(where),
            hint="Name the place where it is now with --base.",
        )
    inputs = (
        open_checkpoint(where, label=stated["label"]),
        open_checkpoint(masks.root / VECTOR, label=VECTOR),
        open_checkpoint(masks.root / mask_name(number), label=mask_name(number)),
    )
    expert = data["experts"][number]
    known = {t["name"]: t for t in data["tensors"]}
    _check_headers(masks, number, inputs)
    tensors = []
    for name in sorted({*inputs[0].tensors}, key=str.encode):
        info, entry = inputs[0].tensors[name], known.get(name)
        if entry is None:
            tensors.append(ResolvedTensor(name, info.shape, info.dtype, "copy", (Source(0, name),)))
            continue
        dtype = dtype_of(entry["restored"][number])
        assert dtype is not None
        action = ResolvedTensor(
            name,
            info.shape,
            dtype,
            "merge",
            (Source(1, name),),
            Source(0, name),
            params={"scale": float(expert["scale"])},
            marks=(Source(2, name),),
        )
        tensors.append(action)
    return ResolvedMerge(
        method="masks restore",
        dialect="default",
        nan="propagate",
        seed=0,
        inputs=inputs,
        tensors=tuple(tensors),
        donor=0,
        tokenizer=0,
        recipe={"masks": str(masks.root), "expert": expert["name"]},
        custom=_Restored(),
    )


def _check_headers(masks: Masks, number: int, inputs: tuple[Checkpoint, ...]) -> None:
    """Refuses a base, a vector or a mask with other tensors than the index says."""
    problems = []
    known = {t["name"] for t in masks.data["tensors"]}
    for what, checkpoint in zip(("vector", "mask"), inputs[1:], strict=True):
        for name in sorted({*checkpoint.tensors} - known):
            problems.append(
                InputError(
                    f"the {what} has a tensor that the index of the masks lacks",
                    code=f"masks.{what}",
                    tensor=name,
                    file=str(checkpoint.path),
                )
            )
    for entry in masks.data["tensors"]:
        name, shape = entry["name"], tuple(entry["shape"])
        expected = ((shape, None), (shape, entry["dtype"]), ((-(-prod(shape) // 8),), "U8"))
        for what, checkpoint, (size, dtype) in zip(("base", "vector", "mask"), inputs, expected, strict=True):
            info = checkpoint.tensors.get(name)
            if info is None or info.shape != size or (dtype is not None and info.dtype.name != dtype):
                problems.append(
                    InputError(
                        f"this is not the {what} of the masks",
                        code=f"masks.{what}",
                        tensor=name,
                        file=str(checkpoint.path),
                        expected=f"{dtype or 'floats'} {list(size)}",
                        got="no such tensor" if info is None else f"{info.dtype.name} {list(info.shape)}",
                    )
                )
    if problems:
        raise problems[0] if len(problems) == 1 else PlanError(list(problems[:20]))


@dataclass(frozen=True)
class _Stored:
    """A tensor to hash, and what it should give."""

    what: str
    checkpoint: Checkpoint
    name: str
    expected: str


def _check_digests(masks: Masks, number: int, merge: ResolvedMerge, threads: int) -> None:
    """Refuses a base, a vector or a mask with other values."""
    base, vector, mask = merge.inputs
    jobs = []
    for entry in masks.data["tensors"]:
        jobs.append(_Stored("base", base, entry["name"], entry["base_sha256"]))
        jobs.append(_Stored("vector", vector, entry["name"], entry["vector_sha256"]))
        jobs.append(_Stored("mask", mask, entry["name"], entry["mask_sha256"][number]))

    def work(drawn: Iterator[_Stored], reader: Reader) -> None:
        memory = memoryview(bytearray(_READ))
        for job in drawn:
            info = job.checkpoint.tensors[job.name]
            path = job.checkpoint.files[info.file].path
            digest = hashlib.sha256()
            for at in range(0, info.nbytes, _READ):
                part = memory[: min(_READ, info.nbytes - at)]
                reader.read(path, part, info.offset + at)
                digest.update(part)
            if digest.hexdigest() != job.expected:
                raise InputError(
                    "this is another base than the one of the masks"
                    if job.what == "base"
                    else f"the {job.what} was changed after it was written",
                    code=f"masks.{job.what}",
                    tensor=job.name,
                    file=str(path),
                    expected=f"SHA-256 {job.expected[:16]}...",
                    got=f"{digest.hexdigest()[:16]}...",
                    hint="Name the base that was compressed with --base." if job.what == "base" else None,
                )

    for_each(jobs, work, threads)
