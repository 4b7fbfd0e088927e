"""Several adapters of one base: union, coverage, and what makes them not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_files import linear_pair, peft_folder
from mergekernels import merge_adapters
from mergekernels.adapters.align import align
from mergekernels.adapters.model import Adapter
from mergekernels.errors import InputError, PlanError
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
    assert [p.site.module for p in aligned.places] == ["model.k", "model.q", "model.v"]
    assert [[e is not None for e in p.entries] for p in aligned.places] == [[False, True], [True, False], [True, True]]
    assert len(aligned.warnings) == 2
    assert "one lacks 1 of 3 modules" in aligned.warnings[0] and "model.k" in aligned.warnings[0]


def test_full_coverage_says_nothing(tmp_path: Path) -> None:
    aligned = align([adapter(tmp_path, "one", {"model.q": 2}), adapter(tmp_path, "second", {"model.q": 5})])
    assert aligned.warnings == () and [p.ranks for p in aligned.places] == [(2, 5)]


def test_no_shared_module_is_an_error(tmp_path: Path) -> None:
    one, second = adapter(tmp_path, "one", {"model.q": 2}), adapter(tmp_path, "second", {"model.q": 2, "model.v": 2})
    other = adapter(tmp_path, "third", {"model.k": 2})
    with pytest.raises(InputError, match=r"no module of third is in any other adapter.*third: model.k") as caught:
        align([one, second, other])
    assert caught.value.code == "adapter.coverage"
    assert len(align([one, second, other], SHAPES).places) == 3


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
        assert align(both).warnings == ()
        return
    with pytest.raises(InputError, match=f"different bases.*got 0: org/base; 1: {names[1]}"):
        align(both)
    assert len(align(both, SHAPES).warnings) == 1


def test_revisions_of_the_base_must_agree(tmp_path: Path) -> None:
    both = [adapter(tmp_path, r, {"model.q": 2}, revision=r) for r in ("v1", "v22")]
    with pytest.raises(InputError, match="org/base at revision v1; v22: org/base at revision v22"):
        align(both)


def test_shapes_must_agree(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one", {"model.q": 2})
    other = read_adapter(peft_folder(tmp_path / "o", linear_pair("model.q", 8, 2, 7)), label="other")
    with pytest.raises(InputError, match=r"expected linear \(8, 6\) as in one; got linear \(8, 7\) in other"):
        align([one, other])


def test_the_base_must_have_the_targets(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one", {"model.q": 2, "model.k": 2})
    with pytest.raises(PlanError) as caught:
        align([one], {"model.q.weight": (8, 7), "model.v.weight": (4, 6)})
    assert [p.tensor for p in caught.value.problems] == ["model.k.weight", "model.q.weight"]


def test_replaced_tensors_must_agree(tmp_path: Path) -> None:
    def with_head(label: str, value: float, dtype: torch.dtype = torch.float32) -> Adapter:
        head = {"base_model.model.score.weight": torch.full((3, 6), value, dtype=dtype)}
        return adapter(tmp_path, label, {"model.q": 2}, head, modules_to_save=["score"])

    one, same = with_head("one", 1.0), with_head("same", 1.0)
    assert align([one, same, adapter(tmp_path, "third", {"model.q": 2})]).warnings == ()
    for other in (with_head("other", 2.0), with_head("another", 1.0, torch.float64)):
        with pytest.raises(InputError, match=f"score.weight.*several adapters replace.*got one, {other.label}"):
            align([one, other])


def test_a_resized_embedding_need_not_fit_the_base(tmp_path: Path) -> None:
    grown = {"base_model.model.lm_head.weight": torch.ones(9, 6), **linear_pair("lm_head", 9, 2, 6)}
    one = read_adapter(peft_folder(tmp_path / "o", grown), base={"lm_head.weight": (8, 6)})
    assert [p.site.weight_shape for p in align([one], {"lm_head.weight": (8, 6)}).places] == [(9, 6)]


def test_what_reading_noted_is_passed_on(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "o", linear_pair("q", 8, 2, 6))
    (warning,) = align([read_adapter(folder, base=SHAPES)], SHAPES).warnings
    assert "module paths begin with '' where the base has 'model.'" in warning


def test_a_base_says_which_modules_peft_must_leave_alone(tmp_path: Path) -> None:
    """PEFT takes every path that ends in a target's for a target."""
    tensors = linear_pair("q", 8, 2, 6)
    base = {"q.weight": (8, 6), "model.q.weight": (8, 6)}
    out = tmp_path / "out"
    merged = merge_adapters([peft_folder(tmp_path / "one", tensors)], "cat", base=base, out=out)
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["exclude_modules"] == merged.config["exclude_modules"] == ["model.q"]
    assert "exclude_modules" not in merge_adapters([tmp_path / "one"], "cat").config
