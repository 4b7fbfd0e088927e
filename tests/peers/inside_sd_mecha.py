"""Run by test_sd_mecha_hooks.py inside sd-mecha's environment: every method with and without the hooks."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sd_mecha
import torch
from safetensors.torch import save_file
from sd_mecha.extensions import merge_methods, model_configs
from sd_mecha.extensions.builtin.merge_methods import ties as their_ties

import mergekernels.integrations.sd_mecha as hook
from mergekernels.errors import MergeError, ToolError
from mergekernels.integrations.sd_mecha import calls, draws

torch.set_num_threads(1)

METHODS = tuple(calls.CALLS)
ORIGINALS = {name: merge_methods.resolve(name).__wrapped__ for name in METHODS}
SHAPES = [(64, 48), (1000,), (8, 4, 3, 3), (7, 1), (1, 1), (1,), (5,), ()]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    hook.disable()
    hook.reset_stats()
    yield
    hook.disable()


def method(name: str) -> Any:
    return merge_methods.resolve(name)


def deltas(shape: tuple[int, ...], count: int, dtype: torch.dtype = F32, seed: int = 0) -> list[torch.Tensor]:
    """Some entries are zero, some magnitudes occur in several places, and the models are alike, as fine-tunes are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator, dtype=F64)
    found = []
    for _ in range(count):
        x = 0.8 * common + torch.randn(shape, generator=generator, dtype=F64)
        x = torch.where(torch.rand(shape, generator=generator) < 0.1, torch.zeros_like(x), x)
        x = torch.where(torch.rand(shape, generator=generator) < 0.1, torch.full_like(x, -0.75), x)
        found.append(x.to(dtype))
    return found


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What the tool answers with the hooks, and by itself; inputs must come out as they went in."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    copies = [t.detach().clone() for t in tensors]
    hook.disable()
    theirs = outcome(lambda: ORIGINALS[name](*args, **kwargs))
    hook.enable()
    ours = outcome(lambda: method(name).__wrapped__(*args, **kwargs))
    for t, c in zip(tensors, copies, strict=True):
        assert torch.equal(t.detach().nan_to_num(), c.nan_to_num())
    return ours, theirs


def many(name: str, cases: list[tuple[list[torch.Tensor], dict[str, Any]]]) -> list[tuple[Any, Any]]:
    """`both` of several calls, for one enabling."""
    theirs = [outcome(lambda a=a, k=k: ORIGINALS[name](*a, **k)) for a, k in cases]
    hook.enable()
    ours = [outcome(lambda a=a, k=k: method(name).__wrapped__(*a, **k)) for a, k in cases]
    return list(zip(ours, theirs, strict=True))


def agree(ours: Any, theirs: Any, bound: float) -> None:
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        assert float((ours.double() - theirs.double()).abs().max() if theirs.numel() else 0.0) <= bound * scale
    else:
        assert type(ours) is type(theirs) and ours == theirs


