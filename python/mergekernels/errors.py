"""One family of errors: every failure that a user can cause or see is a :class:`MergeError`.

An error names what it is about (tensor, file, recipe line), what was expected, what came and what
to do. It can be turned into a dictionary and back, so that a worker process can return it as a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "ArgumentError",
    "BackendError",
    "DataError",
    "FormatError",
    "InputError",
    "MergeError",
    "OutputError",
    "PlanError",
    "RecipeError",
    "ToolError",
    "cut",
    "nearest",
]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint with the known name most like `name` in small letters, if there is one."""
    from difflib import get_close_matches  # needed only once something is wrong

    by_case = {k.casefold(): k for k in known}
    near = get_close_matches(name.casefold(), list(by_case), n=1, cutoff=0.5)
    return f"Did you mean '{by_case[near[0]]}'?" if near else None


def cut(text: str) -> str:
    """The text as an error shows it: at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "..."


class MergeError(Exception):
    """Base of all errors of this package.

    Parameters
    ----------
    message : one sentence saying what is wrong.
    code : short stable identifier, ``"recipe.unknown-key"`` for example.
    tensor, file, line : where (tensor name; path; 1-based line in that file). None where it does not apply.
    expected, got : what was expected and what came.
    hint : what to do.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        code: str = "error",
        tensor: str | None = None,
        file: str | None = None,
        line: int | None = None,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.code = code
        self.tensor = tensor
        self.file = file
        self.line = line
        self.expected = expected
        self.got = got
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        parts: list[str] = []
        if self.file is not None:
            parts.append(f"{self.file}:{self.line}: " if self.line is not None else f"{self.file}: ")
        elif self.line is not None:
            parts.append(f"line {self.line}: ")
        if self.tensor:  # a tensor of the library may have no name
            parts.append(f"tensor '{self.tensor}': ")
        parts.append(self.message)
        if self.expected is not None:
            parts.append(f"; expected {self.expected}")
        if self.got is not None:
            parts.append(f"; got {self.got}")
        if self.hint is not None:
            parts.append(f". {self.hint}")
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form with the class name under ``"class"``."""
        fields = ("message", "code", "tensor", "file", "line", "expected", "got", "hint")
        return {"class": type(self).__name__, **{f: getattr(self, f) for f in fields}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> MergeError:
        """The inverse of :meth:`to_dict`."""
        fields = dict(data)
        cls = _CLASSES[fields.pop("class")]
        if cls is PlanError:
            return PlanError([MergeError.from_dict(p) for p in fields["problems"]])
        return cls(fields.pop("message"), **fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return (MergeError.from_dict, (self.to_dict(),))


class ArgumentError(MergeError, ValueError):
    """An argument of a library call, or an option of the command, is not usable."""

    exit_code = 2


class RecipeError(MergeError):
    """A recipe has an unknown key, a wrong type, a missing parameter or a value out of range."""

    exit_code = 2


class FormatError(MergeError):
    """A file is malformed: a safetensors header, an index, a config."""

    exit_code = 3


class InputError(MergeError):
    """The inputs do not fit together or to the recipe (missing tensors, shapes, dtypes, files)."""

    exit_code = 3


class PlanError(MergeError):
    """Everything that is wrong with a recipe and its inputs, found in one go; ``problems`` lists it."""

    exit_code = 3

    def __init__(self, problems: list[MergeError]) -> None:
        self.problems = list(problems)
        noun = "problem" if len(problems) == 1 else "problems"
        lines = "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(f"{len(problems)} {noun} found before any data was read:{lines}", code="plan")
        if problems:
            self.exit_code = max(p.exit_code for p in problems)

    def to_dict(self) -> dict[str, Any]:
        """As the parent's, with the problems under ``"problems"``."""
        return {**super().to_dict(), "problems": [p.to_dict() for p in self.problems]}


class BackendError(MergeError):
    """The backend asked for cannot run; the message says why. Nothing falls back silently."""

    exit_code = 4


class ToolError(MergeError):
    """A tool that was to be served by these kernels is not installed, or not as they know it."""

    exit_code = 4


class DataError(MergeError):
    """Tensor values forbid the merge: NaN, Inf, overflow, unequal integer buffers."""

    exit_code = 5


class OutputError(MergeError):
    """Writing, resuming, publishing or verifying an output failed."""

    exit_code = 6


_CLASSES: dict[str, type[MergeError]] = {
    c.__name__: c
    for c in (
        MergeError,
        ArgumentError,
        RecipeError,
        FormatError,
        InputError,
        PlanError,
        BackendError,
        DataError,
        OutputError,
        ToolError,
    )
}
