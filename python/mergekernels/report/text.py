"""Plain text for people: tables, sizes, counts, durations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["count", "duration", "indent", "number", "plural", "shape", "size", "table"]


def size(nbytes: float) -> str:
    """Bytes in binary units: "512 bytes", "1.5 GiB"."""
    if nbytes < 1024:
        return f"{int(nbytes)} bytes"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        nbytes /= 1024
        if nbytes < 1024 or unit == "PiB":
            break
    return f"{nbytes:.1f} {unit}"


def count(value: int) -> str:
    """An integer with thousands separators."""
    return f"{value:,}"


def plural(value: int, noun: str) -> str:
    """A count with its noun: "1 tensor", "2,048 tensors"."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def duration(seconds: float) -> str:
    """A duration: "under 0.1 s", "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float) -> str:
    """A float in few digits."""
    return f"{value:.4g}"


def shape(sizes: Sequence[int]) -> str:
    """A shape as in a safetensors header: "[4096, 11008]"."""
    return "[" + ", ".join(map(str, sizes)) + "]"


def indent(text: str, by: str = "  ") -> str:
    """Every line of `text` moved to the right."""
    return "\n".join(by + line if line else line for line in text.split("\n"))


def table(rows: Iterable[Sequence[str]], header: Sequence[str] | None = None, right: Sequence[int] = ()) -> str:
    """Columns aligned with spaces, two between neighbours. right : columns aligned to the right."""
    lines = [list(header)] if header else []
    lines += [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [
            cell.rjust(w) if c in right else cell.ljust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)
