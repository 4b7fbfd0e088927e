"""sd-mecha's merges with and without the hooks; run by integrations_sd_mecha.py inside its environment.

usage: python timed_sd_mecha.py FOLDER REPEAT SMALL
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import sd_mecha
import torch
from safetensors.torch import save_file
from sd_mecha.extensions import merge_methods
from timed_calls import turns

import mergekernels.integrations.sd_mecha as hook

# Shapes of Stable Diffusion's U-Net.
SHAPES = {"attention": (1280, 1280), "context": (1280, 2048), "conv": (640, 640, 3, 3), "feed": (5120, 1280)}


def files(folder: Path, small: bool) -> list[Path]:
    """A base and three fine-tunes, 16 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        shape = tuple(max(3, s // 10) for s in shape) if small else shape
        base[name] = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
    made = []
    for t in range(4):
        made.append(folder / f"{t}.safetensors")
        generator = torch.Generator().manual_seed(100 + t)
        noise = {k: 0.002 * torch.randn(v.shape, generator=generator) if t else 0.0 for k, v in base.items()}
        save_file({k: (v + noise[k]).half() for k, v in base.items()}, made[-1])
    return made


def merged(paths: list[Path], name: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The whole of sd_mecha.merge, files read and cast included."""
    base, *models = (sd_mecha.model(str(p)) for p in paths)
    deltas = [merge_methods.resolve("subtract")(m, base) for m in models[: 1 if name == "truncate_rank" else None]]
    recipe = merge_methods.resolve("add_difference")(base, merge_methods.resolve(name)(*deltas, **options))
    found = sd_mecha.merge(recipe, output_dtype=torch.float32)
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


def calls(name: str, models: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """The method alone, on one tensor."""
    found: torch.Tensor = merge_methods.resolve(name).__wrapped__(*models, **options)
    return found


def norms(ours: Any, theirs: Any) -> str:
    """Of what differs, relative to what is there."""
    if isinstance(ours, dict):
        return f"{max(_relative(ours[k], theirs[k]) for k in theirs):.1e}"
    return f"{_relative(ours, theirs):.1e}"


def masks(ours: Any, theirs: Any) -> str:
    """Random results are compared by their norms."""
    pairs = [(ours[k], theirs[k]) for k in theirs] if isinstance(ours, dict) else [(ours, theirs)]
    ratio = max(abs(float(a.norm() / b.norm()) - 1.0) for a, b in pairs)
    assert ratio < 0.05, ratio
    return f"other masks; norms: {ratio:.1e}"


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    found = float((a.double() - b.double()).norm() / b.double().norm())
    assert found < 1e-3, found
    return found


def main(folder: Path, repeat: int, small: bool) -> None:
    """Whole merges, then single calls."""
    logging.disable(logging.WARNING)
    paths = files(folder / ("sd-mecha-small" if small else "sd-mecha"), small)
    # Another seed than those of the data: sd-mecha's masks come from the same generator of torch and would follow them.
    della = {"probability": 0.9, "della_eps": 0.1, "seed": 50}
    cases: list[tuple[str, str, dict[str, Any], Any]] = [
        ("DELLA", "ties_sum_with_dropout", della, masks),
        ("DARE with TIES", "ties_sum_with_dropout", {"probability": 0.9, "seed": 50}, masks),
        ("TIES", "ties_sum", {"k": 0.2}, norms),
        ("TIES with stock factor", "ties_sum_extended", {"k": 0.2}, norms),
        ("dropout", "dropout", {"probability": 0.9, "seed": 50}, masks),
        ("rank 8 in a random basis", "truncate_rank", {"rank": 8, "approximate_basis_seed": 1}, norms),
    ]

    def hooked(call: Any, *args: Any) -> Any:
        with hook.enabled():
            hook.reset_stats()
            found = call(*args)
            counts = hook.stats()
            assert counts.served and not counts.passed_on, counts
            return found

    with hook.enabled():
        pass  # what it imports is loaded
    side = 128 if small else 1280
    for label, name, options, difference in cases:
        turns(
            f"merge, {label}",
            lambda name=name, options=options: merged(paths, name, options),
            lambda name=name, options=options: hooked(merged, paths, name, options),
            difference,
            repeat,
        )
    models = [torch.randn(side, side, generator=torch.Generator().manual_seed(t)) for t in range(3)]
    # Of rows of three entries, as in convolutions, the stock factor has poles: nothing to compare.
    cases.append(("model stock", "model_stock", {}, norms))
    cases.append(("best rank 8", "truncate_rank", {"rank": 8, "use_approximate_basis": False}, norms))
    for label, name, options, difference in cases:
        if "probability" in options and name != "dropout":
            options = {**options, "probability": torch.tensor(options["probability"])}
        given = models[:1] if name == "truncate_rank" else models
        turns(
            f"{name}, {label}, one tensor {side} x {side}",
            lambda name=name, options=options, given=given: calls(name, given, options),
            lambda name=name, options=options, given=given: hooked(calls, name, given, options),
            difference,
            repeat,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "small")
