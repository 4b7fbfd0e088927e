"""Sampled tensors of a published folder computed again from the inputs, by the reference backend.

It shares the methods and the reader of recipes with the run, and neither kernels, tiles nor scheduler: tensors go
through the in-memory driver in chunks.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _cpu
from .._methods.whole import whole_of
from .._native import torch_dtype, view_of
from .._rounds import resolve_scope
from ..errors import InputError, MergeError, PlanError
from ..formats.checkpoint import Checkpoint, open_checkpoint
from ..merging import Call
from ..ops.assembly import alignment
from ..ops.inputs import Inputs
from ..tensors import Piece
from .adapted import AdaptedCheckpoint
from .fileinputs import FileInputs, load_tensor, pieces_of
from .identity import NUMERIC_POLICY, input_identities
from .pool import Reader
from .resolved import ResolvedMerge, ResolvedTensor, sources_of
from .specs import Specs, method_of

if TYPE_CHECKING:
    import torch

    from .._methods.protocol import Coeffs, Spec

__all__ = ["recompute_sample", "sample_names"]


def sample_names(names: Sequence[str], digest: str, count: int) -> list[str]:
    """`count` of the names, determined by the checkpoint's digest; ascending."""

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{digest}/{name}".encode()).digest()

    return sorted(sorted(names, key=place)[:count], key=str.encode)


def recompute_sample(
    root: Path, manifest: Mapping[str, Any], count: int
) -> tuple[tuple[str, ...], list[MergeError], list[str]]:
    """(names computed again, problems, notes) for `count` tensors of the folder `root`, whose digests were found right.

    Memory: chunks of 2^20 elements of every source (or of whole rows, or of 4096 rows for dot products by column), with
    the reference's temporaries. Scope "model" reads all inputs.

    Raises
    ------
    InputError : an input is gone or was changed, or this version computes by other rules than the one that published;
        a method of tier T2.
    """
    merge = _merge(manifest)
    if whole_of(method_of(merge)) is not None:
        raise InputError(
            f"{merge.method} is a method of tier T2, whose last bits depend on the machine: nothing can be recomputed",
            code="verify.tier",
            hint="Run the recipe again here, and compare the two with `mergekernels diff`.",
        )
    if any(isinstance(c, AdaptedCheckpoint) for c in merge.inputs):
        raise InputError(
            "tensors that adapters make in the merge are not recomputed",
            code="verify.adapters",
            hint="Run the recipe again, and compare the two with `mergekernels diff`.",
        )
    notes = _compare_inputs(merge, manifest)
    published = open_checkpoint(root)
    names = sample_names([t["name"] for t in manifest["tensors"]], manifest["checkpoint_sha256"], count)
    again = _Again(merge, published)
    try:
        problems = [p for name in names if (p := again.compare(name)) is not None]
    finally:
        again.close()
    return tuple(names), problems, notes


def _merge(manifest: Mapping[str, Any]) -> ResolvedMerge:
    """The merge that the manifest describes, against the inputs as they are now."""
    from .recipe import load_recipe, resolve

    policy = manifest["versions"]["numeric_policy"]
    if policy != NUMERIC_POLICY:
        raise InputError(
            "the merge was made by a version with other rules of arithmetic, nothing can be recomputed",
            code="verify.policy",
            expected=f"numeric policy {NUMERIC_POLICY}",
            got=f"{policy}, mergekernels {manifest['versions']['mergekernels']}",
            hint="Verify with that version.",
        )
    located = {i["label"]: Path(i["path"]) for i in manifest["inputs"]}
    for label, path in located.items():
        if not path.exists():
            raise InputError(
                f"the input '{label}' of this merge is gone",
                code="verify.inputs",
                file=str(path),
                hint="Recomputing needs the inputs where they were. Without --recompute no input is needed.",
            )
    # The template may be a file beside the recipe, and makes no tensor.
    data = {key: value for key, value in manifest["recipe"].items() if key != "chat_template"}
    try:
        return resolve(load_recipe(data, lenient=True), seed=manifest["seed"], located=located)
    except MergeError as error:
        problems = error.problems if isinstance(error, PlanError) else [error]
        raise InputError(
            f"the inputs of this merge cannot be opened: {'; '.join(map(str, problems))}",
            code="verify.inputs",
            hint="Recomputing needs the inputs as they were. Without --recompute no input is needed.",
        ) from error


def _compare_inputs(merge: ResolvedMerge, manifest: Mapping[str, Any]) -> list[str]:
    """Refuses inputs whose files differ from those that were merged; notes those that only have another time."""
    notes = []
    now = input_identities(merge)
    if len(now) != len(manifest["inputs"]):
        raise InputError(
            "the recipe names another number of inputs now",
            code="verify.inputs",
            expected=str(len(manifest["inputs"])),
            got=str(len(now)),
        )
    for found, stated in zip(now, manifest["inputs"], strict=True):
        for key in ("size", "header_sha256"):
            was, is_ = ([(f["name"], f[key]) for f in side["files"]] for side in (stated, found))
            if was != is_:
                name = next((a[0] for a, b in zip(was, is_, strict=False) if a != b), "its list of files")
                raise InputError(
                    f"the input '{stated['label']}' was changed since the merge: {name}",
                    code="verify.input-changed",
                    file=str(found["path"]),
                    hint="Recomputing needs the inputs as they were. Without --recompute no input is needed.",
                )
        if [f["mtime_ns"] for f in stated["files"]] != [f["mtime_ns"] for f in found["files"]]:
            notes.append(
                f"files of the input '{stated['label']}' have another modification time than when they were merged"
            )
    return notes


