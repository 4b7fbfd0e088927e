"""Inputs and parameters for mergekit's twenty methods, and how close a hooked result has to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import mergekernels.integrations.mergekit as fast

WEIGHTS = {1: [0.6], 2: [0.3, 0.7], 3: [0.5, -0.25, 1.0]}
ULP = 2.0**-23


@dataclass(frozen=True)
class Case:
    """models : besides the base. base : whether there is one. parameters : of merge_tensors, per-input ones as lists.

    bound : of the distance in float32 between hooked and unhooked, relative to the largest magnitude of the result.
    """

    method: str
    models: int
    base: bool
    parameters: dict[str, Any] = field(default_factory=dict)
    bound: float = 0.0

    @property
    def name(self) -> str:
        short = [f"{k}={v}" for k, v in self.parameters.items() if k != "weight"]
        return "-".join([self.method, *short]).replace(" ", "")


def arithmetic(method: str, models: int = 3, **parameters: Any) -> Case:
    return Case(method, models, True, {"weight": WEIGHTS[models], **parameters}, 2 * ULP)


# Two units in the last place where both tools add the same rounded products in another order or fused; more where
# mergekit's norms, dot products and angles are float32 sums (ours are float64).
CASES = [
    Case("linear", 3, False, {"weight": WEIGHTS[3]}, 2 * ULP),
    Case("linear", 2, False, {"weight": WEIGHTS[2], "normalize": False}, 2 * ULP),
    Case("linear", 2, True, {"weight": WEIGHTS[3]}, 2 * ULP),
    Case("slerp", 1, True, {"t": 0.3}, 1e-5),
    Case("slerp", 1, True, {"t": 0.0}, 1e-5),
    Case("nuslerp", 2, False, {"weight": WEIGHTS[2]}, 1e-5),
    Case("nuslerp", 2, True, {"weight": WEIGHTS[2], "nuslerp_flatten": False}, 1e-5),
    Case("nuslerp", 2, True, {"weight": WEIGHTS[2], "nuslerp_flatten": False, "nuslerp_row_wise": True}, 1e-5),
    Case("multislerp", 3, False, {"weight": [0.5, 0.25, 1.0]}, 1e-5),
    Case("multislerp", 2, True, {"weight": WEIGHTS[2], "normalize_weights": False}, 1e-5),
    Case("karcher", 3, False, {}, 2e-5),
    Case("karcher", 2, False, {"max_iter": 3, "tol": 1e-3}, 2e-3),
    Case("sce", 3, True, {}, 1e-6),
    Case("sce", 3, True, {"select_topk": 0.4}, 1e-6),
    Case("ram", 3, True, {"epsilon": 1e-3}, 2 * ULP),
    Case("ramplus_tl", 3, True, {"r": 0.2, "alpha": 0.5, "epsilon": 1e-3}, 4 * ULP),
    Case("model_stock", 2, True, {}, 1e-5),
    Case("model_stock", 3, True, {"filter_wise": True}, 1e-5),
    Case("nearswap", 1, True, {"t": 0.02}, 2 * ULP),
    Case("arcee_fusion", 1, True, {}, 0.05),
    Case("passthrough", 1, False, {"scale": [0.75]}),
    arithmetic("task_arithmetic"),
    arithmetic("task_arithmetic", normalize=True, **{"lambda": 0.3}),
    *(arithmetic("ties", density=d) for d in (0.0, 0.01, 0.5, 0.999, 1.0)),
    arithmetic("ties", 1, density=0.3, rescale=True, normalize=False),
    arithmetic("ties", density=[0.1, 0.5, 0.9], **{"lambda": 0.7}),
    arithmetic("breadcrumbs", density=0.6, gamma=0.1),
    arithmetic("breadcrumbs", density=0.95, gamma=0.2, normalize=True),
    arithmetic("breadcrumbs_ties", density=0.5, gamma=[0.0, 0.1, 0.2]),
    *(arithmetic(m, density=d) for m in ("dare_linear", "dare_ties") for d in (0.3, 1.0)),
    arithmetic("dare_ties", normalize=True, rescale=False, density=0.5),
    *(arithmetic(m, density=0.4, epsilon=0.2) for m in ("della", "della_linear")),
]

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def is_random(case: Case) -> bool:
    return case.method in RANDOM and case.parameters["density"] != 1.0


def inputs(case: Case, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The base first if there is one. In float32 no two magnitudes of a delta are equal."""
    generator = torch.Generator().manual_seed(17)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    moved = [base + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1 for _ in range(case.models)]
    return [t.to(dtype) for t in ([base, *moved] if case.base else moved)]


def arguments(case: Case, **more: Any) -> dict[str, Any]:
    """Keyword arguments of merge_tensors."""
    has_base = case.base and case.method != "linear"
    return {"parameters": case.parameters, "base_index": 0 if has_base else None, "name": "layers.0.w", **more}


def at_a_cut(case: Case, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Where the magnitude of some delta equals one at which its model is cut: tools choose freely among equals."""
    base, *models = (t.float() for t in tensors)
    n = base.numel()
    found = torch.zeros(base.shape, dtype=torch.bool)
    density = case.parameters.get("density", case.parameters.get("select_topk", 1.0))
    for t, model in enumerate(models):
        d = density[t] if isinstance(density, list) else density
        gamma = case.parameters.get("gamma", 0.0)
        g = gamma[t] if isinstance(gamma, list) else gamma
        size = (model - base).abs()
        order = size.reshape(-1).sort().values
        kept = max(1, int(d * n)) if case.method == "ties" else int(d * n)
        bottom = max(0, n - kept - int(g * n))
        for k in (bottom, bottom + kept):
            if 0 < k < n and order[k - 1] == order[k]:
                found |= size == order[k]
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest magnitude of b."""
    if not a.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def in_a_process(queue: Any, tensors: list[torch.Tensor], case: Case) -> None:
    """What a child process of a test does: merge, and say what was served there."""
    import mergekit.merge_methods as mk

    torch.set_num_threads(1)
    merged = mk.merge_tensors(tensors, case.method, **arguments(case))
    queue.put((merged.tolist(), fast.stats().served))


def both(mk: Any, case: Case, tensors: list[torch.Tensor], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(hooked, unhooked); the inputs stay as they were and the call was served."""
    before = [t.clone() for t in tensors]
    fast.reset_stats()
    torch.manual_seed(1)
    theirs = mk.merge_tensors(tensors, case.method, **arguments(case, **more))
    with fast.enabled(seed=1):
        ours = mk.merge_tensors(tensors, case.method, **arguments(case, **more))
    assert fast.stats().served == {case.method: 1}, str(fast.stats())
    for now, then in zip(tensors, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    return ours, theirs
