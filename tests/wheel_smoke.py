"""Writes small checkpoints, a recipe and the expected merge into the current folder; standard library only."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write(folder: str, tensors: dict[str, list[float]]) -> None:
    """A float32 checkpoint in one file."""
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [offset, offset + 4 * len(values)]}
        offset += 4 * len(values)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    data = b"".join(struct.pack(f"<{len(v)}f", *v) for v in tensors.values())
    Path(folder).mkdir()
    Path(folder, "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    Path(folder, "config.json").write_text("{}")


write("base", {"w": [0.0, 0.0, 0.0, 0.0], "b": [1.0]})
write("a", {"w": [4.0, 4.0, 2.0, 0.5], "b": [3.0]})
write("b", {"w": [2.0, -8.0, -2.0, 0.25], "b": [2.0]})
# Density 0.75 keeps three of w and the one of b: w votes +6, -4, 0 (counts as +); b agrees on +.
write("expected", {"w": [3.0, -8.0, 2.0, 0.0], "b": [2.5]})
Path("recipe.yml").write_text(
    "merge_method: ties\nbase_model: base\ndtype: float32\nparameters: {density: 0.75, weight: 1.0}\n"
    "models: [{model: a}, {model: b}]\n"
)
