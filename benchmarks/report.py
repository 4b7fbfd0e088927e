"""Makes the tables of docs/performance.md, docs/integrations.md and the README from results/*.json.

usage: python report.py [--into PAGE] [--sections NAMES --] [results/<machine>.json ...]

Without --into the tables are printed; with it they replace what stands between the lines MARKS of a Markdown page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MARKS = ("<!-- results: made by benchmarks/report.py -->", "<!-- end of results -->")


def _header(section: dict[str, Any]) -> str:
    machine = section["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, {machine['memory_gib']} GiB; {versions}; "
        f"commit {machine['commit']}, {section['date'][:10]}, load average at the start {machine['load_average']}."
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
        wide = result.get("mergekit_float32")
        if wide:
            lines.append(
                f"| | mergekit 0.1.5 in float32 | {wide['wall_s']:.1f} | {wide['cpu_s']:.1f} "
                f"| {wide['peak_rss_mb']:.0f} | {wide['wall_s'] / floor:.1f} | |"
            )
        for memory, run in result["mergekernels"].items():
            ratio = f"{peer['wall_s'] / run['wall_s']:.1f}x" if peer else ""
            lines.append(
                f"| | mergekernels --memory {memory} | {run['wall_s']:.2f} | {run['cpu_s']:.2f} "
                f"| {run['peak_rss_mb']:.0f} | {run['wall_s'] / floor:.2f} | {ratio} |"
            )
    outputs = []
    for method, result in section["recipes"].items():
        for dtype, key in (("bfloat16", "against_mergekit"), ("float32", "against_mergekit_float32")):
            if key in result:
                c, elements = result[key], result["bytes_written"] / 2
                outputs.append(
                    f"{method} against mergekit in {dtype} {100 * c['elements_differing'] / elements:.3g} % "
                    f"(largest relative error of a tensor {c['largest_relative_error']:.1e})"
                )
    commits: dict[str, list[str]] = {}
    for method, result in section["recipes"].items():
        commits.setdefault(result["commit"], []).append(method)
    lines += ["", "Commits: " + "; ".join(f"{c} for {', '.join(methods)}" for c, methods in commits.items()) + "."]
    starts = ", ".join(f"`{name}` {run['wall_s']:.2f} s" for name, run in section["start"].items())
    lines += ["", f"Starting alone: {starts}."]
    if outputs:
        lines += ["", "Elements of the outputs that differ: " + "; ".join(outputs) + "."]
    return lines


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
        eager = f"{e['times_faster_than_eager']:.1f}x" if "torch_eager_ms" in e else ""
        lines.append(
            f"| {e['op']} | {e['dtype']} | {e['elements'] >> 20} Mi | {e['ns_per_element']:.3f} | {e['gb_per_s']:.1f} "
            f"| {e['percent_of_plain_read']:.0f} % | {eager} | {over} |"
        )
    return lines


def matrices_table(section: dict[str, Any]) -> list[str]:
    """Ops over matrices and adapters: time beside each peer's, and the distance between the results."""
    heads = "op | case | ms | peer | its ms | faster | relative error | commit"
    lines = [_header(section), "", f"| {heads} |", "|" + "---|" * 8]
    for e in section["records"]:
        lines.append(
            f"| {e['op']} | {e['case']} | {e['median_ms']:.1f} | {e['peer']} | {e['peer_ms']:.0f} "
            f"| {e['times_faster']:.1f}x | {e['error']:.1e} | {e['commit']} |"
        )
    return lines


def integrations_table(section: dict[str, Any]) -> list[str]:
    """Tools with and without mergekernels: seconds of the whole process or call, and what was asked for."""
    heads = "tool | case | without, s | with, s | faster | CPU without, s | with, s | relative difference | commit"
    lines = [_header(section), "", f"| {heads} |", "|" + "---|" * 9]
    for e in section["records"]:
        cpu = [f"{e[key]:.1f}" if key in e else "" for key in ("plain_cpu_s", "hooked_cpu_s")]
        target = f" (aim {e['target']:g}x)" if "target" in e else ""
        seconds = [f"{e[key]:.3g}" for key in ("plain_s", "hooked_s")]
        lines.append(
            f"| {e['tool']} {e['version']} | {e['case']} | {seconds[0]} | {seconds[1]} "
            f"| {e['times_faster']:.1f}x{target} | {cpu[0]} | {cpu[1]} | {e.get('difference', '')} | {e['commit']} |"
        )
    return lines


MAKERS = {
    "merge": ("Whole merges", merge_table),
    "ops": ("Ops", ops_table),
    "spectral": ("Matrices and adapters", matrices_table),
    "integrations": ("Tools", integrations_table),
}


def tables(paths: list[Path], sections: list[str]) -> str:
    """The tables of these sections of all result files."""
    parts = []
    for path in paths:
        whole = json.loads(path.read_text())
        for name in sections:
            title, make = MAKERS[name]
            if name in whole:
                parts.append("\n".join([f"### {title}, {path.stem}", "", *make(whole[name])]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--into", type=Path, default=None)
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=list(MAKERS),
        default=["merge", "ops", "spectral"],
        help="docs/performance.md has the first three (default), docs/integrations.md the last",
    )
    args = parser.parse_args()
    text = tables(args.results or sorted((HERE / "results").glob("*.json")), args.sections)
    if args.into is None:
        print(text)
        return
    page = args.into.read_text()
    before, rest = page.split(MARKS[0], 1)
    after = rest.split(MARKS[1], 1)[1]
    args.into.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
