"""Whole merges: mergekit and mergekernels in turn on the same files, beside the floor of plain system tools.

usage: python bench_merge.py --out results/<machine>.json [--peer-env DIR] [--folder DIR] [--small] [--repeat 3]

Each tool is one process, timed from start to exit with the inputs in the page cache, its processor time and peak
resident memory taken from wait4. The floor of a recipe is `cat` of its inputs to /dev/null plus writing and syncing
one checkpoint. mergekernels runs `--repeat` times per memory budget (the median counts), mergekit once. Every output
of mergekernels must have the same checkpoint digest; mergekit's output is compared with `mergekernels diff`. On two
cores with mergekit all recipes take about half an hour and 10 GB of disk. Nothing here imports torch: a child's peak
memory would start from its parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import facts, slug

HERE = Path(__file__).resolve().parent
PEER_OPTIONS = ["--allow-crimes", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
FLOAT32 = "dtype: float32\nout_dtype: bfloat16"
# Method: (fine-tuned models, whether there is a base, parameters).
RECIPES = {
    "ties": (3, True, "weight: 1.0, density: 0.2"),
    "linear": (3, False, "weight: 1.0"),
    "task_arithmetic": (3, True, "weight: 0.4"),
    "della": (3, True, "weight: 1.0, density: 0.5, epsilon: 0.1"),
    "breadcrumbs": (3, True, "weight: 1.0, density: 0.9, gamma: 0.01"),
    "sce": (3, True, "select_topk: 0.5"),
    "dare_ties": (3, True, "weight: 1.0, density: 0.2"),
    "karcher": (3, False, ""),
    "slerp": (1, True, "t: 0.4"),
    "model_stock": (3, True, ""),
}


def measure(command: list[str], log: Path | None = None) -> dict[str, float]:
    """Wall and processor seconds and peak resident MB of one process and the children it waited for."""
    with open(os.devnull if log is None else log, "wb") as sink:
        begin = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        detail = "" if log is None else log.read_text(errors="replace")[-2000:]
        sys.exit(f"{' '.join(command)} ended with {child.returncode}\n{detail}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6, 1)}


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """The run with the median wall time, with the largest peak memory of all."""
    middle = sorted(runs, key=lambda run: run["wall_s"])[(len(runs) - 1) // 2]
    return {**middle, "peak_rss_mb": max(run["peak_rss_mb"] for run in runs), "runs": len(runs)}


def shards(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.safetensors"))


def read_floor(folders: list[Path], repeat: int) -> float:
    """Seconds that `cat` takes to read all inputs; the first, unmeasured reading fills the page cache."""
    files = [file for folder in folders for file in shards(folder)]
    measure(["cat", *files])
    return statistics.median(measure(["cat", *files])["wall_s"] for _ in range(repeat))


def write_floor(target: Path, size: int, repeat: int) -> float:
    """Seconds to write `size` bytes of incompressible data into a new file and sync it."""
    chunk = memoryview(os.urandom(8 << 20))
    seconds = []
    for _ in range(repeat):
        os.sync()
        begin = time.perf_counter()
        with open(target, "wb", buffering=0) as file:
            left = size
            while left:
                left -= file.write(chunk[: min(left, len(chunk))])
            os.fsync(file.fileno())
        seconds.append(time.perf_counter() - begin)
        target.unlink()
    return statistics.median(seconds)


def write_recipe(path: Path, method: str, base: Path, tuned: list[Path], dtypes: str = "dtype: bfloat16") -> Path:
    _, has_base, parameters = RECIPES[method]
    lines = [f"merge_method: {method}", *([f"base_model: {base}"] if has_base else []), "models:"]
    lines += [*(f"  - model: {model}" for model in tuned), f"parameters: {{{parameters}}}", dtypes]
    path.write_text("\n".join(lines) + "\n")
    return path


def compare(command: str, ours: Path, theirs: Path) -> dict[str, Any]:
    """What `mergekernels diff` finds between two outputs, condensed."""
    run = subprocess.run([command, "diff", str(ours), str(theirs), "--json"], capture_output=True, text=True)
    if run.returncode not in (0, 1) or not run.stdout.strip():
        sys.exit(f"diff ended with {run.returncode}: {run.stderr}")
    report = json.loads(run.stdout.splitlines()[-1])["result"]
    tensors = report["tensors"]
    errors = [float(t["relative_error"]) for t in tensors if t["relative_error"] is not None]
    return {
        "missing": len(report["missing"]),
        "extra": len(report["extra"]),
        "elements_differing": sum(t["differing"] for t in tensors),
        "largest_relative_error": max(errors, default=0.0),
    }


class Bench:
    """One session: where the files are, how the tools are called."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder = args.folder.resolve()
        self.out = self.folder / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        self.command = shutil.which("mergekernels", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if self.command is None:
            sys.exit("mergekernels is not installed in this environment")
        self.peer = None if args.peer_env is None else str(Path(args.peer_env).resolve() / "bin" / "mergekit-yaml")
        self.repeat = args.repeat
        self.commit = facts()["commit"]
        self.float32 = args.float32
        scale = ["--small"] if args.small else []
        checkpoints = self.folder / ("small" if args.small else "full")
        subprocess.run([sys.executable, str(HERE / "checkpoints.py"), str(checkpoints), *scale], check=True)
        self.base, *self.tuned = (checkpoints / name for name in ("base", "tuned1", "tuned2", "tuned3"))

    def ours(self, recipe: Path, memory: str) -> tuple[dict[str, float], str]:
        """Times of mergekernels under a budget, and the digest of its output, which stays on disk."""
        assert self.command is not None
        out, log = self.out / "ours", self.out / "log"
        runs = []
        for _ in range(self.repeat):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            runs.append(measure([self.command, "run", str(recipe), str(out), "--memory", memory, "--quiet"], log))
        digest = json.loads((out / "merge_manifest.json").read_text())["checkpoint_sha256"]
        return median(runs), digest

    def recipe(self, method: str, budgets: list[str]) -> dict[str, Any]:
        """Everything that is measured for one recipe."""
        number, has_base, _ = RECIPES[method]
        tuned = self.tuned[:number]
        inputs = [self.base, *tuned] if has_base else tuned
        recipe = write_recipe(self.folder / f"{method}.yml", method, self.base, tuned)
        size = sum(os.path.getsize(file) for file in shards(self.base))
        result: dict[str, Any] = {
            "bytes_read": sum(os.path.getsize(file) for folder in inputs for file in shards(folder)),
            "bytes_written": size,
            "floor_read_s": round(read_floor(inputs, self.repeat), 3),
            "floor_write_s": round(write_floor(self.out / "floor", size, self.repeat), 3),
        }
        result["floor_s"] = round(result["floor_read_s"] + result["floor_write_s"], 3)
        digests = set()
        result["mergekernels"] = {}
        for memory in budgets:
            result["mergekernels"][memory], digest = self.ours(recipe, memory)
            digests.add(digest)
        if len(digests) != 1:
            sys.exit(f"{method}: the digest depends on the memory budget: {digests}")
        result["checkpoint_sha256"] = digests.pop()
        if self.peer is not None:
            assert self.command is not None
            peer_out = self.out / "peer"
            shutil.rmtree(peer_out, ignore_errors=True)
            os.sync()
            result["mergekit"] = measure([self.peer, str(recipe), str(peer_out), *PEER_OPTIONS], self.out / "log")
            result["against_mergekit"] = compare(self.command, self.out / "ours", peer_out)
            shutil.rmtree(peer_out)
            if self.float32:
                wide = write_recipe(self.folder / f"{method}32.yml", method, self.base, tuned, FLOAT32)
                os.sync()
                result["mergekit_float32"] = measure(
                    [self.peer, str(wide), str(peer_out), *PEER_OPTIONS], self.out / "log"
                )
                result["against_mergekit_float32"] = compare(self.command, self.out / "ours", peer_out)
                shutil.rmtree(peer_out)
        shutil.rmtree(self.out / "ours")
        result["commit"] = self.commit
        return result

    def run(self, methods: list[str], budgets: list[str]) -> dict[str, Any]:
        """All recipes, and how long the interpreters alone take."""
        assert self.command is not None
        measure([self.command, "--help"])
        starts: dict[str, Any] = {
            "python": median([measure([sys.executable, "-c", "pass"]) for _ in range(5)]),
            "mergekernels --help": median([measure([self.command, "--help"]) for _ in range(5)]),
        }
        if self.peer is not None:
            measure([self.peer, "--help"])
            starts["mergekit-yaml --help"] = measure([self.peer, "--help"])
        recipes = {}
        for method in methods:
            recipes[method] = self.recipe(method, budgets)
            print(summary(method, recipes[method]), flush=True)
        return {"start": starts, "recipes": recipes}


def summary(method: str, result: dict[str, Any]) -> str:
    """One line per tool and budget, with ratios."""
    floor, read, write = (result[key] for key in ("floor_s", "floor_read_s", "floor_write_s"))
    lines = [f"{method}: floor {floor:.2f} s (read {read:.2f}, write {write:.2f})"]

    def row(tool: str, run: dict[str, float], tail: str = "") -> None:
        wall, cpu, rss = run["wall_s"], run["cpu_s"], run["peak_rss_mb"]
        lines.append(f"  {tool:23}{wall:8.2f} s  cpu {cpu:7.2f} s  {rss:7.0f} MB  {wall / floor:6.2f}x the floor{tail}")

    peer = result.get("mergekit")
    if peer:
        row("mergekit", peer)
    for memory, run in result["mergekernels"].items():
        ratio = f"  {peer['wall_s'] / run['wall_s']:6.1f}x faster than mergekit" if peer else ""
        row(f"mergekernels {memory}", run, ratio)
    if "mergekit_float32" in result:
        row("mergekit in float32", result["mergekit_float32"])
    for dtype, key in (("bf16", "against_mergekit"), ("float32", "against_mergekit_float32")):
        if key in result:
            c = result[key]
            lines.append(
                f"  against mergekit in {dtype}: {c['elements_differing']} elements differ, "
                f"largest relative error of a tensor {c['largest_relative_error']:.2e}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write, results/<machine>.json by default")
    parser.add_argument("--peer-env", default=os.environ.get("MERGEKERNELS_PEER_ENV"), help="see make_peer_env.sh")
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".bench", help="for checkpoints and outputs")
    parser.add_argument(
        "--small", action="store_true", help="checkpoints of 10 MB: shows that it works, measures nothing"
    )
    parser.add_argument(
        "--float32", action="store_true", help="run mergekit in float32 too, the arithmetic that we use"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--memory", nargs="+", default=["800MiB", "200MiB"])
    args = parser.parse_args()
    machine = facts()
    bench = Bench(args)
    results = {
        "machine": machine,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "scale": "small" if args.small else "full",
        **bench.run(args.recipes, args.memory),
    }
    out = args.out or HERE / "results" / f"{slug()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = json.loads(out.read_text()) if out.exists() else {}
    # Recipes of another session on this machine stay beside the new ones.
    before = whole.get("merge", {})
    same = all(before.get("machine", {}).get(key) == machine[key] for key in ("cpu", "cores", "versions"))
    if same and before.get("scale") == results["scale"]:
        results["recipes"] = {**before["recipes"], **results["recipes"]}
    whole["merge"] = results
    out.write_text(json.dumps(whole, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
