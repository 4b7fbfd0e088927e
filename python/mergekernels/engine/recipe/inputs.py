"""Model references to opened checkpoints: local paths, then the hub cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...errors import InputError, MergeError, PlanError, RecipeError, cut
from ...formats.checkpoint import Checkpoint, open_checkpoint
from ...formats.hub import looks_like_hub, snapshot
from ..adapted import adapt
from .source import Document
from .values import Reference, nearest

__all__ = ["Inputs"]


class Inputs:
    """The checkpoints of a recipe in order of first use, each opened once.

    located : where models are, by label; a model that is not there is looked for.
    """

    def __init__(self, document: Document, located: Mapping[str, Path] | None = None) -> None:
        self.document = document
        # `./b` finds what was recorded as `b`: the two were one input.
        self.located = {os.path.normpath(label): path for label, path in (located or {}).items()}
        self.checkpoints: list[Checkpoint] = []
        self.problems: list[MergeError] = []
        self._known: dict[str, int] = {}
        self._opened: dict[str, Checkpoint] = {}
        self._labels: dict[str, int] = {}
        self.failed: set[str] = set()

    def add(self, reference: Reference, loc: tuple[str | int, ...]) -> int | None:
        """The position of a model among the inputs; None if it cannot be opened (then a problem is noted)."""
        label = str(reference)
        if label in self.failed:
            return None
        try:
            written = os.path.normpath(label)
            model, adapter = self._parts(reference)
            path = self.located.get(written) or self.locate(model)
            # `b` and `./b` are one input; a link to it is another, which lets one model be merged twice on purpose.
            key = written if written in self.located else os.path.abspath(path)
            lora = None if adapter is None else self.locate(adapter, what="adapter")
            if lora is not None:
                key += "+" + os.path.abspath(lora)
            if key in self._known:
                self._labels[label] = self._known[key]
                return self._known[key]
            checkpoint = self._open(path, label)
            if lora is not None:
                checkpoint = adapt(checkpoint, lora, label)
        except MergeError as error:
            self.failed.add(label)
            for problem in error.problems if isinstance(error, PlanError) else [error]:
                line = self.document.line(loc)
                if problem.file is None:
                    problem.file, problem.line = self.document.file or None, line
                elif line is not None and "+" in label:
                    # The file is the adapter's, or that of the model under it.
                    named = f"Named on line {line} of the recipe"
                    problem.hint = f"{problem.hint}. {named}" if problem.hint else named
                self.problems.append(problem)
            return None
        position = self._known[key] = self._labels[label] = len(self.checkpoints)
        self.checkpoints.append(checkpoint)
        return position

    def position(self, label: str) -> int:
        """The position of a model that was added under this name."""
        return self._labels[label]

    def _open(self, path: Path, label: str) -> Checkpoint:
        """A model's headers, read once however many adapters are on it."""
        known = self._opened.get(os.path.abspath(path))
        if known is not None:
            return replace(known, label=label)
        checkpoint = open_checkpoint(path, label=label)
        _refuse_quantised(checkpoint)
        self._opened[os.path.abspath(path)] = checkpoint
        return checkpoint

    def _parts(self, reference: Reference) -> tuple[Reference, Reference | None]:
        """The model, and the adapter on it: `model+adapter`, unless a file has that name."""
        path = reference.path
        if reference.exact or reference.lora is not None or "+" not in path or self._local(path) is not None:
            return replace(reference, lora=None), reference.lora
        model, _, adapter = path.partition("+")
        if not model or not adapter or "+" in adapter:
            raise RecipeError(
                "a model reference with one adapter is model+adapter",
                code="recipe.reference",
                got=repr(cut(path)),
                hint="A path with '+' in it is written {path: ...}",
            )
        return Reference(model), Reference(adapter)

    def locate(self, reference: Reference, what: str = "model") -> Path:
        """The folder or file of a model, or of an adapter.

        Relative paths count from the current directory, then from the recipe's folder.
        """
        path = reference.path
        local = self._local(path)
        if reference.revision is None and local is not None:
            return local
        revision = reference.revision
        if not reference.exact:
            if path.count("@") > 1:
                raise RecipeError("model reference with several '@'", code="recipe.reference", got=repr(cut(path)))
            path, _, after = path.partition("@")
            revision = after or None
            local = self._local(path)
        if local is not None:
            raise RecipeError(
                "a local folder has no revisions",
                code="recipe.reference",
                got=repr(cut(str(reference))),
                hint="Remove it",
            )
        if looks_like_hub(path):
            return snapshot(path, revision)
        try:
            siblings = os.listdir(Path(path).parent)
        except (OSError, ValueError):
            siblings = []
        raise InputError(
            f"{what} '{cut(path)}' does not exist",
            code=f"{what}.missing",
            expected="a folder, a safetensors file, or org/name in the hub cache",
            hint=nearest(Path(path).name, siblings),
        )

    def _local(self, path: str) -> Path | None:
        for candidate in (Path(os.path.expanduser(path)), self.document.folder / path):
            try:
                if candidate.exists():
                    return candidate
            except (OSError, ValueError):
                continue
        return None


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    """Codes are never averaged."""
    config = checkpoint.config.get("quantization_config")
    if config:
        method = config.get("quant_method") if isinstance(config, dict) else None
        raise InputError(
            f"quantised checkpoint ({method or 'quantization_config in config.json'})",
            code="input.quantised",
            file=str(checkpoint.path),
            expected="float16, bfloat16, float32 or float64 weights",
            hint="Dequantise it first; reading quantised inputs is planned",
        )
