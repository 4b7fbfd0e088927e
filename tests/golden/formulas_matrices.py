"""Methods of adapters that no package offers, in dense float64: whole matrices, dense decompositions, no tricks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formulas_stacks import STACK_RULES
from make_kit import Case, case
from matrix_inputs import SITES, adapters, scale_of

__all__ = ["formula_matrices"]

Array = Any
Pairs = dict[str, list[tuple[Array, Array]]]
"""Module -> (B with the scale, A) of each adapter."""

_EQUAL, _MIXED = ("l1", "l2", "l3"), ("x1", "x2", "x3")


def _case(id_: str, method: str, models: tuple[str, ...] = _MIXED, **fields: Any) -> Case:
    entry = case(f"adapters-{id_}", method, norm="frobenius", takes="adapters", **{"bound": 1e-5, **fields})
    return {**entry, "models": list(models), "base": None}


CASES = [
    _case("robust_merge", "robust_merge", _EQUAL),
    _case("robust_merge-paper", "robust_merge", _EQUAL, dialect="paper", params={"keep": 0.3}),
    _case("robust_merge-code", "robust_merge", _EQUAL, dialect="code"),
    _case("lori", "lori", params={"sparsity": 0.6, "weight": [0.4, 0.5, 0.3]}),
    _case("lori-linear", "lori", _EQUAL, params={"sparsity": 0.8, "combination": "linear", "weight": [0.4, 0.5, 0.3]}),
    _case("from_norm", "from_norm", params={"k": 2.0}),
    _case("core_space-ties", "core_space", params={"inner": "ties", "density": 0.3}),
    _case("core_space-iso", "core_space", params={"inner": "iso_c"}),
    _case("core_space-tsv", "core_space", _EQUAL, params={"inner": "tsv_m", "lambda": 0.2}),
    _case("knots-ties", "knots", params={"density": 0.3, "lambda": 0.6}),
    _case("knots-rows", "knots", params={"density": 0.3, "stack": "rows"}),
    _case("lore", "lore", params={"mu": 0.02, "tau_scale": 1.8}),
    _case("lore-squared", "lore", params={"mu": 0.1, "tau_scale": 1.8, "prox": "squared"}),
    _case(
        "compress_then_merge",
        "compress_then_merge",
        params={"frame_rank": 4, "norm_share": 0.5, "max_iter": 300, "tol": 0.0, "weight": [0.5, 1.0, -2.0]},
    ),
    _case("tucker_merge", "tucker_merge", params={"energy_share": 0.8, "max_iter": 300, "tol": 0.0}),
    _case("lora_lego", "lora_lego", _EQUAL, params={"k": 4, "n_starts": 50}),
    _case(
        "lora_lego-raw",
        "lora_lego",
        _EQUAL,
        params={"k": 5, "n_starts": 50, "features": "raw", "sign": "none", "reweight": False, "output": "none"},
    ),
]


def formula_matrices(folder: Path) -> Iterator[tuple[Case, dict[str, torch.Tensor]]]:
    """Every case: deltas in the shape of the weights."""
    stored = adapters(folder)
    for entry in CASES:
        scaled = entry["dialect"] != "code"
        pairs: Pairs = {
            m: [
                (
                    stored[t][m][0].double().numpy() * (scale_of(t, m) if scaled else 1.0),
                    stored[t][m][1].double().numpy(),
                )
                for t in entry["models"]
            ]
            for m in SITES
        }
        params = dict(entry["params"])
        scale = params.pop("lambda", 1.0)
        rule: Callable[..., dict[str, Array]] = RULES[entry["method"]]
        if entry["method"] == "robust_merge":
            params["paper"] = entry["dialect"] == "paper"
        if entry["method"] == "lori":
            params["scales"] = {m: [scale_of(t, m) for t in entry["models"]] for m in SITES}
        merged = rule(pairs, **params)
        yield entry, {m: torch.from_numpy(scale * (x.T if m == "embed" else x)).float() for m, x in merged.items()}


def _pruned(x: Array, keep: float) -> Array:
    tau = np.sort(np.abs(x), axis=None)[int((1 - keep) * x.size) - 1]
    return np.where(np.abs(x) >= tau, x, 0.0)


def robust_merge(pairs: Pairs, paper: bool, keep: float = 0.2) -> dict[str, Array]:
    """Zeng et al. 2025, arXiv 2502.17159: pruned factors, rows rescaled and normalised over the adapters."""
    found = {}
    for m, given in pairs.items():
        ratios, bs, as_ = [], [], []
        for b, a in given:
            bs.append(_pruned(b, keep))
            as_.append(_pruned(a, keep))
            c = np.abs(a).sum(1) / np.abs(as_[-1]).sum(1)
            ratios.append(c if paper else np.maximum(c, np.sort(c)[int(0.8 * len(c))]))
        total = sum(ratios)
        left = sum(b * (c / total) for b, c in zip(bs, ratios))  # noqa: B905
        found[m] = (2.0 if paper else 4.0) * left @ sum(as_)
    return found


def lori(
    pairs: Pairs, sparsity: float, weight: Sequence[float], scales: dict[str, list[float]], combination: str = "cat"
) -> dict[str, Array]:
    """Zhang et al. 2025, LoRI: one threshold over every B of an adapter, then the sum."""
    taus = []
    for t in range(len(weight)):
        # Thresholds count magnitudes with the scale inside.
        every = np.sort(np.concatenate([np.abs(given[t][0]).ravel() for given in pairs.values()]))[::-1]
        taus.append(every[int((1 - sparsity) * len(every)) - 1])
    found = {}
    for m, given in pairs.items():
        kept = [(np.where(np.abs(b) >= tau, b, 0.0), a) for (b, a), tau in zip(given, taus)]  # noqa: B905
        if combination == "cat":
            found[m] = sum(w * b @ a for w, (b, a) in zip(weight, kept))  # noqa: B905
        else:
            roots = [np.sqrt(w * s) for w, s in zip(weight, scales[m])]  # noqa: B905
            left = sum(root * b / s for root, (b, _), s in zip(roots, kept, scales[m]))  # noqa: B905
            found[m] = left @ sum(root * a for root, (_, a) in zip(roots, kept))  # noqa: B905
    return found


def from_norm(pairs: Pairs, k: float) -> dict[str, Array]:
    """FroM, arXiv 2506.02478: weights |D|^k."""
    found = {}
    for m, given in pairs.items():
        deltas = [b @ a for b, a in given]
        sizes = [np.linalg.norm(d) ** k for d in deltas]
        found[m] = sum(s * d for s, d in zip(sizes, deltas)) / sum(sizes)  # noqa: B905
    return found


def _left(x: Array) -> Array:
    """Left singular vectors of what is not zero, the largest entry of each positive."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    u = u[:, s > 1e-9 * s[0]]
    return u * np.where(np.take_along_axis(u, np.abs(u).argmax(0)[None], 0) < 0, -1.0, 1.0)


