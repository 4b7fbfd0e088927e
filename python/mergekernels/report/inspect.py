"""What checkpoints hold, as text."""

from __future__ import annotations

import json

from ..engine.inspect import CheckpointSummary, Difference, InspectReport
from .text import count, indent, plural, size, table

__all__ = ["inspect_text"]

_SHOWN = 20
_KINDS = {
    "missing": "not in every checkpoint",
    "shape": "with different shapes",
    "kind": "with a float dtype here and another kind there",
    "dtype": "with different float dtypes, which can be merged",
}


def inspect_text(report: InspectReport) -> str:
    """Each checkpoint, then what keeps them from being merged."""
    parts = [_summary(c) for c in report.checkpoints]
    if report.mergeable is not None:
        parts += [
            _differences(kind, report.differences) for kind in _KINDS if any(d.kind == kind for d in report.differences)
        ]
        parts.append(
            "mergeable: " + ("yes, every tensor is in all with one shape" if report.mergeable else "not as they are")
        )
    return "\n\n".join(parts)


def _summary(c: CheckpointSummary) -> str:
    lines = [
        c.path,
        f"  {plural(c.files, 'file')}, {plural(c.tensors, 'tensor')}, {plural(c.parameters, 'parameter')}, "
        f"{size(c.nbytes)}",
    ]
    rows = [(d, plural(t, "tensor"), plural(p, "parameter"), size(b)) for d, (t, p, b) in c.dtypes.items()]
    lines.append(indent(table(rows, right=(1, 2, 3))))
    if c.stacks:
        lines.append(
            "  layers: " + ", ".join(f"{prefix or '(top)'}.* ({n})" for prefix, n in list(c.stacks.items())[:4])
        )
    if c.config:
        lines.append("  config: " + ", ".join(f"{k} {_plain(v)}" for k, v in c.config.items()))
    lines += [f"  warning: {w}" for w in c.warnings]
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return "/".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def _differences(kind: str, differences: tuple[Difference, ...]) -> str:
    chosen = [d for d in differences if d.kind == kind]
    rows = [(d.tensor, *(v or "-" for v in d.values)) for d in chosen[:_SHOWN]]
    more = f"\n  ... and {count(len(chosen) - _SHOWN)} more (--json lists all)" if len(chosen) > _SHOWN else ""
    return f"{plural(len(chosen), 'tensor')} {_KINDS[kind]}:\n{indent(table(rows))}{more}"
