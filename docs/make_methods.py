"""Writes docs/methods.md from the descriptions of the methods."""

from __future__ import annotations

from pathlib import Path

from mergekernels._methods.catalogue import methods
from mergekernels._methods.modifiers import modifiers
from mergekernels.report.methods_page import methods_page


def page() -> str:
    """What docs/methods.md must hold."""
    return methods_page(methods().values(), methods("adapters").values(), modifiers().values())


if __name__ == "__main__":
    Path(__file__).with_name("methods.md").write_text(page(), encoding="utf-8")
