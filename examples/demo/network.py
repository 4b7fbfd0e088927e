"""The network of the demo, its data and its tasks, and its checkpoints on disk.

Data: scikit-learn's handwritten digits, 1797 images of 8 x 8. A task shows the digit at one place of a 16 x 16
canvas, and in one form (as it is, rotated, mirrored, inverted); the answer is always one of ten classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

CANVAS, DIGIT, CLASSES = 16, 8, 10
SHARD_BYTES = 400_000


class Block(nn.Module):
    """A residual block: norm, up, GELU, down."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, hidden] to [n, hidden]."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class DigitsNet(nn.Module):
    """A residual network from a 16 x 16 image to ten logits."""

    def __init__(self, hidden: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.config = {"hidden_size": hidden, "num_hidden_layers": layers}
        self.embed = nn.Linear(CANVAS * CANVAS, hidden)
        self.layers = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 16, 16] to [n, 10]."""
        x = self.embed(images.flatten(1))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _place(row: int, col: int, form: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def on_canvas(digits: torch.Tensor) -> torch.Tensor:
        canvas = torch.zeros(len(digits), CANVAS, CANVAS)
        canvas[:, row : row + DIGIT, col : col + DIGIT] = form(digits)
        return canvas

    return on_canvas


TASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "centre": _place(4, 4, lambda x: x),
    "rotated": _place(0, 0, lambda x: x.rot90(1, (1, 2))),
    "mirrored": _place(0, 8, lambda x: x.flip(2)),
    "inverted": _place(8, 0, lambda x: 1 - x),
    "corner": _place(8, 8, lambda x: x),
}


@cache
def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 8, 8] in 0..1 and labels [n] of a split: 1000 train, 300 validation, 497 test."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    part = {"train": order[:1000], "validation": order[1000:1300], "test": order[1300:]}[split]
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, DIGIT, DIGIT) / 16
    return images[part], torch.tensor(labels)[part]


def accuracy(net: DigitsNet, task: str, split: str) -> float:
    """Percent of the images of a split that the network names rightly when shown as the task shows them."""
    images, labels = digits(split)
    with torch.no_grad():
        return 100 * (net(TASKS[task](images)).argmax(1) == labels).double().mean().item()


def save_checkpoint(net: DigitsNet, folder: Path) -> None:
    """Writes bf16 weights as numbered safetensors shards with an index and a config: the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in net.state_dict().items():
        value = tensor.to(torch.bfloat16).contiguous()
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
        total += value.nbytes
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {"architectures": ["DigitsNet"], "model_type": "digits_net", "torch_dtype": "bfloat16", **net.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_checkpoint(folder: Path) -> DigitsNet:
    """The network that a checkpoint folder describes, every tensor read from its shards."""
    config = json.loads((folder / "config.json").read_text())
    net = DigitsNet(config["hidden_size"], config["num_hidden_layers"])
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    net.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    return net.eval()
