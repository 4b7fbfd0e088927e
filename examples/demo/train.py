"""Trains the base network and one expert per task from it; about 20 seconds on one core.

usage: python train.py FOLDER      writes FOLDER/base and FOLDER/<task> as sharded safetensors checkpoints

The base sees every task, but only 20 labelled images. Each expert starts from the base's stored weights and sees the
1000 training images of its own task alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from network import TASKS, DigitsNet, digits, load_checkpoint, save_checkpoint

STEPS, BATCH, NOISE, SMOOTHING = 300, 64, 0.1, 0.1
BASE_IMAGES, BASE_RATE, EXPERT_RATE = 20, 1e-3, 3e-4


def train(net: DigitsNet, tasks: list[str], num_images: int, rate: float, seed: int) -> None:
    """AdamW with a one-cycle rate, one task per step in turn, on the first `num_images` training images with noise."""
    images, labels = digits("train")
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, STEPS)
    for step in range(STEPS):
        pick = torch.randint(0, num_images, (BATCH,), generator=draw)
        noisy = images[pick] + NOISE * torch.randn(BATCH, *images.shape[1:], generator=draw)
        logits = net(TASKS[tasks[step % len(tasks)]](noisy))
        loss = torch.nn.functional.cross_entropy(logits, labels[pick], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main(folder: Path) -> None:
    """Trains and saves all networks."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    base = DigitsNet()
    train(base, list(TASKS), BASE_IMAGES, BASE_RATE, seed=1)
    save_checkpoint(base, folder / "base")
    for seed, task in enumerate(TASKS, 10):
        expert = load_checkpoint(folder / "base").train()
        train(expert, [task], 1000, EXPERT_RATE, seed)
        save_checkpoint(expert, folder / task)
    size = sum(p.numel() for p in base.parameters())
    print(f"trained 1 base and {len(TASKS)} experts of {size} parameters in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
