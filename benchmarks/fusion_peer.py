"""FusionBench's spectral mergers in its own environment, asked through a pipe; times exclude the start and the files.

As a program, in FusionBench's Python: `fusion_peer.py IN THREADS` loads the tensors of IN (one task each) and answers
each line of its input: `run METHOD` by "done" once it has merged, `save PATH` by "done" once the result is in a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["Peer", "available"]


def available() -> str | None:
    """The folder of the environment, as MERGEKERNELS_FUSIONBENCH_ENV says."""
    return os.environ.get("MERGEKERNELS_FUSIONBENCH_ENV")


class Peer:
    """A process with FusionBench that has loaded its tasks."""

    def __init__(self, tasks: list[Any], folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        self.folder = folder
        save_file({str(i): x for i, x in enumerate(tasks)}, folder / "tasks.safetensors")
        python = str(Path(available() or "") / "bin" / "python")
        command = [python, __file__, str(folder / "tasks.safetensors"), str(torch.get_num_threads())]
        # Threads that wait for work must not spin while the other side is measured.
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._ask("ready")

    def _ask(self, line: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer == "done", f"FusionBench's process said {answer!r} to {line!r}"

    def run(self, method: str) -> Peer:
        """Merges, in its process."""
        self._ask(f"run {method}")
        return self

    def result(self) -> Any:
        """The last merge's tensor."""
        from safetensors.torch import load_file

        path = self.folder / "merged.safetensors"
        self._ask(f"save {path}")
        return load_file(path)["w"]

    def close(self) -> None:
        """Ends the process."""
        with self.process:  # closes the pipes, which ends it, and waits
            pass


def serve() -> None:
    """The program."""
    import torch
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(int(sys.argv[2]))
    given = load_file(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # they print what they do
    methods = {
        "tsv_m": lambda x: compute_and_sum_svd_mem_reduction(x, accelerator="cpu"),
        "iso_c": lambda x: iso_c(x, accelerator="cpu"),
        "iso_cts": lambda x: iso_cts(x, 0.8, accelerator="cpu"),
    }
    merged: dict[str, torch.Tensor] = {}
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "run":
            merged = methods[rest]([{"w": given[str(i)]} for i in range(len(given))])
        elif word == "save":
            save_file({"w": merged["w"].contiguous()}, rest)
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    serve()
