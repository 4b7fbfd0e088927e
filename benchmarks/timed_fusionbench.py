"""FusionBench's algorithms with and without these kernels; run by integrations_fusionbench.py inside its environment.

usage: python timed_fusionbench.py REPEAT SMALL
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import fusion_bench.method as their
import torch
from fusion_bench.modelpool import BaseModelPool
from timed_calls import turns
from torch import nn

import mergekernels.integrations.fusionbench as ours

TASKS = 8


def pool(side: int, layers: int) -> BaseModelPool:
    """Linear layers and fine-tunes whose differences have full rank and a spectrum that falls slowly."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(side, side) for _ in range(layers)))
    models: dict[str, nn.Module] = {"_pretrained_": base}
    for t in range(TASKS):
        tuned = nn.Sequential(*(nn.Linear(side, side) for _ in range(layers)))
        tuned.load_state_dict(base.state_dict())
        for parameter in tuned.parameters():
            parameter.data += 1e-3 * torch.randn(parameter.shape)
        models[f"task_{t}"] = tuned
    return BaseModelPool(models)


def merged(kind: Any, models: BaseModelPool, parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The whole run of an algorithm; the pretrained model, which it changes, is put back."""
    pretrained = models.load_pretrained_model()
    before = {k: v.clone() for k, v in pretrained.state_dict().items()}
    with contextlib.redirect_stdout(open(os.devnull, "w")):  # it prints a line per tensor
        result = kind(**parameters).run(models)
    found = {k: v.detach() - before[k] for k, v in result.state_dict().items()}
    pretrained.load_state_dict(before)
    return found


def difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """Of the merged task vectors."""
    worst = max(float((mine[k] - v).norm() / v.norm()) for k, v in theirs.items())
    assert worst < 1e-3, worst
    return f"{worst:.1e}"


def main(repeat: int, small: bool) -> None:
    """Our classes beside theirs, and theirs with the functions replaced."""
    sides = (64, 128) if small else (1024, 2048)
    spectral: list[tuple[str, str, Any, dict[str, Any]]] = [
        ("TSV-M", "TSVM", their.TaskSingularVectorMerging, {"alpha": 1.0}),
        ("Iso-C", "IsoC", their.ISO_C_Merge, {"scaling_factor": 1.0}),
        ("Iso-CTS", "IsoCTS", their.ISO_CTS_Merge, {"scaling_factor": 1.0, "common_space_fraction": 0.8}),
    ]
    ties = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    plain: list[tuple[str, str, Any, dict[str, Any]]] = [
        ("TIES", "TIES", their.TiesMergingAlgorithm, ties),
        ("task arithmetic", "TaskArithmetic", their.TaskArithmeticAlgorithm, {"scaling_factor": 0.3}),
    ]
    for side in sides:
        models = pool(side, 2 if side == sides[0] else 1)
        for label, name, kind, parameters in spectral if side == sides[1] else [*spectral, *plain]:
            turns(
                f"{label}, {TASKS} models of width {side}",
                lambda k=kind, p=parameters, m=models: merged(k, m, p),
                lambda n=name, p=parameters, m=models: merged(getattr(ours, n), m, p),
                difference,
                repeat,
            )

    def replaced() -> dict[str, torch.Tensor]:
        with ours.enabled():
            ours.reset_stats()
            found = merged(spectral[0][2], models, spectral[0][3])
            assert ours.stats().served and not ours.stats().passed_on, ours.stats()
            return found

    models = pool(sides[0], 2)
    kind, parameters = spectral[0][2:]
    case = f"TSV-M by enable(), {TASKS} models of width {sides[0]}"
    turns(case, lambda: merged(kind, models, parameters), replaced, difference, repeat)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "small")
