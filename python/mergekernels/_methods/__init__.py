"""The methods. Each is one file over shared ops; this table is all that knows their names."""

from __future__ import annotations

from difflib import get_close_matches

from ..errors import ArgumentError
from .linear import Linear
from .passthrough import Passthrough
from .protocol import Method
from .task_arithmetic import TaskArithmetic
from .ties import Ties

__all__ = ["get", "names"]

_METHODS: dict[str, Method] = {m.info.name: m for m in (Linear(), TaskArithmetic(), Ties(), Passthrough())}


def names() -> list[str]:
    """The names of all methods, as recipes write them."""
    return list(_METHODS)


def get(name: str) -> Method:
    """The method called `name`.

    Raises
    ------
    ArgumentError : there is none; the message lists all and the nearest.
    """
    method = _METHODS.get(name)
    if method is None:
        near = get_close_matches(name, _METHODS, n=1)
        raise ArgumentError(
            "unknown merge method",
            code="method.unknown",
            expected="one of " + ", ".join(_METHODS),
            got=repr(name),
            hint=f"Did you mean '{near[0]}'?" if near else None,
        )
    return method
