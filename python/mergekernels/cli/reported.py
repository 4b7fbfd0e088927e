"""Work that draws its progress and ends in a report: what such commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .output import Output
from .progress import meter, sink

__all__ = ["reported"]


def reported(output: Output, call: Callable[[Any], Any], text: Callable[[Any], str]) -> int:
    """Runs `call(progress)`, then says the warnings of its report and the report itself. Returns the exit status, 0.

    call : takes the progress callback of the engine. text : the report in words.
    """
    drawing = meter(output)
    try:
        report = call(sink(drawing))
    finally:
        drawing.close()
    if not output.as_json:
        for warning in report.warnings:
            output.note(f"warning: {warning}")
    output.result(report.to_dict(), text(report))
    return 0
