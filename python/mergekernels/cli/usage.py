"""Arguments to a command, and wrong usage to the same message and JSON object as every other error."""

from __future__ import annotations

import re
from typing import Any

from typer import Abort, BadParameter

from ..errors import ArgumentError
from .app import app
from .output import Output

__all__ = ["parsed"]

# Typer brings its own click or uses an installed one, by its version.
_Wrong: type[Exception] = next(c for c in BadParameter.__mro__ if c.__name__ == "ClickException")
_LONG = re.compile(r"'[^']{81,}'|\S{81,}")


def parsed(arguments: list[str]) -> int:
    """Runs the command that the arguments name; the exit status where it raises none."""
    try:
        status = app(arguments, prog_name="mergekernels", standalone_mode=False)
    except Abort:
        return 130
    except _Wrong as wrong:
        return _refused(wrong, arguments)
    return status if isinstance(status, int) else 0


def _refused(wrong: Any, arguments: list[str]) -> int:
    """Says what is wrong with the arguments."""
    if not arguments:
        # Nothing was asked for: what comes is the help.
        wrong.show()
        return int(wrong.exit_code)
    context = getattr(wrong, "ctx", None)
    command, usage, hint = "", None, None
    if context is not None:
        command = context.info_name if context.parent is not None else ""
        usage = " ".join(context.get_usage().removeprefix("Usage:").split())
        hint = f"See '{context.command_path} --help'"
    message = _LONG.sub(lambda m: m[0][:77] + "...", " ".join(wrong.format_message().split()))
    message = message[:1].lower() + message[1:].rstrip(".")
    error = ArgumentError(message, code="usage", expected=usage, hint=hint)
    Output(command, as_json="--json" in arguments).error(error)
    return error.exit_code
