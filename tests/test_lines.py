"""LiNeS: its two forms against brute force, which tensors are in which block, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mergekernels as mk
from mergekernels._backends.dispatch import load
from mergekernels._methods import get
from mergekernels._methods.blocks import number_blocks
from mergekernels._methods.modifiers import modified

BACKENDS = [name for name in ("reference", "cpu") if "reduce" in load(name).FEATURES]
SHAPES = {
    "model.embed_tokens.weight": (50, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.experts.3.up.weight": (24, 16),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.2.mlp.experts.0.up.weight": (24, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (50, 16),
}
PLACE = dict(zip(SHAPES, (None, 0, 0, 1, 2, None, None), strict=True))


@pytest.fixture
def dicts() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A base and three models in float64."""
    rng = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in SHAPES.items()}
    models = [
        {name: x + 0.1 * torch.randn(x.shape, generator=rng, dtype=torch.float64) for name, x in base.items()}
        for _ in range(3)
    ]
    return base, models


def run(models: Any, method: str, base: Any, **params: Any) -> dict[str, np.ndarray]:
    """The merged state dict on every backend, with the same bits."""
    outputs = [mk.merge_state_dicts(models, method, base=base, backend=name, **params) for name in BACKENDS]
    for other in outputs[1:]:
        assert all(torch.equal(other[name], outputs[0][name]) for name in base)
    return {name: x.numpy() for name, x in outputs[0].items()}


def deltas_of(models: Any, base: Any) -> list[dict[str, np.ndarray]]:
    return [{name: (m[name] - base[name]).numpy() for name in base} for m in models]


def compare(got: dict[str, np.ndarray], base: Any, delta: dict[str, np.ndarray], alpha: float, beta: float) -> None:
    for name, x in got.items():
        s = alpha if PLACE[name] is None else alpha + beta * PLACE[name] / 2
        want = base[name].numpy() + s * delta[name]
        assert np.abs(x - want).max() < 1e-14, name


def test_single_task_form(dicts: Any) -> None:
    base, models = dicts
    delta = {name: 0.5 * sum(d[name] for d in deltas_of(models, base)) for name in base}
    plain = {"weights": 1.0, "scale": 0.5}
    got = run(models, "task_arithmetic", base, then=[("lines", {"alpha": 0.2})], **plain)
    compare(got, base, delta, 0.2, 0.8)
    got = run(models, "task_arithmetic", base, then=[{"lines": {"alpha": 0.2, "beta": 0.5}}], **plain)
    compare(got, base, delta, 0.2, 0.5)
    same = run(models, "task_arithmetic", base, then=[("lines", {"alpha": 1.0})], **plain)
    without = run(models, "task_arithmetic", base, **plain)
    assert all(same[name].tobytes() == without[name].tobytes() for name in base)


def test_multi_task_form_of_a_sum_starts_at_one_over_the_number_of_models(dicts: Any) -> None:
    base, models = dicts
    delta = {name: sum(d[name] for d in deltas_of(models, base)) for name in base}
    got = run(models, "task_arithmetic", base, weights=1.0, then=[("lines", {"beta": 0.6})])
    compare(got, base, delta, 1 / 3, 0.6)
    # The ratio makes up for lambda, beta does not.
    got = run(models, "task_arithmetic", base, weights=1.0, scale=2.0, then=[("lines", {"beta": 0.6})])
    compare(got, base, {name: 2 * d for name, d in delta.items()}, 1 / 6, 0.6)


def test_multi_task_form_of_ties_over_the_model(dicts: Any) -> None:
    base, models = dicts
    plain = {"weights": 1.0, "density": 0.3, "scope": "model"}
    merged = run(models, "ties", base, **plain)
    delta = {name: x - base[name].numpy() for name, x in merged.items()}
    summed = sum(np.abs(sum(d[name] for d in deltas_of(models, base))).sum() for name in base)
    alpha = summed / sum(np.abs(d).sum() for d in delta.values()) / 3
    got = run(models, "ties", base, then=[("lines", {"beta": 0.4})], **plain)
    compare(got, base, delta, alpha, 0.4)


def brute_ties(d: np.ndarray, density: float) -> np.ndarray:
    """TIES with weights of 1 over models in rows."""
    count = int(density * d.shape[1])
    kept = np.stack([np.where(np.abs(x) >= np.sort(np.abs(x))[-count], x, 0.0) for x in d])
    agree = kept * np.where(kept.sum(0) >= 0, 1.0, -1.0) > 0
    return np.where(agree, kept, 0.0).sum(0) / np.maximum(agree.sum(0), 1)