def ulps(dtype: torch.dtype, f32: float) -> float:
    """f32 : the bound in float32 and, since the tool widens them, in 16 bits; what float64 then allows."""
    return f32 * 2e-9 if dtype == F64 else f32


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases = [
        (deltas(shape, count, dtype), {"k": k, "vote_sgn": vote_sgn})
        for count, k, vote_sgn in itertools.product((1, 2, 3, 6), (0.0, 0.2, 0.5, 0.999, 1.0), (False, True))
    ]
    for (models, _), (ours, theirs) in zip(cases, many("ties_sum", cases), strict=True):
        # Beyond four models torch adds in another order.
        agree(ours, theirs, 0.0 if len(models) <= 4 else ulps(dtype, 4e-7))
    assert hook.stats().served == {"ties_sum": len(cases)}


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_sum_extended(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases = [
        (deltas(shape, count, dtype), {"k": k, "vote_sgn": vote_sgn, "apply_stock": stock})
        for count, k, vote_sgn, stock in itertools.product((1, 2, 3, 6), (0.2, 1.0), (False, True), (False, True))
    ]
    for (models, options), (ours, theirs) in zip(cases, many("ties_sum_extended", cases), strict=True):
        # The cosines are sums in another order.
        exact = 0.0 if len(models) <= 4 else ulps(dtype, 4e-7)
        agree(ours, theirs, exact if options["apply_stock"] else ulps(dtype, 4e-6))
    passed = hook.stats().passed_on.get("ties_sum_extended", {})
    assert passed == {"a stock factor of one model or of numbers": 4 if shape else 16}
    assert hook.stats().served == {"ties_sum_extended": 32 - sum(passed.values())}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", SHAPES)
def test_model_stock(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for count in (1, 2, 3, 6):
        models = deltas(shape, count, dtype)
        ours, theirs = both("model_stock", *models)
        if not isinstance(theirs, torch.Tensor) or not theirs.dim():
            assert ours == theirs
            continue
        # t = n c / (1 + (n - 1) c) magnifies an error in c where the divisor is small.
        steep = float(their_ties.get_model_stock_t(models, 1e-6).abs().max()) ** 2
        agree(ours, theirs, ulps(dtype, 2e-6) * (1.0 + steep))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_model_stock_is_rounded_once(dtype: torch.dtype) -> None:
    models = deltas((64, 48), 3, dtype)
    ours, theirs = both("model_stock", *models)
    exact = method("model_stock").__wrapped__(*(m.double() for m in models))
    unit = torch.finfo(dtype).eps
    assert ours.dtype == theirs.dtype
    assert float(((ours.double() - exact) / exact.abs().clamp(min=1e-3)).abs().max()) <= 0.6 * unit
    assert float((theirs.double() - exact).norm()) > float((ours.double() - exact).norm())


def recorded(models: list[torch.Tensor], probability: float, eps: float, seed: int) -> list[torch.Tensor]:
    """The masks that the hook draws."""
    kept = draws.masked([torch.where(m == 0, 1e-30, m) for m in models], probability, eps, seed)
    return [(x != 0).to(m.dtype) for x, m in zip(kept, models, strict=True)]


@pytest.mark.parametrize("shape", [(64, 48), (8, 4, 3, 3), (1000,), (1,)])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_dropout_before_ties_given_the_masks(
    shape: tuple[int, ...], eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without zeros and equals: which of them are kept has no effect, or is another draw.
    models = [
        m + 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for i, m in enumerate(deltas(shape, 3))
    ]
    for probability, k, stock, rescale in itertools.product((0.9, 0.5), (0.02, 0.3), (True, False), (True, False)):
        chance = torch.tensor(probability)
        masks = iter(recorded(models, float(chance), eps, 7))
        options = {"probability": chance, "della_eps": eps, "k": k, "apply_stock": stock, "rescale": rescale, "seed": 7}
        with monkeypatch.context() as patch:
            patch.setattr(their_ties, "find_della_dropout", lambda *_, masks=masks: next(masks))
            hook.disable()
            theirs = ORIGINALS["ties_sum_with_dropout"](*models, **options)
        hook.enable()
        agree(method("ties_sum_with_dropout").__wrapped__(*models, **options), theirs, 4e-6)
    assert hook.stats().served == {"ties_sum_with_dropout": 16}


def test_probabilities_of_della() -> None:
    """Both tools keep an entry with 1 - p + eps (rank / n - (n + 1) / 2n); tenths of a tensor by magnitude."""
    n, p, eps = 200_000, 0.7, 0.4
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    tenth = x.abs().argsort().argsort() * 10 // n
    chance = 1 - p + eps * ((torch.arange(10) + 0.5) / 10 - 0.5)
    theirs = their_ties.find_della_dropout(x, torch.tensor(p), eps, torch.Generator().manual_seed(9))
    for mask in (theirs != 0, draws.masked([x], p, eps, 1)[0] != 0):
        rates = torch.stack([mask[tenth == i].float().mean() for i in range(10)])
        assert float(((rates - chance).abs() / (chance * (1 - chance) / (n / 10)).sqrt()).max()) < 5.0
    first, second = draws.masked([x, x], p, 0.0, 1)
    kept = ((first != 0) & (second != 0)).float().mean()
    assert abs(float(kept) - (1 - p) ** 2) < 5 * math.sqrt((1 - p) ** 2 / n)
    assert not torch.equal(draws.masked([x], p, 0.0, 2)[0], first)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("shape", [(64, 48), (8, 4, 3, 3), (1000,), (1, 1)])
def test_dropout_given_the_masks(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for zeros, probability, rescale in itertools.product((True, False), (0.9, 0.3, 0.0, 1.0), (1.0, 0.5)):
        models = deltas(shape, 3, dtype)
        models = models if zeros else [torch.where(m == 0, 0.5, m) for m in models]
        keep = (draws._rule(1 - probability, 0.0, models[0].numel()),) * 3
        masks = []
        for t in range(3):  # of a model: the others have no weight
            weights = tuple(float(i == t) for i in range(3))
            program = draws.Program(weights, keep, base=False, seed=5)
            masks.append(draws.stream([torch.ones(shape)] * 3, program) != 0)

        class Rng:
            def __init__(self, masks: list[torch.Tensor]) -> None:
                self.masks = iter(masks)

            def binomial(self, **_: Any) -> Any:
                return next(self.masks).numpy()

        options = {"probability": probability, "rescale": rescale, "seed": 5}
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "default_rng", lambda _, masks=masks: Rng(masks))
            theirs = ORIGINALS["dropout"](*models, **options)
        hook.enable()
        ours = method("dropout").__wrapped__(*models, **options)
        # In 16 bits the tool rounds the sum, the mean and the quotient.
        agree(ours, theirs, 2e-2 if dtype == BF16 else ulps(dtype, 4e-7))
    assert hook.stats().served == {"dropout": 16}


def test_dropout_without_a_seed_differs_each_time() -> None:
    models = deltas((100, 10), 2)
    with hook.enabled():
        first, second = (method("dropout").__wrapped__(*models) for _ in range(2))
        assert not torch.equal(first, second)
        again = [method("dropout").__wrapped__(*models, seed=3) for _ in range(2)]
        assert torch.equal(*again)


def steep(m: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(s, 24, generator=generator)).Q for s in (m, n))
    return (u * 0.8 ** torch.arange(24)) @ v.T


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 8, 3, 3), (64, 64)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_truncate_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = steep(shape[0], math.prod(shape[1:])).reshape(shape).to(dtype)
    for rank in (0, 1, 8, 8.4, 500):
        options = {"rank": rank, "use_approximate_basis": False}
        agree(*both("truncate_rank", x, **options), 2e-5)
        for iters in (0, 2):
            options = {"rank": rank, "approximate_basis_iters": iters, "approximate_basis_seed": 4}
            agree(*both("truncate_rank", x, **options), 2e-5)
    flat = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    agree(*both("truncate_rank", flat, rank=6, approximate_basis_seed=4), 2e-5)
    assert set(hook.stats().served) == {"truncate_rank"} and not hook.stats().passed_on


def test_truncate_rank_takes_torchs_numbers() -> None:
    x, results = steep(96, 64), []
    for enabled in (False, True):
        torch.manual_seed(3)
        if enabled:
            hook.enable()
        results.append((method("truncate_rank").__wrapped__(x, rank=4, approximate_basis_iters=0), torch.rand(3)))
    agree(results[1][0], results[0][0], 2e-5)
    assert torch.equal(results[0][1], results[1][1])


def test_truncate_rank_with_a_cache_is_the_tools() -> None:
    x = steep(96, 64)
    with hook.enabled():
        cache: dict[str, Any] = {}
        first = method("truncate_rank").__wrapped__(x, rank=8, approximate_basis_seed=1, cache=cache, key="a")
        assert set(cache["a"]) == {"u", "s", "vh", "iters", "seed"}
        second = method("truncate_rank").__wrapped__(x, rank=4, approximate_basis_seed=1, cache=cache, key="a")
    assert first.shape == second.shape
    assert hook.stats().passed_on == {"truncate_rank": {"a cache of factors": 2}}


@pytest.mark.parametrize("name", METHODS)
def test_nothing_and_empty(name: str) -> None:
    if name != "truncate_rank":
        agree(*both(name), 0.0)
    agree(*both(name, *[torch.empty(0, 3)] * (1 if name == "truncate_rank" else 2)), 0.0)


@pytest.mark.parametrize("name", ["ties_sum", "ties_sum_extended"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_the_tools(name: str, value: float) -> None:
    models = deltas((12, 8), 3)
    models[1][3, 4] = value
    ours, theirs = both(name, *models, k=0.5)
    assert torch.equal(ours, theirs)
    assert hook.stats().passed_on == {name: {"values that are not finite": 1}}


def test_what_is_not_eligible_is_the_tools() -> None:
    x, y = deltas((12, 8), 2)
    ours, theirs = both("ties_sum", x.requires_grad_(True), y)
    assert ours.requires_grad and torch.equal(ours.detach(), theirs.detach())
    agree(*both("ties_sum_extended", *deltas((12, 8), 3), apply_median=True), 1e-6)
    agree(*both("dropout", *deltas((12, 8), 3), overlap=2.0), 0.0)
    agree(*both("ties_sum", y, y[:, :4]), 0.0)
    assert [sum(r.values()) for r in hook.stats().passed_on.values()] == [2, 1, 1]
    assert not hook.stats().served


def test_strided_and_unaligned() -> None:
    plain = deltas((40, 30), 3)
    wide = [torch.cat([torch.zeros(40, 1), m.T.reshape(40, 30), m], 1)[:, 31:] for m in plain]
    transposed = [m.T.contiguous().T for m in plain]
    for models in (wide, transposed):
        for name in ("ties_sum", "ties_sum_extended", "model_stock"):
            agree(both(name, *models)[0], both(name, *plain)[1], 4e-6)
    x = steep(96, 64)
    agree(
        both("truncate_rank", x.T, rank=4, approximate_basis_seed=1)[0],
        both("truncate_rank", x.T.contiguous(), rank=4, approximate_basis_seed=1)[1],
        2e-5,
    )


CONFIG = """
identifier: tiny-hooks
components:
  all:
    conv.weight: {shape: [6, 4, 3, 3], dtype: float32}
    linear.weight: {shape: [40, 24], dtype: float32}
    linear.bias: {shape: [40], dtype: float32}
    scale: {shape: [], dtype: float32}
"""
SHAPE = {"conv.weight": (6, 4, 3, 3), "linear.weight": (40, 24), "linear.bias": (40,), "scale": ()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    model_configs.register_aux(model_configs.from_yaml(CONFIG))
    folder = tmp_path_factory.mktemp("models")
    for i in range(4):
        tensors = {k: deltas(s, 1, F16, 10 * i + j)[0].contiguous() for j, (k, s) in enumerate(SHAPE.items())}
        save_file(tensors, folder / f"{i}.safetensors")
    return [folder / f"{i}.safetensors" for i in range(4)]


def recipe(files: list[Path], name: str, **options: Any) -> Any:
    base, *models = (sd_mecha.model(f, "tiny-hooks") for f in files)
    found = [method("subtract")(m, base) for m in models]
    if name == "truncate_rank":
        found = found[:1]
    return method("add_difference")(base, method(name)(*found, **options), alpha=0.5)


def merged(node: Any, threads: int = 4) -> dict[str, Any]:
    return dict(sd_mecha.merge(node, threads=threads, output_dtype=F32))


RECIPES: list[tuple[str, dict[str, Any]]] = [
    ("ties_sum", {"k": 0.4}),
    ("ties_sum", {"k": 0.4, "vote_sgn": True}),
    ("ties_sum_extended", {"k": 0.5, "apply_stock": True}),
    ("ties_sum_extended", {"k": 0.5}),
    ("model_stock", {}),
    ("truncate_rank", {"rank": 3, "approximate_basis_seed": 1}),
    ("truncate_rank", {"rank": 3, "use_approximate_basis": False}),
]


@pytest.mark.parametrize(("name", "options"), RECIPES)
def test_merge(files: list[Path], name: str, options: dict[str, Any]) -> None:
    files = files if name != "model_stock" else files[:3]
    text = sd_mecha.serialize(recipe(files, name, **options))
    theirs = merged(recipe(files, name, **options))
    with hook.enabled():
        assert sd_mecha.serialize(recipe(files, name, **options)) == text
        ours = merged(recipe(files, name, **options))
    after = merged(recipe(files, name, **options))
    assert ours.keys() == theirs.keys()
    assert ours["__metadata__"] == theirs["__metadata__"]
    for key in set(SHAPE) & set(theirs):
        assert torch.equal(theirs[key], after[key])
        agree(ours[key], theirs[key], 1e-4 if name in ("model_stock", "truncate_rank") else 4e-6)
    assert hook.stats().served[name] >= 3


def test_merge_with_masks(files: list[Path]) -> None:
    """The same for any number of threads, near what the tool draws, and another draw."""
    options = {"probability": 0.5, "della_eps": 0.2, "k": 1.0, "seed": 3, "apply_stock": True}
    theirs = merged(recipe(files, "ties_sum_with_dropout", **options))
    with hook.enabled():
        ours = [merged(recipe(files, "ties_sum_with_dropout", **options), t) for t in (0, 4)]
    with hook.enabled(random=False):
        same = merged(recipe(files, "ties_sum_with_dropout", **options))
    for key in SHAPE:
        assert torch.equal(ours[0][key], ours[1][key])
        assert torch.equal(same[key], theirs[key])
    assert not torch.equal(ours[0]["linear.weight"], theirs["linear.weight"])
    assert hook.stats().served == {"ties_sum_with_dropout": 8, "ties_sum_extended": 4}  # the tool's own calls ours


def test_two_threads() -> None:
    models = [deltas((200, 64), 3, seed=s) for s in range(8)]
    want = [method("ties_sum_extended").__wrapped__(*m) for m in models]
    got: dict[int, torch.Tensor] = {}

    def work(start: int) -> None:
        for i in range(start, 8, 2):
            got[i] = method("ties_sum_extended").__wrapped__(*models[i])

    with hook.enabled():
        workers = [threading.Thread(target=work, args=(s,)) for s in range(2)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    for i in range(8):
        agree(got[i], want[i], 4e-6)
    assert hook.stats().served == {"ties_sum_extended": 8}


def test_an_error_names_the_tensor(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    hook.enable()
    monkeypatch.setattr(calls, "ties", broken)
    with pytest.raises(MergeError, match=r"out of luck") as caught:
        merged(recipe(files, "ties_sum"), threads=0)
    assert caught.value.tensor in SHAPE
    assert not hook.stats().passed_on


def other_signature(*models: Any, k: float = 0.2) -> Any:
    return models[0]


def other_default(*models: Any, k: float = 0.9, vote_sgn: bool = False) -> Any:
    return models[0]


def other_result(*models: Any, k: float = 1.0, vote_sgn: bool = False) -> Any:
    return models[0] if models else 0


@pytest.mark.parametrize("changed", [other_signature, other_default, other_result])
def test_another_version_is_left_untouched(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method("ties_sum"), "__wrapped__", changed)
    before = {name: method(name).__wrapped__ for name in METHODS}
    with pytest.raises(ToolError, match="left untouched: merge method 'ties_sum'"):
        hook.enable()
    assert {name: method(name).__wrapped__ for name in METHODS} == before


def test_another_default_device_does_not_matter() -> None:
    original = method("ties_sum").__wrapped__
    with torch.device("meta"), hook.enabled():
        assert method("ties_sum").__wrapped__ is not original


def test_everything_is_put_back() -> None:
    before = {name: method(name).__wrapped__ for name in METHODS}
    merge_key = type(method("ties_sum")).merge_key
    hook.enable()
    hook.enable(random=False)
    hook.enable()
    assert all(method(name).__wrapped__ is not before[name] for name in METHODS)
    hook.disable()
    assert {name: method(name).__wrapped__ for name in METHODS} == before
    assert type(method("ties_sum")).merge_key is merge_key
