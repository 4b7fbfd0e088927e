"""Switching on in a ``mergekit-yaml`` that knows nothing of it, by the environment variable MERGEKERNELS_MERGEKIT.

A line in ``site-packages/mergekernels_mergekit.pth`` calls :func:`watch` at the start of every Python process in which
the variable is set, so that importing this imports next to nothing; the rest happens once mergekit's methods are
imported.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["VARIABLE", "watch"]

VARIABLE = "MERGEKERNELS_MERGEKIT"
_MODULE = "mergekit.merge_methods"
_said: list[str] = []


def watch() -> None:
    """Read the variable: 1 switches on once mergekit is imported, report also prints the calls at exit; 0 is off."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value in ("", "0"):
        return
    if value not in ("1", "report"):
        if not _said:  # a site-packages that two names lead to is read twice
            _said.append(f"mergekernels: {VARIABLE} is {value!r}; expected 1, report or 0. Nothing is done.")
            print(_said[0], file=sys.stderr)
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(report=value == "report"))


def _report() -> None:
    from .mergekit import stats

    print(f"mergekernels: mergekit: {stats()}", file=sys.stderr)


class _Finder(MetaPathFinder):
    """Finds mergekit's methods as every other finder would, with a loader that switches on afterwards."""

    def __init__(self, report: bool) -> None:
        self.report = report

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """Executes the module with its own loader, gives it that loader back, and switches on."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Only now: who asks for the spec may not import at all.
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            from ._hooks import fail_open
            from .mergekit import enable
        except Exception as error:
            print(f"mergekernels: mergekit runs without mergekernels: {error}", file=sys.stderr)
            return
        if fail_open("mergekit", enable) and self.finder.report:
            atexit.register(_report)
