"""Several adapters of one base: union, coverage, and what makes them not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_files import delta, linear_pair, peft_folder
from mergekernels.adapters.coverage import align
from mergekernels.adapters.model import Adapter
from mergekernels.errors import ArgumentError, DataError, InputError, PlanError
from mergekernels.formats.adapters import read_adapter

SHAPES = {"model.q.weight": (8, 6), "model.k.weight": (4, 6), "model.v.weight": (4, 6)}


def adapter(
    tmp_path: Path, label: str, modules: dict[str, int], more: dict[str, torch.Tensor] | None = None, **fields: Any
) -> Adapter:
    tensors: dict[str, torch.Tensor] = {}
    for path, rank in modules.items():
        tensors |= linear_pair(path, SHAPES[f"{path}.weight"][0], rank, 6, seed=len(label))
    fields = {"r": ..., "lora_alpha": 2, **fields}
    return read_adapter(peft_folder(tmp_path / label, {**tensors, **(more or {})}, **fields), label=label)


def test_union_and_missing(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one", {"model.q": 2, "model.v": 1})
    second = adapter(tmp_path, "second", {"model.k": 3, "model.v": 3}, base_model_name_or_path=None)
    aligned = align([one, second], SHAPES)
    assert list(aligned.sites) == ["model.k", "model.q", "model.v"]
    assert aligned.missing == (("model.k",), ("model.q",))
    assert aligned.coverage == {"model.k": 1, "model.q": 1, "model.v": 2}
    assert aligned.base == "org/base"
    assert len(aligned.warnings) == 2
    assert "one lacks 1 of 3 modules" in aligned.warnings[0] and "'model.k'" in aligned.warnings[0]
    absent, there = aligned.factors("model.k")
    assert (absent.rank, absent.shape) == (0, (4, 6))
    stored = {
        f"base_model.model.model.k.lora_{x}.weight": t
        for x, t in zip("BA", second.modules["model.k"].load(), strict=True)
    }
    torch.testing.assert_close(there.dense().double(), 2 / 3 * delta(stored, "model.k"), rtol=1e-6, atol=1e-6)
    plain = aligned.factors("model.k", fold_scale=False)[1]
    torch.testing.assert_close(plain.dense().double(), delta(stored, "model.k"), rtol=1e-6, atol=1e-6)


def test_full_coverage_says_nothing(tmp_path: Path) -> None:
    aligned = align([adapter(tmp_path, "one", {"model.q": 2}), adapter(tmp_path, "second", {"model.q": 5})])
    assert aligned.warnings == () and aligned.missing == ((), ())


def test_one_float64_factor_makes_all_float64(tmp_path: Path) -> None:
    wide = {k: v.double() for k, v in linear_pair("model.q", 8, 2, 6).items()}
    both = [read_adapter(wide, config={"lora_alpha": 2}, label="wide"), adapter(tmp_path, "one", {"model.q": 2})]
    assert {f.b.dtype for f in align(both).factors("model.q")} == {torch.float64}


def test_no_shared_module_is_an_error(tmp_path: Path) -> None:
    one, second = adapter(tmp_path, "one", {"model.q": 2}), adapter(tmp_path, "second", {"model.q": 2, "model.v": 2})
    other = adapter(tmp_path, "third", {"model.k": 2})
    with pytest.raises(InputError, match=r"third: the adapter shares no module.*'model.q'.*got 'model.k'"):
        align([one, second, other])
    assert len(align([one, second, other], allow_disjoint=True).sites) == 3


@pytest.mark.parametrize(
    ("names", "fine"),
    [
        (("org/base", "org/base"), True),
        (("org/base", ""), True),
        (("org/base", "/data/models/base"), True),
        (("org/base", "other/base"), False),
        (("org/base", "org/base-chat"), False),
        (("org/base", "/data/models/base-chat"), False),
    ],
)
def test_bases_must_agree(tmp_path: Path, names: tuple[str, str], fine: bool) -> None:
    both = [adapter(tmp_path, str(i), {"model.q": 2}, base_model_name_or_path=n) for i, n in enumerate(names)]
    if fine:
        assert align(both).base == "org/base"
        return
    with pytest.raises(InputError, match=f"1: adapters of different base models; expected 'org/base'.*'{names[1]}'"):
        align(both)
    assert len(align(both, allow_other_base=True).warnings) == 1


def test_revisions_of_the_base_must_agree(tmp_path: Path) -> None:
    both = [adapter(tmp_path, r, {"model.q": 2}, revision=r) for r in ("v1", "v22")]
    with pytest.raises(InputError, match="'org/base' revision v22"):
        align(both)


def test_shapes_must_agree(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one", {"model.q": 2})
    tensors = linear_pair("model.q", 8, 2, 7)
    other = read_adapter(peft_folder(tmp_path / "o", tensors), label="other")
    with pytest.raises(InputError, match=r"other: .*model.q.*expected linear \[8, 6\] as in one; got linear \[8, 7\]"):
        align([one, other])


def test_the_base_must_have_the_targets(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one", {"model.q": 2, "model.k": 2})
    with pytest.raises(PlanError) as caught:
        align([one], {"model.q.weight": (8, 7), "model.v.weight": (4, 6)})
    assert [p.code for p in caught.value.problems] == ["adapter.target-missing", "adapter.base-shape"]


def test_replaced_tensors_must_agree(tmp_path: Path) -> None:
    def with_head(label: str, value: float, dtype: torch.dtype = torch.float32) -> Adapter:
        head = {"base_model.model.score.weight": torch.full((3, 6), value, dtype=dtype)}
        return adapter(tmp_path, label, {"model.q": 2}, head, modules_to_save=["score"])

    one, same = with_head("one", 1.0), with_head("same", 1.0)
    aligned = align([one, same, adapter(tmp_path, "third", {"model.q": 2})])
    assert list(aligned.extras) == ["score.weight"] and aligned.extras["score.weight"][0] == "one"
    assert torch.equal(aligned.extras["score.weight"][1](), torch.ones(3, 6))
    for other in (with_head("other", 2.0), with_head("another", 1.0, torch.float64)):
        with pytest.raises(InputError, match=r"other: tensor 'score.weight': two adapters.*modules_to_save.*one"):
            align([one, other])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tensors = linear_pair("model.q", 8, 2, 6)
    tensors["base_model.model.model.q.lora_A.weight"][1, 3] = value
    bad = read_adapter(peft_folder(tmp_path / "bad", tensors), label="bad")
    with pytest.raises(DataError, match=r"bad: tensor 'model.q': factor A has NaN or Inf"):
        align([bad]).factors("model.q")


def test_no_adapters() -> None:
    with pytest.raises(ArgumentError, match="no adapters"):
        align([])
