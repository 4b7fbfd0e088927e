"""What is said about each method: complete, printed, and the same in docs/methods.md."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from mergekernels import methods
from mergekernels._methods.catalogue import described
from mergekernels._methods.modifiers import modifiers
from mergekernels._methods.protocol import REQUIRED, MethodInfo
from mergekernels.errors import ArgumentError
from mergekernels.report.methods import method_text, methods_text

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_not_stale() -> None:
    """Else: python docs/make_methods.py."""
    page = runpy.run_path(str(DOCS / "make_methods.py"))["page"]()
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == page


_ALL = [*methods().values(), *modifiers().values(), *methods("adapters").values()]


@pytest.mark.parametrize("info", _ALL, ids=lambda i: f"{i.name}-{i.takes[0]}")
def test_descriptions_are_complete(info: MethodInfo) -> None:
    """Every field says something, without line breaks; every parameter is printed."""
    for text in (info.purpose, info.formula, info.passes, info.source, *info.dialects.values(), *info.deviations):
        assert text and text == " ".join(text.split())
    assert info.purpose.endswith(".") and next(iter(info.dialects)) == "default"
    assert info.tier in ("T0", "T1", "T2") and 1 <= info.min_models <= info.max_models
    assert info.max_models <= 64 or info.tier == "T2"
    text = method_text(info)
    for param in info.params:
        assert f"\n  {param.name} " in text and param.help in " ".join(text.split())
        assert param.default is REQUIRED or param.default is None or isinstance(param.default, (bool, int, float, str))
        if param.choices and param.default is not None and param.default is not REQUIRED:
            assert param.default in param.choices
    assert len({p.keyword for p in info.params}) == len(info.params)
    assert max(map(len, text.splitlines())) <= 120


def test_the_table_lists_every_method() -> None:
    text = methods_text(_ALL)
    models, adapters = text.split("\n\n")[:2]
    for name in methods():
        assert f"\n{name} " in models
    for name in methods("adapters"):
        assert f"\n{name} " in adapters


def test_a_name_of_two_methods_gives_both() -> None:
    assert [i.takes for i in described("ties")] == [("models",), ("adapters",)]
    assert [i.name for i in described("lines")] == ["lines"]
    with pytest.raises(ArgumentError, match="Did you mean 'ties_svd'"):
        described("ties_svt")
    with pytest.raises(ArgumentError, match="takes is not usable"):
        methods("adapter")  # type: ignore[arg-type]


def test_methods_of_adapters_ask_for_no_base() -> None:
    for info in methods("adapters").values():
        lines = method_text(info).splitlines()
        told = [line.split(None, 1)[1] for line in lines if line.startswith("  base ")]
        if "models" not in info.takes:
            assert not told and "  inputs" in "\n".join(lines) and not any("besides the base" in line for line in lines)
        elif info.base == "required":
            assert told == ["required for models, not for adapters"]
    models, adapters = (part.splitlines()[0].split() for part in methods_text(_ALL).split("\n\n")[:2])
    assert models == ["method", "models", "base", "tier", "purpose"]
    assert adapters == ["method", "adapters", "tier", "purpose"]


def test_parameters_of_inner_methods_say_what_they_do_there() -> None:
    params = {p.name: p.help for p in methods("adapters")["core_space"].params}
    assert "no effect" not in params["density"] + params["rescale"]
    assert "ties" in params["density"] and "fraction" in params["density"]
    assert params["epsilon"].count("): ") >= 2  # of della one thing, of ram another