def _ties(vectors: Array, density: float) -> Array:
    """Yadav et al. 2023, as in the authors' code: |d| at or above the int(density n)+1-th largest, votes without
    weights, the majority where the vote is zero, the mean of what agrees."""
    taus = np.sort(np.abs(vectors), axis=1)[:, ::-1][:, int(density * vectors.shape[1])]
    kept = np.where(np.abs(vectors) >= taus[:, None], vectors, 0.0)
    sign = np.sign(kept.sum(0))
    sign = np.where(sign == 0, np.sign(sign.sum()), sign)
    agree = (np.sign(kept) == sign) & (kept != 0)
    return (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)


def _polar(x: Array) -> Array:
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    k = s > 1e-9 * s[0]
    return u[:, k] @ vh[k]


def core_space(pairs: Pairs, inner: str, density: float = 1.0) -> dict[str, Array]:
    """Panariello et al. 2025: singular bases of the stacked factors, every adapter a small matrix between them."""
    found = {}
    for m, given in pairs.items():
        u, v = _left(np.hstack([b for b, _ in given])), _left(np.vstack([a for _, a in given]).T)
        cores = [(u.T @ b) @ (a @ v) for b, a in given]
        if inner == "ties":
            merged = _ties(np.stack([c.ravel() for c in cores]), density).reshape(cores[0].shape)
        elif inner == "iso_c":
            total = sum(cores)
            merged = _polar(total) * np.linalg.svd(total, compute_uv=False).sum() / min(total.shape)
        else:
            k = min(cores[0].shape) // len(cores)
            parts = [np.linalg.svd(c) for c in cores]
            k = min(k, min(a.shape[0] for _, a in given))
            left = _polar(np.hstack([x[0][:, :k] for x in parts]))
            right = _polar(np.vstack([x[2][:k] for x in parts]))
            merged = left @ np.diag(np.concatenate([x[1][:k] for x in parts])) @ right
        found[m] = u @ merged @ v.T
    return found


def knots(pairs: Pairs, density: float, stack: str = "columns") -> dict[str, Array]:
    """Stoica et al. 2024, arXiv 2410.19735: the dense updates side by side, TIES over all right parts."""
    turned = stack == "rows"
    names = sorted(pairs)
    deltas = {m: [(b @ a).T if turned else b @ a for b, a in pairs[m]] for m in names}
    bases = {m: _left(np.hstack(deltas[m])) for m in names}
    parts = {m: [bases[m].T @ d for d in deltas[m]] for m in names}
    count = len(next(iter(pairs.values())))
    merged = _ties(np.stack([np.concatenate([parts[m][t].ravel() for m in names]) for t in range(count)]), density)
    found, at = {}, 0
    for m in names:
        shape = parts[m][0].shape
        x = bases[m] @ merged[at : at + parts[m][0].size].reshape(shape)
        found[m] = x.T if turned else x
        at += parts[m][0].size
    return found


def _shrink(x: Array, mu: float, prox: str) -> Array:
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    tau = mu
    if prox == "squared":  # the root of tau = mu sum (s - tau)_+
        low, high = 0.0, float(s[0])
        for _ in range(200):
            tau = (low + high) / 2
            low, high = (tau, high) if mu * np.maximum(s - tau, 0).sum() > tau else (low, tau)
    return (u * np.maximum(s - tau, 0)) @ vh


def lore(pairs: Pairs, mu: float, tau_scale: float, prox: str = "plain") -> dict[str, Array]:
    """Liu et al. 2025, arXiv 2502.10749: 20 sweeps, the mean of the deviations on the virtual base."""
    found = {}
    for m, given in pairs.items():
        deltas = [b @ a for b, a in given]
        deviations = [np.zeros_like(d) for d in deltas]
        for _ in range(20):
            base = sum(x - d for x, d in zip(deltas, deviations)) / len(deltas)  # noqa: B905
            deviations = [_shrink(x - base, mu, prox) for x in deltas]
        base = sum(x - d for x, d in zip(deltas, deviations)) / len(deltas)  # noqa: B905
        found[m] = base + tau_scale * sum(deviations) / len(deltas)
    return found


RULES: dict[str, Callable[..., dict[str, Array]]] = {
    "robust_merge": robust_merge,
    "lori": lori,
    "from_norm": from_norm,
    "core_space": core_space,
    "knots": knots,
    "lore": lore,
    **STACK_RULES,
}
