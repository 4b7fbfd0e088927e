"""The entry point of the `mergekernels` command, which imports the command line after it has taken care of Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Runs the command line in `sys.argv`, and exits with its status.

    Until a command's work begins there is nothing to finish or to say: Ctrl-C ends the process at once, with 130.
    """
    before = None
    try:
        # A shell starts background jobs with SIGINT ignored; that stays.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            before = signal.signal(signal.SIGINT, _leave)
        from .usage import parsed

        status = parsed(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    finally:
        if before is not None and signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, before)
    raise SystemExit(status)


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception could come up inside an import or a destructor, where it would be printed.
    os._exit(128 + number)
