"""Tools hooked and unhooked in turns, whole processes or whole calls, on the same inputs.

usage: python bench_integrations.py TOOL [TOOL ...] --out results/<machine>.json [options of the tools, see --help]

Every tool is a module ``integrations_<tool>.py`` with ``add_arguments(group)`` and ``run(args)``, which yields records
of :func:`record`. The results of the two are compared before a time is written, and that the calls were served.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import facts, slug

HERE = Path(__file__).resolve().parent


def tools() -> list[str]:
    """Those that have a module here."""
    return sorted(path.stem.removeprefix("integrations_") for path in HERE.glob("integrations_*.py"))


def record(
    tool: str, version: str, case: str, plain_s: float, hooked_s: float, *, target: float | None = None, **more: Any
) -> dict[str, Any]:
    """One line of the table of docs/integrations.md.

    plain_s, hooked_s : wall seconds without and with mergekernels. target : how many times faster it shall be. more :
    what else belongs to it: difference (a sentence on how the results differ), plain_cpu_s, hooked_cpu_s, plain_rss_mb,
    hooked_rss_mb, calls.
    """
    faster = round(plain_s / hooked_s, 2)
    return {
        "tool": tool,
        "version": version,
        "case": case,
        "plain_s": round(plain_s, 4),
        "hooked_s": round(hooked_s, 4),
        "times_faster": faster,
        **({} if target is None else {"target": target}),
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="+", choices=tools())
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write, results/<machine>.json by default")
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".bench", help="for inputs and outputs")
    parser.add_argument("--repeat", type=int, default=3)
    modules = {tool: importlib.import_module(f"integrations_{tool}") for tool in tools()}
    for tool, module in modules.items():
        module.add_arguments(parser.add_argument_group(tool))
    args = parser.parse_args()
    out = args.out or HERE / "results" / f"{slug()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = facts()
    for tool in args.tools:
        for found in modules[tool].run(args):
            print(
                f"{found['tool']} {found['case']}: {found['plain_s']:.2f} s, {found['hooked_s']:.2f} s hooked, ", end=""
            )
            print(f"{found['times_faster']:.1f}x", flush=True)
            # Written one by one: a session that is cut off keeps what it has.
            whole = json.loads(out.read_text()) if out.exists() else {}
            before = whole.get("integrations", {}).get("records", [])
            found |= {"commit": machine["commit"], "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            key = (found["tool"], found["case"])
            kept = [e for e in before if (e["tool"], e["case"]) != key]
            whole["integrations"] = {
                "machine": machine,
                "date": found["date"],
                "python": platform.python_version(),
                "records": sorted([*kept, found], key=lambda e: (e["tool"], -e["times_faster"])),
            }
            out.write_text(json.dumps(whole, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
