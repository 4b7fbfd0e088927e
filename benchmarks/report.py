"""Prints the tables of the README and of docs/performance.md from results/*.json.

usage: python report.py [results/<machine>.json ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def _header(section: dict[str, Any]) -> str:
    machine = section["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, {machine['memory_gib']} GiB; {versions}; "
        f"commit {machine['commit']}, {section['date'][:10]}."
    )


def merge_table(section: dict[str, Any]) -> list[str]:
    """Whole merges: floor, mergekit, ours at each budget."""
    lines = [
        _header(section),
        "",
        "| recipe | tool | wall s | CPU s | peak RSS MB | times the floor | faster than mergekit |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, result in section["recipes"].items():
        floor = result["floor_s"]
        read, write = result["floor_read_s"], result["floor_write_s"]
        lines.append(f"| {method} | floor: read {read:.2f} s, write and sync {write:.2f} s | {floor:.2f} | | | 1 | |")
        peer = result.get("mergekit")
        if peer:
            lines.append(
                f"| | mergekit 0.1.5 | {peer['wall_s']:.1f} | {peer['cpu_s']:.1f} | {peer['peak_rss_mb']:.0f} "
                f"| {peer['wall_s'] / floor:.1f} | 1 |"
            )
        for memory, run in result["mergekernels"].items():
            ratio = f"{peer['wall_s'] / run['wall_s']:.1f}x" if peer else ""
            lines.append(
                f"| | mergekernels --memory {memory} | {run['wall_s']:.2f} | {run['cpu_s']:.2f} "
                f"| {run['peak_rss_mb']:.0f} | {run['wall_s'] / floor:.2f} | {ratio} |"
            )
    starts = ", ".join(f"`{name}` {run['wall_s']:.2f} s" for name, run in section["start"].items())
    return [*lines, "", f"Starting alone: {starts}."]


def ops_table(section: dict[str, Any]) -> list[str]:
    """Ops: time per element, share of the bandwidth of a plain read, eager torch."""
    lines = [
        _header(section),
        "",
        "| op | dtype | elements | ns per element | GB/s | of a plain read | than eager torch | select / ties pass |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in section["records"]:
        over = f"{e['over_stream']:.2f}" if "over_stream" in e else ""
        lines.append(
            f"| {e['op']} | {e['dtype']} | {e['elements'] >> 20} Mi | {e['ns_per_element']:.3f} | {e['gb_per_s']:.1f} "
            f"| {e['percent_of_plain_read']:.0f} % | {e['times_faster_than_eager']:.1f}x | {over} |"
        )
    return lines


def main() -> None:
    paths = [Path(p) for p in sys.argv[1:]] or sorted((HERE / "results").glob("*.json"))
    tables = {"merge": merge_table, "ops": ops_table}
    for path in paths:
        whole = json.loads(path.read_text())
        for name, table in tables.items():
            if name in whole:
                print("\n".join(table(whole[name])), end="\n\n")


if __name__ == "__main__":
    main()
