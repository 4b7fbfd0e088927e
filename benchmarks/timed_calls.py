"""For scripts that run inside a tool's environment: calls hooked and unhooked in turns, one line of JSON for each case.

`launch` is for the other side: it starts such a script where this package can be imported besides the tool.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["launch", "turns"]


def turns(
    case: str, plain: Callable[[], Any], hooked: Callable[[], Any], difference: Callable[[Any, Any], str], repeat: int
) -> Any:
    """Prints the medians of wall and processor seconds of the two, and what `difference` says of their results.

    hooked comes first, so that what is loaded on first use counts against it. Returns its last result.
    """
    times: dict[str, list[tuple[float, float]]] = {"hooked": [], "plain": []}
    results: dict[str, Any] = {}
    for turn in range(repeat):
        for name, call in (("hooked", hooked), ("plain", plain)):
            if name == "plain" and turn and times["plain"][0][0] > 30:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = call()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    found: dict[str, Any] = {"case": case, "difference": difference(results["hooked"], results["plain"])}
    for name, values in times.items():
        found[f"{name}_s"] = statistics.median(v[0] for v in values)
        found[f"{name}_cpu_s"] = statistics.median(v[1] for v in values)
    found["runs"] = [len(times["plain"]), len(times["hooked"])]
    print(json.dumps(found), flush=True)
    return results["hooked"]


def launch(environment: str, script: str, folder: Path, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a script of this folder, run by the Python of an environment."""
    site = folder / "site-of-calls"
    site.mkdir(parents=True, exist_ok=True)
    # After the tool's own packages, so that these stay what they are.
    text = f"import site, sys\nsite.addsitedir({sysconfig.get_path('platlib')!r})\n"
    (site / "sitecustomize.py").write_text(text)
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(site), str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"}
    command = [str(Path(environment).resolve() / "bin" / "python"), str(here / script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)
    if process.wait():
        sys.exit(f"{script} failed")
