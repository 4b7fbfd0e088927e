"""Small checkpoints and recipes for the tests of the engine, and an `Io` whose calls can be made to fail."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergekernels.engine.driver import execute
from mergekernels.engine.events import RunReport
from mergekernels.engine.io import Io
from mergekernels.engine.plan import Plan, make_plan
from mergekernels.engine.recipe import load_recipe, resolve

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (600, 64),
    "model.layers.0.mlp.weight": (130, 257),
    "model.layers.0.norm.weight": (64,),
    "model.layers.1.mlp.weight": (320, 500),
    "model.layers.1.norm.weight": (64,),
    "model.scalar": (),
    "model.empty": (0, 7),
    "model.norm.weight": (64,),
}


def state_dicts(
    models: int = 3, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Base and fine-tunes; many deltas tie, because they are rounded to a coarse grid."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    base = {name: noise(shape, 0.02).to(dtype) for name, shape in SHAPES.items()}
    base["model.position_ids"] = torch.arange(100)
    result = [base]
    for _ in range(models):
        tuned = {
            k: (v.float() + noise(tuple(v.shape), 0.001)).to(dtype) for k, v in base.items() if v.is_floating_point()
        }
        tuned["model.position_ids"] = base["model.position_ids"].clone()
        result.append(tuned)
    return result


def save(folder: Path, tensors: dict[str, torch.Tensor], *, files: int = 1) -> Path:
    """A checkpoint folder, sharded by turns if `files` > 1, with the small files a model has."""
    folder.mkdir(parents=True)
    names = list(tensors)
    where = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        part = {n: tensors[n] for n in names[i::files]}
        where |= dict.fromkeys(part, name)
        save_file(part, folder / name, {"format": "pt"})
    if files > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "torch_dtype": "float64", "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "old", "unk_token": "<unk>"}')
    return folder


def family(root: Path, models: int = 3, **options: Any) -> list[Path]:
    """Folders of a base and its fine-tunes under `root`."""
    names = ["base", *(f"tuned{i}" for i in range(1, models + 1))]
    return [
        save(root / n, t, files=1 + i % 2)
        for i, (n, t) in enumerate(zip(names, state_dicts(models, **options), strict=True))
    ]


def recipe(root: Path, method: str, *, name: str = "recipe.yml", **top: Any) -> Path:
    """A recipe over the family under `root`. Keyword arguments are top-level keys."""
    models = sorted(p for p in root.iterdir() if p.name.startswith("tuned"))
    data: dict[str, Any] = {"merge_method": method, "models": [{"model": str(m)} for m in models], "dtype": "bfloat16"}
    if method != "linear":
        data["base_model"] = str(root / "base")
    data |= {k: v for k, v in top.items() if v is not None}
    path = root / name
    path.write_text(json.dumps(data))
    return path


TIES = {"parameters": {"weight": 0.8, "density": 0.3}}


def plan_of(path: Path, out: Path, *, io: Io | None = None, tile: int | None = None, **options: Any) -> Plan:
    """The plan of a recipe, with the engine's inner options."""
    merge = resolve(load_recipe(path))
    defaults: dict[str, Any] = {"memory": None, "threads": 2, "backend": "cpu", "device": "cpu", "shard_size": 100_000}
    return make_plan(merge, out=out, io=io or Io(), tile=tile, **(defaults | options))


def run_of(path: Path, out: Path, *, io: Io | None = None, overwrite: bool = False, **options: Any) -> RunReport:
    """Plan and run a recipe, with the engine's inner options."""
    io = io or FaultyIo(-1, 0)
    return execute(plan_of(path, out, io=io, **options), overwrite=overwrite, progress=None, io=io, start=0.0)


def published(out: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def beside(out: Path) -> list[str]:
    """What lies in OUT's folder under a name that begins with OUT's, OUT excepted."""
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith(out.name) and p != out)


class FaultyIo(Io):
    """Fails the n-th call among `names` (all if empty), once, or from then on with `sticky`.

    error : errno to raise; "short" makes a read or write move one byte; "zero" moves none; "kill" ends the process.
    """

    def __init__(self, at: int, error: int | str, names: tuple[str, ...] = (), *, sticky: bool = False) -> None:
        self.at = at
        self.error = error
        self.names = names
        self.sticky = sticky
        self.count = 0
        self.fired = 0
        self._lock = threading.Lock()

    # Only a power failure could tell the difference, and the sweeps are quicker for it.
    _fsync = _fdatasync = staticmethod(lambda fd: None)

    def call(self, name: str, *args: Any) -> Any:
        if self.names and name not in self.names:
            return super().call(name, *args)
        with self._lock:
            self.count += 1
            fire = self.count == self.at or (self.sticky and self.count > self.at)
            self.fired += fire
        if not fire:
            return super().call(name, *args)
        if self.error == "kill":
            os.kill(os.getpid(), 9)
        if self.error == "zero":
            return 0
        if self.error == "short":
            if name == "preadv":
                fd, views, offset = args
                return os.preadv(fd, [views[0][:1]], offset)
            fd, data, offset = args
            return os.pwrite(fd, memoryview(data)[:1], offset)
        assert isinstance(self.error, int)
        raise OSError(self.error, os.strerror(self.error))


EIO, ENOSPC, EINTR = errno.EIO, errno.ENOSPC, errno.EINTR
