"""add_weighted_adapter, hooked and unhooked in one process: deltas, dtypes, configs, and what PEFT loses silently."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs PEFT in this environment")

from peft import PeftModel
from peft_cases import Net, adapted, deltas, distance, lora

import mergekernels as mk
import mergekernels.integrations.peft as fast
from mergekernels.errors import ArgumentError, DataError, MergeError, ToolError

pytestmark = pytest.mark.peer
DELTAS = ["svd", "magnitude_prune_svd", "ties_svd"]
FACTORS = ["linear", "magnitude_prune", "ties"]
RANDOM = ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"]
NAMES = ["a0", "a1", "a2"]
EQUAL = [{}, {"alpha": 8}, {"alpha": 1}]
MIXED = [
    {"r": 2, "alpha": 4},
    {"r": 8, "alpha": 8, "use_rslora": True},
    {"r": 5, "alpha": 20, "rank_pattern": {"head": 8, "conv": 3}, "alpha_pattern": {"embed": 2}},
]
PARTIAL = [{}, {"targets": ["q_proj", "embed"]}, {"targets": ["conv", "q_proj", "c_attn"]}]
SETS = {"equal": EQUAL, "mixed": MIXED, "partial": PARTIAL}
WEIGHTS = [[0.5, 1.5, -2.0], [1.0, 0.0, 0.3]]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    fast.reset_stats()
    yield
    fast.disable()


def made(name: str, **options: Any) -> Any:
    return adapted(*(lora(**c) for c in SETS[name]), **options)


def both(model: Any, kind: str, weights: list[float], dialect: str = "peft", **options: Any) -> None:
    """Adapters "ours" and "theirs"; all layers are served, and what was there stays as it was."""
    count = len([n for n in model.peft_config if n in NAMES])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.add_weighted_adapter(NAMES[:count], weights[:count], "theirs", combination_type=kind, **options)
    fast.reset_stats()
    with fast.enabled(dialect=dialect):  # type: ignore[arg-type]
        model.add_weighted_adapter(NAMES[:count], weights[:count], "ours", combination_type=kind, **options)
    served = fast.stats()
    assert not served.passed_on, str(served)
    assert sum(served.served.values()) == (0 if kind == "cat" else len(deltas(model, "theirs"))), str(served)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize(
    ("which", "kind", "options"),
    [
        *((s, k, {}) for s in ("equal", "partial") for k in (*FACTORS, *DELTAS, "cat")),
        *(("mixed", k, o) for k in DELTAS for o in ({}, {"svd_rank": 7})),
        ("mixed", "cat", {}),
        ("equal", "ties", {"majority_sign_method": "frequency"}),
        ("equal", "ties_svd", {"majority_sign_method": "frequency", "svd_rank": 3}),
        ("equal", "svd", {"svd_rank": 3, "svd_full_matrices": False}),
    ],
)
def test_deltas_agree(which: str, kind: str, options: dict[str, Any]) -> None:
    model = made(which)
    plain = kind in ("svd", "linear", "cat")
    cases = [("peft", WEIGHTS[0], 0.3), ("default", WEIGHTS[1], 0.3 if plain else 1.0)]
    cases += [] if plain or kind.endswith("_svd") else [("default", WEIGHTS[0], 0.0)]
    for dialect, weights, density in cases:
        both(model, kind, weights, dialect, density=density, **options)
        ours, theirs = deltas(model, "ours"), deltas(model, "theirs")
        # 1e-5: PEFT's SVD runs in float32
        assert distance(ours, theirs) < 1e-5, (kind, density)
        model.delete_adapter("ours")
        model.delete_adapter("theirs")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["svd", "linear", "ties", "ties_svd"])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """As PEFT's in its dialect, the adapters' own by default."""
    model = made("equal", dtype=dtype)
    both(model, kind, WEIGHTS[0], density=0.5)
    layer = model.base_model.model.q_proj
    theirs, ours = layer.lora_A["theirs"].weight.dtype, layer.lora_A["ours"].weight.dtype
    assert ours == theirs
    bound = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-6}[dtype]  # PEFT rounds deltas to half
    if "ties" not in kind or dtype == torch.float64:  # what is largest, and its sign, depends on that rounding
        assert distance(deltas(model, "ours"), deltas(model, "theirs")) < bound
    model.delete_adapter("ours")
    model.delete_adapter("theirs")
    both(model, kind, WEIGHTS[0], "default", density=0.5)
    assert layer.lora_A["ours"].weight.dtype == dtype


@pytest.mark.parametrize("kind", RANDOM)
def test_random_types_are_those_of_merge_adapters(kind: str, tmp_path: Path) -> None:
    model = made("equal")
    model.save_pretrained(tmp_path)
    with fast.enabled(seed=11):
        model.add_weighted_adapter(NAMES, WEIGHTS[0], "ours", combination_type=kind, density=0.4)
    want = mk.merge_adapters(
        [tmp_path / n for n in NAMES], kind, weights=WEIGHTS[0], density=0.4, seed=11, base=_shapes()
    )
    ours = deltas(model, "ours")
    whole = {n: f.b.double() @ f.a.double() for n, (_, f) in want.modules.items()}
    assert distance(ours, whole) < 1e-5


def _shapes() -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in Net().named_parameters()}


def test_masks_follow_torchs_generator() -> None:
    model = made("equal")
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with fast.enabled():
            model.add_weighted_adapter(NAMES, WEIGHTS[0], "ours", combination_type="dare_ties", density=0.4)
        found.append(deltas(model, "ours"))
        model.delete_adapter("ours")
    assert distance(found[0], found[1]) == 0.0 and distance(found[0], found[2]) > 0.1


def test_rslora_does_not_leak_by_default() -> None:
    targets = ["q_proj", "head", "embed"]
    model = adapted(lora(8, 4, targets, use_rslora=True), lora(4, 8, targets))
    exact = {n: 0.5 * d + 2 * deltas(model, "a1")[n] for n, d in deltas(model, "a0").items()}
    for kind in ("svd", "cat"):
        both(model, kind, [0.5, 2.0], "default", svd_rank=12)
        assert distance(deltas(model, "ours"), exact) < 1e-5
        rank = model.peft_config["ours"].r
        assert distance(deltas(model, "theirs"), {n: d * rank**0.5 for n, d in exact.items()}) < 1e-5
        assert model.peft_config["ours"].use_rslora is False
        assert model.peft_config["a0"].use_rslora is True
        for name in ("ours", "theirs"):
            model.delete_adapter(name)
    both(model, "svd", [0.5, 2.0], "peft", svd_rank=12)
    assert model.peft_config["ours"].use_rslora is True
    assert distance(deltas(model, "ours"), deltas(model, "theirs")) < 1e-5


@pytest.mark.parametrize("kind", ["svd", "linear", "cat", "ties_svd"])
def test_saved_and_loaded_is_what_was_combined(kind: str, tmp_path: Path) -> None:
    """Ranks by pattern, and a rank beyond a layer's: the config tells them."""
    pattern = {"rank_pattern": {"head": 9, "k_proj": 2}}
    model = adapted(lora(**pattern, use_rslora=True), lora(**pattern, alpha=1))
    with fast.enabled():
        model.add_weighted_adapter(
            ["a0", "a1"], [0.5, 2.0], "ours", combination_type=kind, density=0.5,
            **({"svd_rank": 30} if "svd" in kind else {}),
        )  # fmt: skip
    model.set_adapter("ours")
    ids = torch.arange(50)[None]
    want = model(ids)
    model.save_pretrained(tmp_path, selected_adapters=["ours"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path / "ours")
    torch.testing.assert_close(again(ids), want, rtol=1e-5, atol=1e-5)
    assert distance(deltas(again, "default"), deltas(model, "ours")) == 0.0
    assert model.peft_config["ours"].init_lora_weights is True


def test_a_base_is_not_changed_by_pissa() -> None:
    model = adapted(lora(2, init_lora_weights="pissa", targets=["q_proj"]), lora(2, targets=["q_proj"]))
    weight = model.base_model.model.q_proj.base_layer.weight
    before = weight.detach().clone()
    with fast.enabled():
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "ours", combination_type="svd")
    assert torch.equal(weight, before)
    model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "theirs", combination_type="svd")
    assert not torch.equal(weight, before)  # what PEFT does


