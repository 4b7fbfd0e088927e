"""PEFT's add_weighted_adapter and merge_adapter, with and without mergekernels: whole calls in one process.

A model of square linear layers with two adapters of rank 16 (`peft_calls.py`, run by the Python of the environment that
make_peer_env.sh makes). The two take turns; the fastest call of each counts, the slow ones of PEFT are made twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_integrations import record

HERE = Path(__file__).resolve().parent
LAYERS = {256: 48, 1024: 8, 2048: 4}
TARGETS = {("svd", 1024): 20.0, ("svd", 2048): 20.0}
LINEAR = 1.3
"""How many times as long as PEFT's type linear the hooked type svd may take."""


def add_arguments(group: Any) -> None:
    """Shares --peer-env with mergekit."""
    group.add_argument("--widths", nargs="+", type=int, default=list(LAYERS), choices=list(LAYERS))
    group.add_argument("--peft-threads", type=int, default=0, help="of torch, in both; default: torch's own count")


def run(args: Any) -> Iterator[dict[str, Any]]:
    """Records of type svd, of ties_svd at width 1024, of svd beside PEFT's linear, and of merging into the base."""
    environment = args.peer_env or os.environ.get("MERGEKERNELS_PEER_ENV")
    if environment is None:
        sys.exit("peft: --peer-env names the environment that make_peer_env.sh has made")
    for width in args.widths:
        command = [str(Path(environment).resolve() / "bin" / "python"), str(HERE / "peft_calls.py")]
        command += [
            sysconfig.get_path("platlib"),
            str(width),
            str(LAYERS[width]),
            str(args.repeat),
            str(args.peft_threads),
        ]
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        size = f"width {width}, {LAYERS[width]} layers"
        for kind, (plain, hooked, difference) in found["cases"].items():
            yield record(
                "peft",
                found["version"],
                f"{kind}, {size}",
                plain,
                hooked,
                target=TARGETS.get((kind, width)),
                difference=f"deltas {difference:.0e}",
                threads=found["threads"],
            )
        yield record(
            "peft",
            found["version"],
            f"svd hooked beside PEFT's linear, {size}",
            found["linear"],
            found["cases"]["svd"][1],
            target=round(1 / LINEAR, 2),
            threads=found["threads"],
        )
