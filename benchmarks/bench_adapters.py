"""Low-rank work beside what users run today: dense deltas and full singular value decompositions of torch.

`pytest bench_adapters.py [--quick] [--results FILE]` in this folder; the rows go into the section "spectral" of a file.
Adapters: 8 of rank 16 with normal factors whose columns fall as 0.8^i, so that the truncation to rank 16 has a gap.
The peer of `svd` is PEFT's own formula: the dense sum, `torch.linalg.svd` with its default full matrices, the cut.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekernels as mk
from mergekernels import ops
from mergekernels.adapters.model import Adapter, Factors, Module, Site

COUNT, RANK = 8, 16
WEIGHTS = [1.0, 0.5, -0.25, 0.75, 1.0, 0.3, 0.6, -1.0]


def normal(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def adapter(m: int, n: int, seed: int) -> Factors:
    fall = 0.8 ** torch.arange(RANK)
    return Factors(normal(m, RANK, 2 * seed) * fall, normal(RANK, n, 2 * seed + 1))


def peft_svd(parts: list[Factors], rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_B, lora_A) as PEFT computes them."""
    delta = WEIGHTS[0] * (parts[0].b @ parts[0].a)
    for w, part in zip(WEIGHTS[1:], parts[1:], strict=False):
        delta += w * (part.b @ part.a)
    u, s, vh = torch.linalg.svd(delta)
    return u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]


