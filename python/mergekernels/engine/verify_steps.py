"""The steps of a verification. Each compares one kind of thing with the manifest and collects what differs."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MergeError, PlanError
from ..formats.checkpoint import open_checkpoint
from ..formats.safetensors import Header
from ..formats.safetensors import inspect as inspect_header
from .digests import checkpoint_sha256, file_sha256
from .layout import INDEX_NAME
from .manifest import FORMAT, check_form, manifest_digest
from .pool import Reader, for_each
from .staging import MANIFEST_NAME

__all__ = ["Check"]

_READ = 1 << 20  # bytes hashed at a time: they stay in the caches between the copy and the hash


@dataclass(frozen=True)
class _TensorJob:
    """One tensor to hash: where it lies, and what the manifest says of it."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    expected: str


@dataclass
class Check:
    """The state of one verification; problems are collected, never raised."""

    root: Path
    progress: Callable[[int, int], None] | None
    done: int
    problems: list[MergeError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 1
    digests: dict[str, str] = field(default_factory=dict)
    checkpoint_sha256: str | None = None
    _total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def problem(self, message: str, code: str, **where: Any) -> None:
        """Notes one."""
        with self._lock:
            self.problems.append(MergeError(message, code=f"verify.{code}", **where))

    def manifest(self, text: bytes) -> Mapping[str, Any] | None:
        """The manifest, if what it says can be compared with anything."""
        file = str(self.root / MANIFEST_NAME)
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise ValueError("not an object")
        except ValueError as error:
            self.problem(f"the manifest is damaged: {error}", "manifest", file=file)
            return None
        if data.get("format") != FORMAT:
            self.problem(
                "the manifest has another format",
                "manifest-format",
                file=file,
                expected=FORMAT,
                got=str(data.get("format")),
            )
            return None
        computed, stated = manifest_digest(text), data.get("manifest_sha256")
        if computed != stated:
            self.problem(
                "the manifest does not have its own digest",
                "manifest-digest",
                file=file,
                expected=str(stated),
                got=computed,
            )
        try:
            check_form(data)
        except (KeyError, TypeError, ValueError) as error:
            self.problem(f"the manifest is damaged: {type(error).__name__} {error}", "manifest", file=file)
            return None
        return data

    def small_files(self, manifest: Mapping[str, Any]) -> None:
        """Size and digest of each file that is hashed whole."""
        for entry in manifest["small_files"]:
            path = self.root / entry["name"]
            if not self._has_size(path, entry["size"]):
                continue
            try:
                data = path.read_bytes()
            except OSError as error:
                self.problem(f"cannot be read: {error.strerror}", "read", file=str(path))
                continue
            self.done += len(data)
            computed = hashlib.sha256(data).hexdigest()
            if computed != entry["sha256"]:
                self.problem("the file was changed", "digest", file=str(path), expected=entry["sha256"], got=computed)

    def tensor_files(self, manifest: Mapping[str, Any], threads: int) -> None:
        """Headers, then the digest of every tensor, of every file and of the checkpoint."""
        records = {t["name"]: t for t in manifest["tensors"]}
        jobs: list[_TensorJob] = []
        headers: dict[str, Header] = {}
        for entry in manifest["files"]:
            path = self.root / entry["name"]
            if not self._has_size(path, entry["size"]):
                continue
            try:
                header = headers[entry["name"]] = inspect_header(path)
            except MergeError as error:
                self.problems.append(error)
                continue
            jobs += self._jobs(path, header, entry, records)
        self._total = self.done + sum(j.nbytes for j in jobs)
        jobs.sort(key=lambda j: -j.nbytes)
        for_each(jobs, self._hash, threads, self._tick)
        for entry in manifest["files"]:
            if entry["name"] in headers:
                self._file_digest(self.root / entry["name"], headers[entry["name"]], entry)
        if len(self.digests) == len(records):
            self.checkpoint_sha256 = checkpoint_sha256(
                (t["name"], t["dtype"], tuple(t["shape"]), self.digests[t["name"]]) for t in records.values()
            )
            if self.checkpoint_sha256 != manifest["checkpoint_sha256"]:
                self.problem(
                    "the checkpoint's digest is another",
                    "checkpoint",
                    file=str(self.root),
                    expected=manifest["checkpoint_sha256"],
                    got=self.checkpoint_sha256,
                )

    def _jobs(
        self, path: Path, header: Header, entry: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
    ) -> list[_TensorJob]:
        """The tensors of one file, after its header was compared with the manifest."""
        file = str(path)
        ordered = sorted(header.entries.items(), key=lambda item: (item[1].begin, item[1].end))
        for name in header.entries.keys() - set(entry["tensors"]):
            self.problem("the tensor is not in the manifest", "extra-tensor", file=file, tensor=name)
        for name in set(entry["tensors"]) - header.entries.keys():
            self.problem("the tensor is missing", "missing-tensor", file=file, tensor=name)
        jobs = []
        for name, found in ordered:
            record = records.get(name)
            if record is None:
                continue
            expected = (record["dtype"], tuple(record["shape"]), record["file"])
            got = (found.dtype.name, found.shape, path.name)
            if expected != got:
                self.problem(
                    "the header says otherwise than the manifest",
                    "header",
                    file=file,
                    tensor=name,
                    expected=str(expected),
                    got=str(got),
                )
            begin = header.data_start + found.begin
            jobs.append(_TensorJob(name, path, begin, found.nbytes, found.dtype.name, found.shape, record["sha256"]))
        return jobs

    def _hash(self, jobs: Iterator[_TensorJob], reader: Reader) -> None:
        memory = memoryview(bytearray(_READ))
        for job in jobs:
            digest = hashlib.sha256()
            try:
                for start in range(0, job.nbytes, _READ):
                    view = memory[: min(_READ, job.nbytes - start)]
                    reader.read(job.file, view, job.offset + start)
                    digest.update(view)
                    with self._lock:
                        self.done += len(view)
            except MergeError as error:
                with self._lock:
                    self.problems.append(error)
                continue
            computed = digest.hexdigest()
            with self._lock:
                self.digests[job.name] = computed
            if computed != job.expected:
                self.problem(
                    "the data was changed",
                    "digest",
                    file=str(job.file),
                    tensor=job.name,
                    expected=job.expected,
                    got=computed,
                )

    def _file_digest(self, path: Path, header: Header, entry: Mapping[str, Any]) -> None:
        ordered = sorted(header.entries.items(), key=lambda item: (item[1].begin, item[1].end))
        if any(name not in self.digests for name, _ in ordered):
            return
        # The order of empty tensors is not in their offsets; the manifest has it.
        place = {name: i for i, name in enumerate(entry["tensors"])}
        names = sorted((name for name, _ in ordered), key=lambda n: place.get(n, len(place)))
        with path.open("rb") as opened:
            raw = opened.read(header.data_start)
        self.done += len(raw)
        computed = file_sha256(raw, (self.digests[name] for name in names))
        if computed != entry["sha256"]:
            self.problem("the file was changed", "digest", file=str(path), expected=entry["sha256"], got=computed)

    def layout(self, manifest: Mapping[str, Any]) -> None:
        """Index against headers, and both against the manifest, as a reader of the folder sees them."""
        names = {e["name"] for e in manifest["small_files"]}
        if len(manifest["files"]) > 1 and INDEX_NAME not in names:
            self.problem("several files and no index", "index", file=str(self.root))
        try:
            seen = open_checkpoint(self.root)
        except PlanError as error:
            self._add_new(error.problems)
            return
        except MergeError as error:
            self._add_new([error])
            return
        for warning in seen.warnings:
            self.problem(warning, "index", file=str(self.root))
        listed = {t["name"] for t in manifest["tensors"]}
        if listed != set(seen.tensors):
            self.problem(
                "a reader of the folder sees other tensors than the manifest lists",
                "tensors",
                file=str(self.root),
                expected=f"{len(listed)} tensors",
                got=f"{len(seen.tensors)}",
            )

    def _add_new(self, errors: list[MergeError]) -> None:
        """Adds problems that were not found before."""
        known = {str(p) for p in self.problems}
        self.problems += [e for e in errors if str(e) not in known]

    def extra_files(self, manifest: Mapping[str, Any]) -> None:
        """What lies in the folder besides. A model file is a problem, since a reader may load it; the rest is noted."""
        known = {MANIFEST_NAME} | {e["name"] for key in ("files", "small_files") for e in manifest[key]}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if name in known or path.is_dir():
                continue
            if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") and path.parent == self.root:
                self.problem("a model file that is not in the manifest", "extra-file", file=str(path))
            else:
                self.notes.append(f"{name} is not in the manifest")

    def _has_size(self, path: Path, size: int) -> bool:
        """Whether a regular file of this size is there; else a problem is noted."""
        self.files += 1
        try:
            found = path.stat()
        except OSError as error:
            self.problem(f"the file is not there: {error.strerror}", "missing-file", file=str(path))
            return False
        if not stat.S_ISREG(found.st_mode):
            self.problem("not a regular file", "missing-file", file=str(path))
            return False
        if found.st_size != size:
            self.problem(
                "the size is another", "size", file=str(path), expected=f"{size} bytes", got=str(found.st_size)
            )
            return False
        return True

    def _tick(self) -> None:
        if self.progress is not None:
            self.progress(min(self.done, self._total), self._total)
