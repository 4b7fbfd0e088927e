"""The report of `verify` as text."""

from __future__ import annotations

from ..engine.verify import VerifyReport
from .text import count, duration, plural, size

__all__ = ["verify_text"]

_SHOWN = 40


def verify_text(report: VerifyReport) -> str:
    """The verdict, and what is wrong."""
    lines = [f"problem: {p} [{p.code}]" for p in report.problems[:_SHOWN]]
    if len(report.problems) > _SHOWN:
        lines.append(f"... and {count(len(report.problems) - _SHOWN)} more problems (--json lists all)")
    lines += [f"note: {n}" for n in report.notes[:_SHOWN]]
    what = f"{plural(report.files, 'file')}, {plural(report.tensors, 'tensor')}, {size(report.bytes_read)}"
    if report.ok:
        lines.append(f"{report.out}: verified, {what} in {duration(report.seconds)}")
        if report.recomputed:
            lines.append(f"{plural(len(report.recomputed), 'tensor')} recomputed from the inputs, bit for bit the same")
        lines.append(f"checkpoint_sha256 {report.checkpoint_sha256}")
    else:
        lines.append(f"{report.out}: DAMAGED, {plural(len(report.problems), 'problem')} in {what}")
    return "\n".join(lines)
