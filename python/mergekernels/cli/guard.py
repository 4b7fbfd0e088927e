"""What every command does around its work: signals, errors to messages, exit codes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..errors import MergeError
from .output import Output
from .signals import Interrupted, orderly

__all__ = ["guarded", "show_tracebacks"]

_tracebacks = False


def show_tracebacks() -> None:
    """Lets errors through with their tracebacks, for reports of bugs."""
    global _tracebacks
    _tracebacks = True


def guarded(output: Output, work: Callable[[], int], *, interrupted: str = "") -> None:
    """Runs `work` and exits with the status it returns, or with the one that fits its error.

    interrupted : a sentence for people who stop the command, about what is left on disk.
    """
    logging.getLogger("mergekernels").addHandler(_Warnings(output))
    try:
        with orderly():
            status = work()
    except Interrupted as stop:
        name = "Ctrl-C" if stop.number == 2 else "termination request"
        output.error(
            _Stopped(f"stopped by {name}", code="interrupted", hint=interrupted or None).with_exit(stop.number)
        )
        status = 128 + stop.number
    except MergeError as error:
        if _tracebacks:
            raise
        output.error(error)
        status = error.exit_code
    except Exception as error:
        if _tracebacks:
            raise
        output.error(
            MergeError(
                f"unexpected {type(error).__name__}: {error}",
                code="internal",
                hint="This is a defect; `mergekernels --traceback` followed by the same command shows where.",
            )
        )
        status = 1
    raise SystemExit(status)


class _Warnings(logging.Handler):
    """What methods say about tensors, each sentence once, as the warnings of the command."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """A line on stderr."""
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            self._output.note(f"warning: {text}")


class _Stopped(MergeError):
    def with_exit(self, number: int) -> _Stopped:
        self.exit_code = 128 + number
        return self
