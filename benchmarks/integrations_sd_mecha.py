"""sd-mecha with and without its hooks: whole merges of files, and its methods on one tensor."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from bench_integrations import record
from timed_calls import launch

TARGETS = {"DELLA": 10.0}


def add_arguments(group: Any) -> None:
    group.add_argument("--sd-mecha-env", default=os.environ.get("MERGEKERNELS_SD_MECHA_ENV"))
    group.add_argument("--sd-mecha-small", action="store_true", help="a hundredth of the elements: shows that it works")


def run(args: Any) -> Iterator[dict[str, Any]]:
    """A record per case."""
    if args.sd_mecha_env is None:
        sys.exit("sd-mecha: --sd-mecha-env names the environment that make_peer_env.sh has made")
    scale = "small" if args.sd_mecha_small else "full"
    for found in launch(
        args.sd_mecha_env, "timed_sd_mecha.py", args.folder, [str(args.folder), str(args.repeat), scale]
    ):
        case = found.pop("case")
        target = next((t for label, t in TARGETS.items() if f", {label}" in case), None)
        yield record("sd-mecha", "1.1.8", case, found.pop("plain_s"), found.pop("hooked_s"), target=target, **found)