class _Again:
    """Computes tensors of a merge again."""

    def __init__(self, merge: ResolvedMerge, published: Checkpoint) -> None:
        from .._backends.dispatch import load

        self._merge = merge
        self._published = published
        self._method = method_of(merge)
        self._specs = Specs(merge, self._method)
        self._call = Call(self._method, {}, merge.dialect, merge.nan, merge.seed, "reference", 1, 0)
        self._backend = load("reference")
        self._index = {t.name: i for i, t in enumerate(merge.tensors)}
        self._members = set(self._specs.members)
        self._common: Coeffs | None = None
        self._reader = Reader()

    def close(self) -> None:
        """Closes the files."""
        self._reader.close()

    def compare(self, name: str) -> MergeError | None:
        """The problem with one published tensor, None if recomputing gives its bytes."""
        index = self._index.get(name)
        stored = self._published.tensors[name]
        tensor = None if index is None else self._merge.tensors[index]
        if index is None or tensor is None or (tensor.dtype, tensor.shape) != (stored.dtype, stored.shape):
            return MergeError("the recipe does not make this tensor now", code="verify.recompute", tensor=name)
        if index in self._members:
            return self._compare_merged(index, tensor)
        return self._compare_copied(tensor)

    def _compare_merged(self, index: int, tensor: ResolvedTensor) -> MergeError | None:
        import torch

        spec = self._specs.spec(index)
        program = self._method.apply(spec, self._coeffs(index))
        inputs = self._inputs(index).cut(alignment(program.slab))
        wrong, first = 0, -1
        for shard, piece in enumerate(inputs.pieces):
            base, models = inputs.views(shard)
            out = torch.empty(piece.numel, dtype=torch_dtype(tensor.dtype))
            self._backend.stream(
                program, piece, base, models, view_of(out), compute=spec.compute, stats=None, threads=1
            )
            found = self._against_published(tensor.name, out, piece)
            if found[0] and not wrong:
                first = piece.g0 + found[1]
            wrong += found[0]
        return self._problem(tensor.name, wrong, first)

    def _compare_copied(self, tensor: ResolvedTensor) -> MergeError | None:
        source = tensor.base or tensor.models[0]
        wrong, first = 0, -1
        for piece in pieces_of(prod(tensor.shape)):
            original = load_tensor(self._reader, self._merge.inputs[source.input], source.tensor, piece, 0)
            found = self._against_published(tensor.name, original, piece)
            if found[0] and not wrong:
                first = piece.g0 + found[1]
            wrong += found[0]
        return self._problem(tensor.name, wrong, first)

    def _against_published(self, name: str, out: torch.Tensor, piece: Piece) -> tuple[int, int]:
        """(elements whose bytes differ, the first of them)."""
        info = self._published.tensors[name]
        nbytes = piece.numel * info.dtype.itemsize
        raw = bytearray(max(1, nbytes))
        memory = (ctypes.c_char * len(raw)).from_buffer(raw)
        path = self._published.files[info.file].path
        self._reader.read(path, memoryview(raw)[:nbytes], info.offset + piece.g0 * info.dtype.itemsize, slot=-1)
        dtype = info.dtype.name
        found = _cpu.compare(out.data_ptr(), dtype, ctypes.addressof(memory), dtype, piece.numel, False)
        return found[0], found[1]

    def _problem(self, name: str, wrong: int, first: int) -> MergeError | None:
        if not wrong:
            return None
        return MergeError(
            f"recomputing from the inputs gives other values in {wrong} elements, the first at flat index {first}",
            code="verify.recompute",
            tensor=name,
        )

    def _coeffs(self, index: int) -> Coeffs:
        if self._specs.scope == "tensor":
            return self._resolve([self._specs.spec(index)], [self._inputs(index)])
        if self._common is None:
            members = self._specs.members
            specs = [self._specs.spec(i) for i in members]
            self._common = self._resolve(specs, [self._inputs(i) for i in members])
        return self._common

    def _resolve(self, specs: list[Spec], tensors: list[Inputs]) -> Coeffs:
        call = self._call
        return resolve_scope(call.method, specs, tensors, self._backend, call.threads, call.nan)

    def _inputs(self, index: int) -> FileInputs:
        tensor, spec = self._merge.tensors[index], self._specs.spec(index)
        return FileInputs(
            name=tensor.name,
            tensor=spec.tensor,
            n=spec.n,
            num_models=len(tensor.models),
            has_base=spec.has_base,
            compute=spec.compute,
            sharded=True,
            pieces=pieces_of(spec.n),
            tensors=(),
            merge=self._merge,
            sources=sources_of(tensor),
            cast=tensor.cast,
            companions=tensor.companions,
            reader=self._reader,
            shape=tensor.shape,
            labels=tuple(self._merge.inputs[s.input].label for s in tensor.models),
        )