def our_svd(parts: list[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
    found = ops.lowrank(ops.stack(parts, WEIGHTS[: len(parts)]), rank=RANK).factors
    return found.b, found.a


def distance(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Of the products, relative, in float64."""
    want = theirs[0].double() @ theirs[1].double()
    return float((ours[0].double() @ ours[1].double() - want).norm() / want.norm())


@pytest.mark.parametrize("side", [2048, 4096])
def test_svd_of_one_layer(versus: Any, side: int) -> None:
    side = side // 4 if versus.quick else side
    parts = [adapter(side, side, i) for i in range(COUNT)]
    versus(
        "svd, one layer",
        f"8 of rank 16 on {side} x {side}",
        lambda: our_svd(parts),
        {"PEFT's formula": lambda: peft_svd(parts)},
        distance,
        1e-5,
    )


def test_svd_of_many_adapters(versus: Any) -> None:
    """The ranks together come near the side: the route changes. Quality is compared, since the spectrum is flat."""
    side, count = (512, 20) if versus.quick else (2048, 100)
    total = ops.stack([Factors(normal(side, RANK, 2 * i), normal(RANK, side, 2 * i + 1)) for i in range(count)])
    dense = total.b.double() @ total.a.double()

    def peer() -> tuple[torch.Tensor, torch.Tensor]:
        u, s, vh = torch.linalg.svd(total.b @ total.a)
        return u[:, :RANK] * s[:RANK], vh[:RANK]

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        found = ops.lowrank(total, rank=RANK).factors
        return found.b, found.a

    versus(
        "svd, one layer",
        f"{count} of rank 16 on {side} x {side}",
        ours,
        {"PEFT's formula": peer},
        lambda mine, theirs: lost(dense, mine) / lost(dense, theirs) - 1.0,
        1e-4,
    )


def lost(dense: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float((dense - factors[0].double() @ factors[1].double()).norm())


@pytest.mark.parametrize("spectrum", ["flat", "power law"])
def test_extraction(versus: Any, spectrum: str) -> None:
    """Rank 64 of a task vector. flat: normal entries; power law: singular values i^-0.7."""
    m, n = (512, 1408) if versus.quick else (2048, 5632)
    x = normal(m, n)
    if spectrum != "flat":
        left, right = torch.linalg.qr(normal(m, m, 1))[0], torch.linalg.qr(normal(n, m, 2))[0]
        x = (left * torch.arange(1, m + 1) ** -0.7) @ right.mT
    wide = x.double()

    def peer() -> tuple[torch.Tensor, torch.Tensor]:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u[:, :64] * s[:64], vh[:64]

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        found = ops.lowrank(x, rank=64).factors
        return found.b, found.a

    versus(
        "extraction",
        f"rank 64 of {m} x {n}, {spectrum}",
        ours,
        {"torch.linalg.svd": peer},
        lambda mine, theirs: lost(wide, mine) / lost(wide, theirs) - 1.0,
        1e-4,
    )


def write_adapters(folder: Path, modules: int, side: int) -> list[Path]:
    """Adapter folders as PEFT writes them."""
    paths = []
    for t in range(COUNT):
        tensors = {}
        for i in range(modules):
            part = adapter(side, side, COUNT * i + t)
            name = f"base_model.model.model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = part.a, part.b
        path = folder / f"adapter{t}"
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        targets = [f"{x}_proj" for x in "qkvo"]
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/base"}))
        paths.append(path)
    return paths


@pytest.mark.parametrize("side", [512, 2048])
def test_svd_of_a_set_with_files(versus: Any, tmp_path: Path, side: int) -> None:
    """64 modules of 8 adapters, read from files and written to one. The peer is PEFT's formula between the same files.

    At 2048 the peer takes minutes: it runs once for the comparison and once for its time.
    """
    modules = 64
    if versus.quick:
        modules, side = 8, side // 8
    elif side == 2048:
        versus.rounds = 1
    paths = write_adapters(tmp_path, modules, side)
    runs = iter(range(1000))

    def ours() -> dict[str, torch.Tensor]:
        out = tmp_path / f"ours{next(runs)}"
        mk.merge_adapters([str(p) for p in paths], "svd", weights=WEIGHTS, rank=RANK, out=str(out))
        return load_file(out / "adapter_model.safetensors")

    def peer() -> dict[str, torch.Tensor]:
        read = [load_file(p / "adapter_model.safetensors") for p in paths]
        merged = {}
        for name in read[0]:
            if not name.endswith(".lora_A.weight"):
                continue
            other = name.replace("lora_A", "lora_B")
            merged[other], merged[name] = peft_svd([Factors(one[other], one[name]) for one in read])
        out = tmp_path / f"peer{next(runs)}.safetensors"
        save_file({k: v.contiguous() for k, v in merged.items()}, out)
        return load_file(out)

    def worst(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
        names = [n for n in theirs if n.endswith(".lora_A.weight")]
        others = [n.replace("lora_A", "lora_B") for n in names]
        pairs = zip(names, others, strict=True)
        return max(distance((mine[b], mine[a]), (theirs[b], theirs[a])) for a, b in pairs)

    versus("svd, a set", f"{modules} modules of {side} x {side}, files", ours, {"PEFT's formula": peer}, worst, 1e-5)


def in_memory(parts: list[Factors]) -> list[Adapter]:
    """Each product as an adapter of one module."""
    m, n = parts[0].shape
    site = Site("layer", "linear", (m, n))
    made = []
    for i, part in enumerate(parts):
        load = (lambda p: lambda: (p.b, p.a))(part)
        made.append(Adapter(f"a{i}", {"layer": Module(site, RANK, float(RANK), 1.0, "F32", load)}))
    return made


def test_svd_with_other_weights(versus: Any) -> None:
    """A second merge of the same adapters, beside the first one anew."""
    side = 512 if versus.quick else 2048
    given = in_memory([adapter(side, side, i) for i in range(COUNT)])
    prepared = mk.prepare_adapters(given, "svd", rank=RANK)

    def factors(merged: mk.MergedAdapter) -> tuple[torch.Tensor, torch.Tensor]:
        found = merged.modules["layer"][1]
        return found.b, found.a

    versus(
        "svd, other weights",
        f"8 of rank 16 on {side} x {side}",
        lambda: factors(prepared.merge(WEIGHTS)),
        {
            "merge_adapters": lambda: factors(mk.merge_adapters(given, "svd", weights=WEIGHTS, rank=RANK)),
            "PEFT's formula": lambda: peft_svd([a.modules["layer"].factors() for a in given]),
        },
        distance,
        1e-5,
    )


def peft_ties(parts: list[Factors], density: float) -> torch.Tensor:
    """The merged matrix of ties_svd by PEFT's formula: all deltas at once, topk, votes."""
    deltas = []
    for part in parts:
        delta = part.b @ part.a
        kept = torch.topk(delta.abs().reshape(-1), int(density * delta.numel())).indices
        mask = torch.zeros(delta.numel())
        mask[kept] = 1
        deltas.append(delta * mask.reshape(delta.shape))
    stack = torch.stack(deltas)
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)
    weighted = stack * torch.tensor(WEIGHTS[: len(parts)]).reshape(-1, 1, 1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1.0)


def test_ties_svd(versus: Any) -> None:
    """The error is how much worse the approximation is than the peer's, which is the best one."""
    side = 512 if versus.quick else 2048
    parts = [adapter(side, side, i) for i in range(COUNT)]
    given = in_memory(parts)
    whole = peft_ties(parts, 0.3)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        merged = mk.merge_adapters(given, "ties_svd", weights=WEIGHTS, density=0.3, rank=RANK)
        found = merged.modules["layer"][1]
        return found.b, found.a

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        u, s, vh = torch.linalg.svd(peft_ties(parts, 0.3))
        return u[:, :RANK] @ torch.diag(s[:RANK]), vh[:RANK]

    def excess(one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]) -> float:
        rests = [float((whole.double() - b.double() @ a.double()).norm()) for b, a in (one, two)]
        return abs(rests[0] / rests[1] - 1.0)

    versus("ties_svd", f"8 of rank 16 on {side} x {side}", ours, {"PEFT's formula": theirs}, excess, 1e-4)


def test_knots(versus: Any) -> None:
    """Beside its own steps: the SVD of all deltas side by side in float64, then TIES in that basis."""
    side = 256 if versus.quick else 2048
    parts = [adapter(side, side, i) for i in range(COUNT)]
    given = in_memory(parts)

    def ours() -> torch.Tensor:
        merged = mk.merge_adapters(given, "knots", inner="ties", density=1.0)
        return merged.modules["layer"][1].dense()

    def theirs() -> torch.Tensor:
        deltas = torch.cat([part.b @ part.a for part in parts], 1).double()
        u, s, vh = torch.linalg.svd(deltas, full_matrices=False)
        rank = int((s > 1e-5).sum())
        z = torch.stack((s[:rank, None] * vh[:rank]).split(side, 1))
        agree = (z.sign() == z.sum(0).sign()) & (z != 0)
        return (u[:, :rank] @ ((z * agree).sum(0) / agree.sum(0).clamp_min(1))).float()

    def error(mine: torch.Tensor, other: torch.Tensor) -> float:
        return float((mine - other).norm() / other.norm())

    # A vote whose sum is within rounding of zero may go either way.
    versus("knots", f"8 of rank 16 on {side} x {side}", ours, {"its SVD (torch)": theirs}, error, 1e-3)
