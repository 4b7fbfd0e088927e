"""The report of `diff` as text."""

from __future__ import annotations

from ..engine.diff import DiffReport, TensorDiff
from .text import count, duration, number, plural, shape, size, table

__all__ = ["diff_text"]

_SHOWN = 40


def diff_text(report: DiffReport) -> str:
    """A verdict, and one line per tensor that differs, the worst first."""
    parts = [f"A: {report.a}", f"B: {report.b}", ""]
    parts += _names("only in A", report.missing) + _names("only in B", report.extra)
    refused = [t for t in report.tensors if t.status != "differs"]
    if refused:
        pairs = [
            (t.name, t.status, f"{t.dtype_a} {shape(t.shape_a)}", f"{t.dtype_b} {shape(t.shape_b)}")
            for t in refused[:_SHOWN]
        ]
        parts += ["Not comparable:", table(pairs, ("tensor", "differs in", "A", "B")), *_more(len(refused)), ""]
    compared = sorted((t for t in report.tensors if t.status == "differs"), key=_badness)
    if compared:
        header = ("tensor", "dtype", "differing", "of", "first at", "max ULP", "at", "max abs", "rel. error", "")
        rows = [_row(t, report.rtol) for t in compared[:_SHOWN]]
        parts += [table(rows, header, right=(2, 3, 5, 7, 8)), *_more(len(compared)), ""]
    parts.append(_verdict(report))
    parts.append(f"{size(report.bytes_read)} read in {duration(report.seconds)}.")
    return "\n".join(parts)


def _badness(t: TensorDiff) -> tuple[bool, float, bytes]:
    return (t.within, -(t.relative_error or 0.0), t.name.encode())


def _row(t: TensorDiff, rtol: float | None) -> tuple[str, ...]:
    return (
        t.name,
        t.dtype_a if t.dtype_a == t.dtype_b else f"{t.dtype_a}/{t.dtype_b}",
        count(t.differing),
        count(t.elements),
        "-" if t.first_index is None else shape(t.first_index),
        "-" if t.max_ulp is None else count(t.max_ulp),
        "-" if t.max_ulp_index is None else shape(t.max_ulp_index),
        "-" if t.max_abs is None else number(t.max_abs),
        "-" if t.relative_error is None else number(t.relative_error),
        ("within" if t.within else "beyond" if rtol is not None else "")
        + (f" ({plural(t.unbounded, 'pair')} with NaN or Inf)" if t.unbounded else ""),
    )


def _names(what: str, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    return [f"{plural(len(names), 'tensor')} {what}:", *(f"  {n}" for n in names[:_SHOWN]), *_more(len(names)), ""]


def _more(total: int) -> list[str]:
    return [f"  ... and {count(total - _SHOWN)} more (--json lists all)"] if total > _SHOWN else []


def _verdict(report: DiffReport) -> str:
    agree = f"{count(report.equal)} of {plural(report.compared, 'common tensor')} agree bit for bit"
    if report.identical:
        return f"identical: {agree}."
    elements = sum(t.differing for t in report.tensors)
    total = f"{agree}; {plural(elements, 'element')} {'differs' if elements == 1 else 'differ'}"
    if report.rtol is None:
        return f"different: {total}."
    verdict = "within the bound" if report.same else "beyond the bound"
    return f"{verdict} (rtol {report.rtol:g}): {total}."
