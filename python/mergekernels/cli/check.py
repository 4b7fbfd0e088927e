"""The commands that look at checkpoints: `verify`, `diff`, `inspect`."""

from __future__ import annotations

from ..errors import OutputError
from .guard import guarded
from .output import Output
from .progress import meter

__all__ = ["diff_command", "inspect_command", "verify_command"]


def verify_command(out: str, *, recompute: int, threads: int | None, as_json: bool, quiet: bool) -> None:
    """See `mergekernels verify --help`."""
    output = Output("verify", as_json=as_json, quiet=quiet)

    def work() -> int:
        from ..engine.verify import verify
        from ..report.verify import verify_text

        drawing = meter(output)
        try:
            report = verify(
                out,
                recompute=recompute,
                threads=threads,
                progress=lambda done, total: drawing.update("verify", done, total),
            )
        finally:
            drawing.close()
        output.result(report.to_dict(), verify_text(report))
        return 0 if report.ok else OutputError.exit_code

    guarded(output, work)


def diff_command(a: str, b: str, *, rtol: float | None, threads: int | None, as_json: bool, quiet: bool) -> None:
    """See `mergekernels diff --help`."""
    output = Output("diff", as_json=as_json, quiet=quiet)

    def work() -> int:
        from ..engine.diff import diff
        from ..report.diff import diff_text

        drawing = meter(output)
        try:
            report = diff(
                a, b, rtol=rtol, threads=threads, progress=lambda done, total: drawing.update("compare", done, total)
            )
        finally:
            drawing.close()
        output.result(report.to_dict(), diff_text(report))
        return 0 if report.same else 1

    guarded(output, work)


def inspect_command(models: list[str], *, as_json: bool) -> None:
    """See `mergekernels inspect --help`."""
    output = Output("inspect", as_json=as_json)

    def work() -> int:
        from ..engine.inspect import inspect
        from ..report.inspect import inspect_text

        report = inspect(models)
        output.result(report.to_dict(), inspect_text(report))
        return 0

    guarded(output, work)
