"""Evaluates every checkpoint of the demo from its files on disk and prints one table.

usage: python evaluate.py FOLDER     reads FOLDER/checkpoints/*, FOLDER/merged/* and FOLDER/merges.tsv

The recipe to use is chosen by the mean accuracy on the validation images; the table shows accuracy on the test images,
which neither training nor the choice has seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from network import TASKS, accuracy, load_checkpoint


def row(folder: Path) -> tuple[list[float], float, float]:
    """Test accuracy per task, its mean, and the mean validation accuracy of one checkpoint."""
    net = load_checkpoint(folder)
    test = [accuracy(net, task, "test") for task in TASKS]
    validation = [accuracy(net, task, "validation") for task in TASKS]
    return test, sum(test) / len(test), sum(validation) / len(validation)


def weight_bytes(folder: Path) -> int:
    """Size of the safetensors files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(folder: Path) -> int:
    """Prints the table; 1 if the chosen merge does not beat plain averaging by two points."""
    torch.set_num_threads(1)
    read = {"linear": 0, "base": weight_bytes(folder / "checkpoints" / "base")}
    read["linear"] = sum(weight_bytes(folder / "checkpoints" / task) for task in TASKS)
    merges = [line.split("\t") for line in (folder / "merges.tsv").read_text().splitlines()]
    tasks = "".join(f"{task:>9}" for task in TASKS)
    print(f"\n{'accuracy on test images, %':26}{tasks}     mean  validation  merge s  read kB  written kB")

    def line(label: str, result: tuple[list[float], float, float], tail: str = "") -> None:
        test, mean, validation = result
        print(f"{label:26}" + "".join(f"{v:9.1f}" for v in test) + f"{mean:9.1f}{validation:12.1f}" + tail)

    line("base", row(folder / "checkpoints" / "base"))
    for task in TASKS:
        line(f"expert {task}", row(folder / "checkpoints" / task))
    results = {}
    for name, method, seconds in merges:
        out = folder / "merged" / name
        results[name] = row(out)
        total = read["linear"] + (0 if method == "linear" else read["base"])
        line(f"merge {name}", results[name], f"{float(seconds):9.2f}{total / 1e3:9.0f}{weight_bytes(out) / 1e3:12.0f}")
    best = max(results, key=lambda name: results[name][2])
    average, chosen = results["average"][1], results[best][1]
    print(f"\nThe validation images choose {best}: {chosen:.1f} % on the test images,", end=" ")
    print(f"against {average:.1f} % of plain averaging.")
    if chosen - average < 2:
        print("The best merge does not clearly beat plain averaging: see docs/demo.md for what to look at.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