def test_one_adapter_and_a_taken_name() -> None:
    model = made("equal")
    with fast.enabled(), pytest.warns(UserWarning, match="single adapter by type linear: svd_rank"):
        model.add_weighted_adapter(["a0"], [1.3], "one", combination_type="svd", svd_rank=2)
    assert distance(deltas(model, "one"), {n: 1.3 * d for n, d in deltas(model, "a0").items()}) < 1e-6
    before = deltas(model, "one")
    with fast.enabled(), pytest.warns(UserWarning, match="'one' as it is"):
        model.add_weighted_adapter(["a1"], [1.0], "one", combination_type="svd")
    assert distance(deltas(model, "one"), before) == 0.0


def test_what_would_be_lost_is_refused_and_left_to_peft_in_its_dialect() -> None:
    dora = adapted(lora(targets=["q_proj"], use_dora=True), lora(targets=["q_proj"], use_dora=True))
    bias = adapted(lora(targets=["q_proj"], lora_bias=True), lora(targets=["q_proj"]))
    for model, word in ((dora, "DoRA"), (bias, "lora_bias")):
        with fast.enabled(), pytest.raises(ArgumentError, match=f"'a0'.*{word}"):
            model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "ours", combination_type="svd")
        assert "ours" not in model.peft_config
    with fast.enabled(), pytest.raises(ArgumentError, match="2 weights"):
        made("equal").add_weighted_adapter(["a0", "a1"], [1.0], "ours", combination_type="svd")
    with fast.enabled(dialect="peft"):
        dora.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "ours", combination_type="svd")
    (reasons,) = (r for n, r in fast.stats().passed_on.items() if n.startswith("add_weighted"))
    assert reasons == {"a variant of LoRA": 1}


