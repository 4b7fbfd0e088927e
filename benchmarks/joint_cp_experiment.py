"""What a joint CP factorisation of trained LoRA adapters buys over the best approximation of their mean at equal rank.

A small network learns digits (scikit-learn, 8 x 8); one rank-4 adapter per task is tuned on rotated, mirrored and
inverted digits; the adapters are merged. `python joint_cp_experiment.py` prints one table; minutes on one core.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from itertools import pairwise

import torch
from sklearn.datasets import load_digits

from mergekernels.ops import cp_als

RANK, WIDTH = 4, 64
TASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mirror": lambda x: x.flip(-1),
    "turn 90": lambda x: x.rot90(1, (-2, -1)),
    "upside down": lambda x: x.flip(-2),
    "invert": lambda x: 1.0 - x,
    "transpose": lambda x: x.mT,
    "shift": lambda x: x.roll(1, -1),
}
Layers = list[torch.Tensor]
Adapter = list[tuple[torch.Tensor, torch.Tensor]]


def forward(x: torch.Tensor, weights: Layers) -> torch.Tensor:
    x = x.flatten(1)
    for w in weights[:-1]:
        x = (x @ w.mT).relu()
    return x @ weights[-1].mT


def train(parameters: Layers, loss: Callable[[], torch.Tensor], steps: int, rate: float) -> None:
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for p in parameters:
        p.requires_grad_(False)


def added(base: Layers, deltas: Layers) -> Layers:
    return [w + d for w, d in zip(base, deltas, strict=True)]


def products(adapter: Adapter) -> Layers:
    return [b @ a for b, a in adapter]


def cut(x: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def one_seed(seed: int) -> dict[str, dict[str, float]]:
    """Method -> measure -> value, means over tasks."""
    torch.manual_seed(seed)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16.0
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    fit, held = order[:1200], order[1200:]
    loss = torch.nn.functional.cross_entropy
    sizes = [64, WIDTH, WIDTH, 10]
    base = [torch.randn(m, n) * (2.0 / n) ** 0.5 for n, m in pairwise(sizes)]
    train(base, lambda: loss(forward(x[fit], base), y[fit]), 150, 5e-3)
    adapters: list[Adapter] = []
    for change in TASKS.values():
        z = change(x[fit])
        adapter = [(torch.zeros(m, RANK), torch.randn(RANK, n) / n**0.5) for n, m in pairwise(sizes)]
        flat = [f for pair in adapter for f in pair]
        train(flat, lambda a=adapter, z=z: loss(forward(z, added(base, products(a))), y[fit]), 200, 1e-2)  # type: ignore[misc]
        adapters.append(adapter)
    stacks = [list(pairs) for pairs in zip(*adapters, strict=True)]

    def accuracy(deltas: Layers, change: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return float((forward(change(x[held]), added(base, deltas)).argmax(1) == y[held]).float().mean())

    means = [torch.stack([b @ a for b, a in stack]).mean(0) for stack in stacks]
    found: dict[str, dict[str, float]] = {}

    def note(name: str, per_task: list[Layers], merged: Layers) -> None:
        errors = []
        for t in range(len(adapters)):
            own = products(adapters[t])
            lost = sum(float((p - d).square().sum()) for p, d in zip(per_task[t], own, strict=True))
            errors.append((lost / sum(float(d.square().sum()) for d in own)) ** 0.5)
        whole = sum(float(m.square().sum()) for m in means)
        off = (sum(float((p - m).square().sum()) for p, m in zip(merged, means, strict=True)) / whole) ** 0.5
        found[name] = {
            "error of a task": statistics.mean(errors),
            "error of the mean": off,
            "own task": statistics.mean(
                accuracy(per_task[t], change) for t, change in enumerate(TASKS.values())
            ),
            "merged": statistics.mean(accuracy(merged, change) for change in TASKS.values()),
        }  # fmt: skip

    count = len(adapters)
    nothing = [torch.zeros_like(m) for m in means]
    note("base", [nothing] * count, nothing)
    note("adapters; full mean", [products(a) for a in adapters], means)
    for rank in (RANK, 2 * RANK, 4 * RANK):
        svd = [cut(m, min(rank, *m.shape)) for m in means]
        note(f"svd of the mean, rank {rank}", [svd] * count, svd)
        slices = []
        for stack in stacks:
            c, u, v = cp_als(stack, rank, max_iter=200).factors
            slices.append((u * c[:, None]) @ v.mT)
        note(f"joint cp, rank {rank}", [[s[t] for s in slices] for t in range(count)], [s.mean(0) for s in slices])
    return found


def main() -> None:
    torch.set_num_threads(1)
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    results = [one_seed(seed) for seed in seeds]
    columns = list(next(iter(results[0].values())))
    print("| method | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in results[0]:
        cells = []
        for column in columns:
            values = [r[name][column] for r in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