def brute_breadcrumbs(d: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Without the largest and the smallest of each model, added up."""
    n = d.shape[1]
    top, low = int(gamma * n), n - int(gamma * n) - int(density * n)
    ranks = np.abs(d).argsort(1).argsort(1)
    return np.where((ranks >= low) & (ranks < n - top), d, 0.0).sum(0)


def brute_model_stock(d: np.ndarray) -> np.ndarray:
    """The mean of the models, scaled by the mean cosine of their pairs."""
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    models = len(d)
    c = ((unit @ unit.T).sum() - models) / (models * (models - 1))
    return models * c / (1 + (models - 1) * c) * d.mean(0)


BY_TENSOR: list[tuple[str, dict[str, Any], Any]] = [
    ("ties", {"weights": 1.0, "density": 0.3}, lambda d: brute_ties(d, 0.3)),
    ("breadcrumbs", {"weights": 1.0, "density": 0.5, "gamma": 0.1}, lambda d: brute_breadcrumbs(d, 0.5, 0.1)),
    ("model_stock", {}, brute_model_stock),
    ("task_arithmetic", {"weights": 0.5}, lambda d: 0.5 * d.sum(0)),
    ("della", {"weights": 1.0, "density": 0.5, "epsilon": 0.2}, None),
    ("sce", {"select_topk": 0.4}, None),
    ("from_norm", {"k": 1.0}, None),
    ("dare_linear", {"weights": 1.0, "density": 0.5}, None),
]


@pytest.mark.parametrize(("method", "params", "brute"), BY_TENSOR, ids=[b[0] for b in BY_TENSOR])
def test_multi_task_form_of_methods_that_measure_tensors(
    dicts: Any, method: str, params: dict[str, Any], brute: Any
) -> None:
    base, models = dicts
    deltas = deltas_of(models, base)
    if brute is None:  # by the method alone, which has tests of its own
        plain = run(models, method, base, **params)
        delta = {name: x - base[name].numpy() for name, x in plain.items()}
    else:
        rows = {name: np.stack([d[name].ravel() for d in deltas]) for name in base}
        delta = {name: brute(d).reshape(SHAPES[name]) for name, d in rows.items()}
    summed = sum(np.abs(sum(d[name] for d in deltas)).sum() for name in base)
    alpha = summed / sum(np.abs(d).sum() for d in delta.values()) / 3
    got = run(models, method, base, then=[("lines", {"beta": 0.4})], **params)
    compare(got, base, delta, alpha, 0.4)
    # The same alpha, given, leaves each tensor to itself.
    single = run(models, method, base, then=[("lines", {"alpha": alpha, "beta": 0.4})], **params)
    compare(single, base, delta, alpha, 0.4)


def test_multi_task_form_of_one_tensor_and_of_one_of_another_dtype(dicts: Any) -> None:
    base, models = dicts
    name = "model.layers.1.self_attn.q_proj.weight"
    plain = {"weights": 1.0, "density": 0.3, "then": [("lines", {"beta": 0.4})]}
    alone = mk.merge([m[name] for m in models], "ties", base=base[name], block=(1, 3), **plain)
    state = mk.merge_state_dicts([{name: m[name]} for m in models], "ties", base={name: base[name]}, **plain)
    block = number_blocks([name])[name]
    assert torch.equal(state[name], mk.merge([m[name] for m in models], "ties", base=base[name], block=block, **plain))
    assert not torch.equal(alone, state[name])
    # One tensor in float64 makes float64 of the arithmetic of all.
    narrow = [{k: v if k == "lm_head.weight" else v.float() for k, v in m.items()} for m in (base, *models)]
    wide = [{k: v.double() for k, v in m.items()} for m in narrow]
    got, want = (mk.merge_state_dicts(m[1:], "ties", base=m[0], **plain) for m in (narrow, wide))
    assert all(torch.equal(got[k], want[k].to(got[k].dtype)) for k in base)


def test_methods_that_measure_tensors(dicts: Any) -> None:
    base, models = dicts
    for method, params in (("model_stock", {}), ("from_norm", {"k": 1.0}), ("multislerp", {"weights": 1.0})):
        plain = run(models, method, base, **params)
        got = run(models, method, base, then=[("lines", {"alpha": 0.3})], **params)
        compare(got, base, {name: x - base[name].numpy() for name, x in plain.items()}, 0.3, 0.7)


def test_delta_of_zero_stays_at_the_base(dicts: Any) -> None:
    base, models = dicts
    got = run(models, "task_arithmetic", base, weights=0.0, then=[("lines", {"beta": 0.6})])
    assert all(np.array_equal(got[name], base[name].numpy()) for name in base)


def test_one_tensor(dicts: Any) -> None:
    base, models = dicts
    name = "model.layers.1.self_attn.q_proj.weight"
    x0, x1 = base[name], models[0][name]
    for block, s in ((None, 0.2), ((1, 3), 0.6), ((2, 3), 1.0), ((0, 1), 1.0)):
        got = mk.merge([x1], "task_arithmetic", weights=1.0, base=x0, then=[("lines", {"alpha": 0.2})], block=block)
        assert torch.allclose(got, x0 + s * (x1 - x0), rtol=0, atol=1e-15)
    for block in (3, (3, 3), (-1, 3), (0, 0), (0.5, 2)):
        with pytest.raises(mk.MergeError, match="block"):
            mk.merge([x1], "task_arithmetic", weights=1.0, base=x0, then=[("lines", {"alpha": 0.2})], block=block)


def test_blocks_from_names() -> None:
    assert number_blocks(SHAPES) == {name: (place, 3) for name, place in PLACE.items() if place is not None}
    gpt2 = ["wte.weight", "h.0.attn.c_attn.weight", "h.11.mlp.c_fc.weight", "ln_f.weight"]
    assert number_blocks(gpt2) == {gpt2[1]: (0, 12), gpt2[2]: (11, 12)}
    t5 = ["shared.weight", "encoder.block.0.layer.1.x", "encoder.block.1.layer.0.x", "decoder.block.1.layer.2.x"]
    assert number_blocks(t5) == {t5[1]: (0, 2), t5[2]: (1, 2), t5[3]: (1, 2)}
    clip = ["text_model.encoder.layers.0.x", "vision_model.encoder.layers.1.x"]
    assert number_blocks(clip) == {clip[1]: (1, 2)}  # the longer stack
    assert number_blocks(["blocks.3.norm.weight", "head.weight"]) == {"blocks.3.norm.weight": (3, 4)}
    assert number_blocks(["experts.4.w", "sublayers.2.w", "layers.x.w", "layers.5"]) == {}
    own = ["stage1.unit2.w", "stage2.unit0.w", "head.w"]
    assert number_blocks(own, r"stage(\d+)\.") == {own[0]: (1, 3), own[1]: (2, 3)}


def test_pattern_of_the_user(dicts: Any) -> None:
    base, models = dicts
    then = [("lines", {"alpha": 0.0, "blocks": r"experts\.(\d+)\."})]
    got = run(models[:1], "task_arithmetic", base, weights=1.0, then=then)
    for name, x in got.items():
        s = {"model.layers.0.mlp.experts.3.up.weight": 1.0}.get(name, 0.0)
        assert np.abs(x - (base[name] + s * (models[0][name] - base[name])).numpy()).max() < 1e-15


@pytest.mark.parametrize(
    ("method", "then", "params", "message"),
    [
        ("task_arithmetic", [("lines", {})], {"weights": 1}, "needs alpha"),
        ("task_arithmetic", [("lines", {"alpha": "x"})], {"weights": 1}, "lines.alpha"),
        ("task_arithmetic", [("lines", {"gamma": 1})], {"weights": 1}, "no parameter 'lines.gamma'"),
        ("task_arithmetic", [("lines", {"alpha": 1, "blocks": "("})], {"weights": 1}, "regular expression"),
        ("task_arithmetic", [("lines", {"alpha": 1, "blocks": "x"})], {"weights": 1}, "one group"),
        ("task_arithmetic", [("line", {"alpha": 1})], {"weights": 1}, "unknown modifier"),
        ("task_arithmetic", [("lines", {"alpha": 1})] * 2, {"weights": 1}, "twice"),
        ("task_arithmetic", ["lines"], {"weights": 1}, "then is not usable"),
        ("task_arithmetic", {"lines": {"alpha": 1e300}}, {"weights": 1}, "range"),
        ("linear", [("lines", {"alpha": 1})], {"weights": 1}, "linear makes none"),
        ("slerp", [("lines", {"alpha": 1})], {"t": 0.5}, "slerp makes none"),
    ],
)
def test_refusals(method: str, then: Any, params: dict[str, Any], message: str) -> None:
    x = torch.ones(4)
    with pytest.raises(mk.MergeError, match=message):
        mk.merge([x], method, base=None if method == "linear" else x, then=then, **params)


def test_without_a_base_there_is_nothing_to_scale() -> None:
    with pytest.raises(mk.MergeError, match="without a base"):
        mk.merge([torch.ones(4)] * 2, "nuslerp", weights=1, then=[("lines", {"alpha": 1})])


def test_modified_description() -> None:
    info = modified(get("ties"), ["lines"]).info
    assert info.name == "ties + lines"
    assert [p.name for p in info.params][-3:] == ["lines.alpha", "lines.beta", "lines.blocks"]
    assert modified(get("ties"), []) is get("ties")


@pytest.mark.parametrize("pattern", [r"nothere\.(\d+)", "(l)ayers", r"layers\.(x)?"])
def test_a_pattern_that_finds_no_block_is_refused(pattern: str) -> None:
    base = {"model.layers.0.w": torch.zeros(4), "model.layers.1.w": torch.zeros(4)}
    with pytest.raises(mk.MergeError, match=r"no tensor is in a block.*captures none.*'model.layers.0.w'"):
        mk.merge_state_dicts(
            [{k: v + 1 for k, v in base.items()}],
            "task_arithmetic",
            base=base,
            weights=1.0,
            then=[("lines", {"alpha": 0.2, "blocks": pattern})],
        )
