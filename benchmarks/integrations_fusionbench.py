"""FusionBench's algorithms beside ours: the whole run of each on a pool of models in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from bench_integrations import record
from timed_calls import launch


def add_arguments(group: Any) -> None:
    group.add_argument("--fusionbench-env", default=os.environ.get("MERGEKERNELS_FUSIONBENCH_ENV"))
    group.add_argument("--fusionbench-small", action="store_true", help="widths 64 and 128: shows that it works")


def run(args: Any) -> Iterator[dict[str, Any]]:
    """A record per case."""
    if args.fusionbench_env is None:
        sys.exit("FusionBench: --fusionbench-env names the environment that make_peer_env.sh has made")
    scale = "small" if args.fusionbench_small else "full"
    for found in launch(args.fusionbench_env, "timed_fusionbench.py", args.folder, [str(args.repeat), scale]):
        case = found.pop("case")
        target = 1.6 if case.startswith("TSV-M") else None
        plain, hooked = found.pop("plain_s"), found.pop("hooked_s")
        yield record("FusionBench", "0.2.33", case, plain, hooked, target=target, **found)
