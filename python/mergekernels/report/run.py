"""The report of a finished run as text."""

from __future__ import annotations

from ..engine.events import RunReport
from .text import duration, plural, size

__all__ = ["run_text"]


def run_text(report: RunReport) -> str:
    """Where the result is, its hash, and what it took."""
    if report.already_done:
        done = "this merge is already there, nothing was done"
        return f"{report.out}: {done}\ncheckpoint_sha256 {report.checkpoint_sha256}"
    resumed = f", {report.resumed_units} kept from an earlier attempt" if report.resumed_units else ""
    rate = (report.bytes_read + report.bytes_written) / report.seconds if report.seconds > 0 else 0.0
    return "\n".join(
        (
            f"{report.out}: {plural(report.units, 'file')}{resumed}",
            f"checkpoint_sha256 {report.checkpoint_sha256}",
            f"{size(report.bytes_read)} read, {size(report.bytes_written)} written in {duration(report.seconds)} "
            f"({size(rate)}/s); tensor memory {size(report.peak_tensor_memory)} of {size(report.memory)}; "
            f"{report.backend} backend, {plural(report.threads, 'thread')}",
        )
    )
