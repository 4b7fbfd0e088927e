"""What is said about each method: complete, printed, and the same in docs/methods.md."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from mergekernels import methods
from mergekernels._methods.modifiers import modifiers
from mergekernels._methods.protocol import REQUIRED
from mergekernels.report.methods import method_text, methods_text

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_not_stale() -> None:
    """Else: python docs/make_methods.py."""
    page = runpy.run_path(str(DOCS / "make_methods.py"))["page"]()
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", [*methods(), *modifiers()])
def test_descriptions_are_complete(name: str) -> None:
    """Every field says something, without line breaks; every parameter is printed."""
    info = (methods() | modifiers())[name]
    for text in (info.purpose, info.formula, info.passes, info.source, *info.dialects.values(), *info.deviations):
        assert text and text == " ".join(text.split())
    assert info.purpose.endswith(".") and next(iter(info.dialects)) == "default"
    assert info.tier in ("T0", "T1") and 1 <= info.min_models <= info.max_models <= 64
    text = method_text(info)
    for param in info.params:
        assert f"\n  {param.name} " in text and param.help in " ".join(text.split())
        assert param.default is REQUIRED or param.default is None or isinstance(param.default, (bool, int, float, str))
        if param.choices and param.default is not None:
            assert param.default in param.choices
    assert len({p.keyword for p in info.params}) == len(info.params)
    assert max(map(len, text.splitlines())) <= 120


def test_the_table_lists_every_method() -> None:
    text = methods_text(list(methods().values()))
    for name in methods():
        assert f"\n{name} " in text