def test_trained_modules_that_are_not_combined_are_warned_of() -> None:
    configs = lora(targets=["q_proj"], modules_to_save=["head"]), lora(targets=["q_proj"])
    model = adapted(*configs)
    head = model.base_model.model.head
    head.modules_to_save["a0"].weight.data.fill_(5.0)
    with fast.enabled(), pytest.warns(UserWarning, match=r"modules_to_save of adapter 'a0' \(head\) are not combined"):
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "ours", combination_type="svd")
    assert torch.equal(head.modules_to_save["ours"].weight, head.original_module.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fast.enabled(dialect="peft"):
            model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "theirs", combination_type="svd")


def test_what_is_passed_on_is_peft_bit_for_bit() -> None:
    model = made("equal")
    model.add_weighted_adapter(NAMES, WEIGHTS[0], "theirs", combination_type="svd", svd_clamp=0.9)
    with fast.enabled(dialect="peft"):
        model.add_weighted_adapter(NAMES, WEIGHTS[0], "ours", combination_type="svd", svd_clamp=0.9)
    (reasons,) = (r for n, r in fast.stats().passed_on.items() if n.startswith("add_weighted"))
    assert sum(reasons.values()) == 7 and "svd_clamp" in next(iter(reasons))
    assert distance(deltas(model, "ours"), deltas(model, "theirs")) < 1e-5


def test_errors_name_the_layer_and_leave_no_adapter_behind() -> None:
    model = made("equal")
    model.base_model.model.k_proj.lora_B["a1"].weight.data[3, 1] = float("nan")
    for kind in ("svd", "linear", "ties", "ties_svd"):
        with fast.enabled(), pytest.raises(DataError, match="k_proj"):
            model.add_weighted_adapter(NAMES, WEIGHTS[0], "ours", combination_type=kind, density=0.5)
        assert "ours" not in model.peft_config and "ours" not in model.base_model.model.q_proj.lora_A
    with fast.enabled(), pytest.raises(MergeError):
        made("equal").add_weighted_adapter(NAMES, WEIGHTS[0], "ours", combination_type="ties", density=-0.5)
    with fast.enabled(), pytest.raises(ValueError, match="does not exist"):
        model.add_weighted_adapter(["no"], [1.0], "ours")


