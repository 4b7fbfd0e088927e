"""Runs in FusionBench's environment: its own spectral mergers on task vectors.

usage: python peer_spectral.py IN OUT. IN is a safetensors file with `task/case` tensors and metadata fractions (comma
separated). OUT gets `tsv_m/case`, `iso_c/case` and `iso_cts FRACTION/case`, the merged task vectors.
"""

from __future__ import annotations

import sys

import torch
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from safetensors import safe_open
from safetensors.torch import save_file

torch.set_num_threads(1)
with safe_open(sys.argv[1], "pt") as file:
    given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fractions = file.metadata()["fractions"].split(",")


def vectors() -> list[dict[str, torch.Tensor]]:
    """One state dict for each task; fresh tensors, since nothing says that the functions leave them alone."""
    tasks: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in given.items():
        task, case = name.split("/", 1)
        tasks.setdefault(int(task), {})[case] = tensor.clone()
    return [tasks[i] for i in sorted(tasks)]


found = {"tsv_m": compute_and_sum_svd_mem_reduction(vectors(), accelerator="cpu")}
found["iso_c"] = iso_c(vectors(), accelerator="cpu")
for fraction in fractions:
    found[f"iso_cts {fraction}"] = iso_cts(vectors(), float(fraction), accelerator="cpu")
merged = {f"{method}/{case}": x for method, cases in found.items() for case, x in cases.items()}
save_file({name: x.contiguous() for name, x in merged.items()}, sys.argv[2])
