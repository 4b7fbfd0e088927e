"""Verification of a published folder: every byte is read again and compared with the manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, InputError, MergeError
from .memory import default_threads
from .staging import MANIFEST_NAME
from .verify_steps import Check

__all__ = ["MANIFEST_NAME", "VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    ok : no problem. problems : each as a `MergeError` with file, tensor, expected and got.
    notes : files that the manifest does not list and that nothing loads, and other oddities.
    checkpoint_sha256 : from the bytes read, None if some could not be. bytes_read : of OUT.
    recomputed : names of the tensors that were computed again from the inputs.
    """

    out: str
    ok: bool
    problems: tuple[MergeError, ...]
    notes: tuple[str, ...]
    files: int
    tensors: int
    checkpoint_sha256: str | None
    recomputed: tuple[str, ...]
    bytes_read: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["problems"] = [p.to_dict() for p in self.problems]
        return data


def verify(
    out: str | os.PathLike[str],
    *,
    recompute: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Re-reads every file of a folder that `run` published and recomputes all digests, the manifest's own included.

    Any single changed byte is found, as are missing files, and an index that does not fit the headers.

    recompute : tensors to compute again from the inputs with the reference backend (which imports torch); the sample is
        determined by the checkpoint's hash. threads : readers. progress : called with (bytes done, bytes in all).

    Raises
    ------
    InputError : not a folder that this package published; or `recompute` and the inputs are gone or were changed.
    ArgumentError : an option is not usable.
    """
    if recompute < 0:
        raise ArgumentError(
            "recompute is not a count", code="verify.recompute", expected="at least 0", got=str(recompute)
        )
    count = default_threads(threads)
    started = time.monotonic()
    root = Path(out)
    text = _read_manifest(root)
    check = Check(root, progress, len(text))
    manifest = check.manifest(text)
    if manifest is not None:
        check.small_files(manifest)
        check.tensor_files(manifest, count)
        check.layout(manifest)
        check.extra_files(manifest)
    recomputed: tuple[str, ...] = ()
    if recompute and manifest is not None and not check.problems:
        from .recompute import recompute_sample

        recomputed, wrong, notes = recompute_sample(root, manifest, recompute)
        check.problems += wrong
        check.notes += notes
    return VerifyReport(
        out=os.fspath(out),
        ok=not check.problems,
        problems=tuple(check.problems),
        notes=tuple(check.notes),
        files=check.files,
        tensors=len(check.digests),
        checkpoint_sha256=check.checkpoint_sha256,
        recomputed=recomputed,
        bytes_read=check.done,
        seconds=time.monotonic() - started,
    )


def _read_manifest(root: Path) -> bytes:
    if not root.is_dir():
        raise InputError("no such folder", code="verify.missing", file=str(root))
    try:
        return (root / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"there is no {MANIFEST_NAME}: this folder was not published by mergekernels",
            code="verify.no-manifest",
            file=str(root),
            hint="`mergekernels diff A B` compares any two checkpoints.",
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", code="verify.read", file=str(root / MANIFEST_NAME)
        ) from error