def test_disable_gives_everything_back() -> None:
    import peft.tuners.lora.conversion as conversion
    import peft.tuners.lora.layer as layers
    import peft.tuners.lora.model as module
    import peft.utils.merge_utils as utils

    def seams() -> list[Any]:
        owners = [
            torch.nn.Linear,
            module.LoraModel,
            layers.Linear,
            layers.Embedding,
            layers._ConvNd,
            utils,
            module,
            conversion,
        ]
        return [value for owner in owners for value in vars(owner).values()]

    before = seams()
    model = made("equal")
    model.add_weighted_adapter(NAMES, WEIGHTS[0], "theirs", combination_type="svd")
    fast.enable()
    assert [a is b for a, b in zip(seams(), before, strict=True)].count(False) == 19
    fast.enable(dialect="peft", seed=4)
    fast.disable()
    assert all(a is b for a, b in zip(seams(), before, strict=True))
    model.add_weighted_adapter(NAMES, WEIGHTS[0], "again", combination_type="svd")
    assert distance(deltas(model, "again"), deltas(model, "theirs")) == 0.0


def test_another_signature_is_left_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.tuners.lora.model as module

    def changed(self: Any, combination_type: str, new: int) -> None: ...

    original = module.LoraModel.add_weighted_adapter
    monkeypatch.setattr(module.LoraModel, "_generalized_task_arithmetic_weighted_adapter", changed)
    with pytest.raises(ToolError, match="other arguments"):
        fast.enable()
    assert module.LoraModel.add_weighted_adapter is original and module.LoraModel.add_weighted_adapter.__name__ == (
        "add_weighted_adapter"
    )


def test_a_release_that_applies_the_scale_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT 0.20: ours by default, once and with a warning; PEFT's in its dialect."""
    import peft.tuners.lora.model as module

    name = "_svd_generalized_task_arithmetic_weighted_adapter"
    today = getattr(module.LoraModel, name)

    def doubled(
        self, combination_type, adapters, weights, new_rank, target, target_lora_A, target_lora_B, density,
        majority_sign_method, clamp=None, full_matrices=True, driver=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        weights = [w * target.scaling[a] for a, w in zip(adapters, weights, strict=True)]
        return today(
            self, combination_type, adapters, weights, new_rank, target, target_lora_A, target_lora_B, density,
            majority_sign_method, clamp, full_matrices, driver,
        )  # fmt: skip

    monkeypatch.setattr(module.LoraModel, name, doubled)
    targets = ["q_proj", "head", "embed"]
    model = adapted(lora(4, 8, targets), lora(4, 8, targets))
    exact = {n: d + deltas(model, "a1")[n] for n, d in deltas(model, "a0").items()}
    with fast.enabled(), pytest.warns(UserWarning, match="twice"):
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "ours", combination_type="svd", svd_rank=8)
    assert distance(deltas(model, "ours"), exact) < 1e-5
    with fast.enabled(dialect="peft"):
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "theirs", combination_type="svd", svd_rank=8)
    assert distance(deltas(model, "theirs"), {n: 2 * d for n, d in exact.items()}) < 1e-5


def test_threads() -> None:
    models = [made("equal", seed=i) for i in range(4)]
    for model in models:
        model.add_weighted_adapter(NAMES, WEIGHTS[0], "theirs", combination_type="svd")
    errors: list[BaseException] = []

    def work(model: Any) -> None:
        try:
            model.add_weighted_adapter(NAMES, WEIGHTS[0], "ours", combination_type="svd")
        except BaseException as error:  # for the main thread
            errors.append(error)

    with fast.enabled():
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and fast.stats().served == {"add_weighted_adapter: types of deltas": 28}
    for model in models:
        assert distance(deltas(model, "ours"), deltas(model, "theirs")) < 1e-5


def test_gradients_reach_the_combined_adapter() -> None:
    model = made("equal")
    with fast.enabled():
        model.add_weighted_adapter(NAMES, WEIGHTS[0], "ours", combination_type="svd")
    model.set_adapter("ours")
    model(torch.arange(4)[None]).sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if ".ours." in n and "q_proj" in n]
    assert len(grads) == 2 and all(g is not None and bool(g.any()) for g in grads)
