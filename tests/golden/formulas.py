"""Formulas of papers that no package offers, written down directly in float64: slow, whole tensors, no tricks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from make_kit import MODELS, SHAPES, Case, case, inputs

Tensors = dict[str, torch.Tensor]
BOUND = 2**-22
CASES = [
    case("consensus", "consensus", params={"threshold": 0.3, "at_least": 2, "lambda": 0.7}, bound=BOUND),
    case("tall_mask-three", "consensus", params={"threshold": [0.2, 0.3, 0.4], "at_least": 3}, bound=BOUND),
    case("deme", "deme", params={"weight": [0.2, 0.3, 0.1]}, bound=BOUND),
    case("from_norm", "from_norm", params={"k": 2.0}, bound=BOUND),
    case("pcb", "pcb", params={"ratio": 0.2, "clip": 0.01, "lambda": 1.2}, bound=2**-18),
    case("pcgrad", "pcgrad", params={"order": "fixed", "reduction": "sum", "scope": "model"}, bound=BOUND),
    case(
        "breadcrumbs-rows",
        "breadcrumbs",
        dialect="paper",
        params={"weight": 1.0, "density": 0.3, "gamma": 0.05, "lambda": 0.5},
        bound=BOUND,
    ),
    case("sce-paper", "sce", dialect="paper", params={"select_topk": 0.3}, bound=BOUND),
    case("ramplus-model", "ramplus_tl", dialect="paper", params={"epsilon": 0.001, "rescale_factor": 1.2}, bound=BOUND),
]


def formula(folder: Path) -> Iterator[tuple[Case, Tensors]]:
    """Every case, from float64 deltas of the float32 inputs."""
    family = inputs(folder, torch.float64)
    base = family["base"]
    # Deltas are rounded to float32, as every tool that works in float32 does.
    deltas = {m: {n: (family[m][n] - base[n]).float().double() for n in SHAPES} for m in MODELS[1:]}
    for entry in CASES:
        name = entry["id"].partition("-")[0]
        key = {"tall_mask": "consensus"}.get(name, name)
        merged = RULES[entry["id"] if entry["id"] in RULES else key](
            [deltas[m] for m in entry["models"]], **_plain(entry)
        )
        yield entry, {n: (base[n] + merged[n]).float() for n in SHAPES}


def _plain(entry: Case) -> dict[str, Any]:
    return {
        k.replace("lambda", "scale"): v for k, v in entry["params"].items() if k not in ("order", "reduction", "scope")
    }


def consensus(deltas: list[Tensors], threshold: Any, at_least: int, scale: float = 1.0) -> Tensors:
    """Wang et al. 2024, arXiv 2405.07813: the sum, where enough tasks have |d| > threshold |sum - d|."""
    limits = threshold if isinstance(threshold, list) else [threshold] * len(deltas)
    found = {}
    for n in SHAPES:
        total = torch.stack([d[n] for d in deltas]).sum(0).float().double()
        users = sum((d[n].abs() > c * (total - d[n]).abs()).long() for d, c in zip(deltas, limits))  # noqa: B905
        found[n] = scale * torch.where(users >= at_least, total, 0.0)
    return found


def deme(deltas: list[Tensors], weight: list[float]) -> Tensors:
    """Ma et al. 2024, Decouple-then-Merge: weighted task vectors."""
    return {n: sum(w * d[n] for w, d in zip(weight, deltas)) for n in SHAPES}  # noqa: B905


def from_norm(deltas: list[Tensors], k: float) -> Tensors:
    """The minimiser of sum |d_t|^k |d - d_t|^2: weights |d_t|^k, per tensor."""
    found = {}
    for n in SHAPES:
        sizes = [d[n].norm() ** k for d in deltas]
        found[n] = sum(s * d[n] for s, d in zip(sizes, deltas)) / sum(sizes)  # noqa: B905
    return found


def _flat(d: Tensors) -> torch.Tensor:
    return torch.cat([d[n].flatten() for n in sorted(SHAPES)])


def _unflat(x: torch.Tensor) -> Tensors:
    names = sorted(SHAPES)
    pieces = torch.split(x, [math.prod(SHAPES[n]) for n in names])
    return {n: p.reshape(SHAPES[n]) for n, p in zip(names, pieces)}  # noqa: B905


def pcb(deltas: list[Tensors], ratio: float, clip: float, scale: float) -> Tensors:
    """Du et al. 2024, arXiv 2410.02396, over the model."""
    vectors = torch.stack([_flat(d) for d in deltas])
    count = vectors.shape[1]
    ordered = vectors.abs().sort(dim=1).values
    low, high = ordered[:, int(count * clip), None], ordered[:, int(count * (1 - clip) - 1), None]
    size = vectors.abs().clamp(low, high)
    within = ((size - low) / (high - low)) ** 2
    score = torch.exp(len(deltas) * within) * torch.tanh(vectors * vectors.sum(0))
    cut = score.sort(dim=1).values[:, int(count * (1 - ratio)), None]
    share = (score.clamp_min(cut) - cut) / (score.amax(1, keepdim=True) - cut)
    return _unflat(scale * (share * vectors.sign() * size).sum(0) / share.sum(0).clamp_min(1e-12))


def pcgrad(deltas: list[Tensors]) -> Tensors:
    """Yu et al. 2020, arXiv 2001.06782: projections in the given order, summed."""
    vectors = [_flat(d) for d in deltas]
    total = torch.zeros_like(vectors[0])
    for i, v in enumerate(vectors):
        h = v.clone()
        for j, other in enumerate(vectors):
            if j != i and (q := float(h @ other)) < 0:
                h -= q / float(other @ other) * other
        total += h
    return _unflat(total)


def breadcrumbs_rows(deltas: list[Tensors], weight: float, density: float, gamma: float, scale: float) -> Tensors:
    """Davari and Belilovsky 2023, arXiv 2312.06795: per row the largest go, then the largest of the rest stay."""
    found = {}
    for n in SHAPES:
        total = torch.zeros(SHAPES[n], dtype=torch.float64)
        for d in deltas:
            order = d[n].abs().argsort(dim=-1, descending=True)
            length = SHAPES[n][-1]
            top = int(length * gamma)
            kept = order[..., top : top + int(length * density)]
            total += weight * d[n] * torch.zeros_like(d[n]).scatter(-1, kept, 1.0)
        found[n] = scale * total
    return found


def sce_paper(deltas: list[Tensors], select_topk: float) -> Tensors:
    """Wan et al. 2024, FuseChat, arXiv 2408.07990: energies on the entries of highest variance, unmasked deltas."""
    found = {}
    for n in SHAPES:
        stack = torch.stack([d[n] for d in deltas])
        variance = stack.var(0, unbiased=False).flatten()
        count = int(int((variance > 0).sum()) * select_topk)
        mask = torch.zeros_like(variance).scatter(0, variance.topk(count).indices, 1.0).view(SHAPES[n])
        energy = ((stack * mask) ** 2).flatten(1).mean(1)
        share = energy / energy.sum() if float(energy.sum()) else torch.full_like(energy, 1 / len(deltas))
        sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
        weights = share.view(-1, *[1] * len(SHAPES[n])) * (stack.sign() == sign)
        divisor = weights.sum(0)
        found[n] = (weights * stack).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    return found


def ramplus_model(deltas: list[Tensors], epsilon: float, rescale_factor: float) -> Tensors:
    """Reinforced agent merging, arXiv 2601.13572: entries that one model changes grow with its share of common ones."""
    vectors = torch.stack([_flat(d) for d in deltas])
    changed = vectors.abs() > torch.tensor(epsilon, dtype=torch.float32).double()
    users = changed.sum(0)
    alone, common = changed & (users == 1), changed & (users > 1)
    factors = 1 + (rescale_factor - 1) * (common.sum(1) / alone.sum(1)).clamp_max(1.0)
    kept = vectors * changed
    return _unflat(torch.where(users == 1, (kept * factors[:, None]).sum(0), kept.sum(0) / users.clamp_min(1)))


RULES: dict[str, Callable[..., Tensors]] = {
    "consensus": consensus,
    "deme": deme,
    "from_norm": from_norm,
    "pcb": pcb,
    "pcgrad": pcgrad,
    "breadcrumbs-rows": breadcrumbs_rows,
    "sce-paper": sce_paper,
    "ramplus-model": ramplus_model,
}
