"""What the command says, and where: results to stdout, everything else to stderr; a closed pipe never ends the work."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from ..errors import MergeError, PlanError

__all__ = ["Output"]


class Output:
    """The two streams of one command.

    command : its name, repeated in every JSON object.
    as_json : one JSON object per line on stdout and no other text there.
    quiet : nothing but errors.
    """

    def __init__(self, command: str, *, as_json: bool = False, quiet: bool = False) -> None:
        self.command = command
        self.as_json = as_json
        self.quiet = quiet

    def result(self, data: Any, text: str) -> None:
        """The result of the command, as text or as the JSON object that ends the output."""
        if self.as_json:
            self.event("result", result=data)
        elif not self.quiet:
            _write(sys.stdout, text + "\n")

    def event(self, kind: str, **fields: Any) -> None:
        """One JSON object on a line."""
        _write(sys.stdout, json.dumps({"event": kind, "command": self.command, **fields}, allow_nan=False) + "\n")

    def note(self, text: str) -> None:
        """A line for people on stderr."""
        if not self.quiet:
            _write(sys.stderr, text + "\n")

    def error(self, error: MergeError) -> None:
        """One message on stderr, and the same as an object on stdout for machines."""
        _write(sys.stderr, _error_text(error) + "\n")
        if self.as_json:
            self.event("error", exit_code=error.exit_code, error=error.to_dict())


def _error_text(error: MergeError) -> str:
    if isinstance(error, PlanError) and error.problems:
        noun = "problem" if len(error.problems) == 1 else "problems"
        lines = [f"error: {len(error.problems)} {noun} found before any data was read"]
        return "\n".join(lines + [f"  - {p} [{p.code}]" for p in error.problems])
    return f"error: {error} [{error.code}]"


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        # The reader is gone, or the disk behind a redirection is full. What follows goes nowhere, the merge goes on.
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            pass
