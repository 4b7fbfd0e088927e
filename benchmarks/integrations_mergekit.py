"""mergekit-yaml as it is installed, with and without MERGEKERNELS_MERGEKIT: whole processes, tool start included.

The checkpoints and recipes are those of bench_merge.py. Both run with the inputs in the page cache, in turns; a run
without that takes longer than half a minute is not repeated. The hooked output has to be bit for bit what
`mergekernels run` writes, with every tensor served; how far mergekit's own output, computed in bfloat16, is from it is
recorded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_integrations import record
from bench_merge import HERE, PEER_OPTIONS, RECIPES, compare, measure, shards, write_recipe

import mergekernels

TARGETS = {"ties": 8.0, "della": 8.0, "breadcrumbs": 8.0, "sce": 7.0, "karcher": 5.0}
SEED = "7"


def add_arguments(group: Any) -> None:
    group.add_argument("--peer-env", default=os.environ.get("MERGEKERNELS_PEER_ENV"), help="see make_peer_env.sh")
    group.add_argument("--small", action="store_true", help="checkpoints of 10 MB: shows that it works")
    group.add_argument("--layers", type=int, default=8, help="of the checkpoints; 8 layers are 0.98 GB each")
    group.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))


def run(args: Any) -> Iterator[dict[str, Any]]:
    """A record per recipe."""
    if args.peer_env is None:
        sys.exit("mergekit: --peer-env names the environment that make_peer_env.sh has made")
    bench = Bench(args)
    for method in args.recipes:
        yield bench.recipe(method, args.repeat)


class Bench:
    """Where the files are, and how the tool is called."""

    def __init__(self, args: Any) -> None:
        self.folder = args.folder.resolve()
        self.out = self.folder / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        environment = Path(args.peer_env).resolve() / "bin"
        self.tool = str(environment / "mergekit-yaml")
        code = "import importlib.metadata as m; print(m.version('mergekit'))"
        self.version = subprocess.check_output([str(environment / "python"), "-c", code], text=True).strip()
        ours = shutil.which("mergekernels", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if ours is None:
            sys.exit("mergekernels is not installed in this environment")
        self.command = ours
        name = "small" if args.small else "full" if args.layers == 8 else f"layers{args.layers}"
        scale = ["--small"] if args.small else ["--layers", str(args.layers)]
        subprocess.run([sys.executable, str(HERE / "checkpoints.py"), str(self.folder / name), *scale], check=True)
        self.base, *self.tuned = (self.folder / name / model for model in ("base", "tuned1", "tuned2", "tuned3"))
        self.hooked = ["env", f"PYTHONPATH={self._site()}", "MERGEKERNELS_MERGEKIT=report", self.tool]

    def _site(self) -> Path:
        """A folder that does in the tool's environment what an installation there would do."""
        site = self.folder / "site"
        site.mkdir(exist_ok=True)
        line = (Path(mergekernels.__file__).resolve().parent.parent / "mergekernels_mergekit.pth").read_text()
        ours = sysconfig.get_path("platlib")
        (site / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({ours!r})\n{line}")
        return site

    def recipe(self, method: str, repeat: int) -> dict[str, Any]:
        """Both in turns, then what they wrote."""
        number, has_base, _ = RECIPES[method]
        tuned = self.tuned[:number]
        path = write_recipe(self.folder / f"{method}.yml", method, self.base, tuned)
        inputs = [file for folder in ([self.base] if has_base else []) + tuned for file in shards(folder)]
        measure(["cat", *inputs])
        plain: list[dict[str, float]] = []
        hooked: list[dict[str, float]] = []
        log = self.out / "log"
        for _ in range(repeat):
            hooked.append(self._run(self.hooked, path, "hooked", log))
            said = log.read_text(errors="replace")
            calls = re.search(r"mergekit: (\d+) calls served by mergekernels, (\d+) by the tool itself", said)
            if calls is None or int(calls[1]) == 0 or int(calls[2]) != 0:
                sys.exit(f"{method}: not every tensor was served\n{said[-2000:]}")
            if len(plain) < repeat and (not plain or plain[0]["wall_s"] < 30):
                plain.append(self._run([self.tool], path, "peer", log))
        found = self._compared(method, path)
        size = sum(os.path.getsize(file) for file in shards(self.base))

        def middle(runs: list[dict[str, float]], key: str) -> float:
            return statistics.median(run[key] for run in runs)

        return record(
            "mergekit",
            self.version,
            f"mergekit-yaml {method}, {number} models of {size / 1e9:.2g} GB",
            middle(plain, "wall_s"),
            middle(hooked, "wall_s"),
            target=TARGETS.get(method),
            plain_cpu_s=middle(plain, "cpu_s"),
            hooked_cpu_s=middle(hooked, "cpu_s"),
            plain_rss_mb=max(run["peak_rss_mb"] for run in plain),
            hooked_rss_mb=max(run["peak_rss_mb"] for run in hooked),
            calls=int(calls[1]) if calls else 0,
            difference=found,
            runs=[len(plain), len(hooked)],
        )

    def _run(self, command: list[str], path: Path, out: str, log: Path) -> dict[str, float]:
        shutil.rmtree(self.out / out, ignore_errors=True)
        os.sync()
        options = [*PEER_OPTIONS, "--random-seed", SEED]
        return measure([*command, str(path), str(self.out / out), *options], log)

    def _compared(self, method: str, path: Path) -> str:
        """That the hooked output is ours, and how the tool's own differs."""
        own = self.out / "ours"
        shutil.rmtree(own, ignore_errors=True)
        # Without random masks the seed only decides between equal magnitudes, where the hooked tool always uses 0.
        seed = SEED if method.startswith(("dare", "della")) else "0"
        subprocess.run([self.command, "run", str(path), str(own), "--seed", seed, "--quiet"], check=True)
        same = compare(self.command, own, self.out / "hooked")
        if same["elements_differing"] or same["missing"] or same["extra"]:
            sys.exit(f"{method}: the hooked output is not that of mergekernels run: {json.dumps(same)}")
        found = compare(self.command, self.out / "hooked", self.out / "peer")
        for name in ("ours", "hooked", "peer"):
            shutil.rmtree(self.out / name)
        return f"{found['largest_relative_error']:.1e}"
