"""The methods. Each is one file over shared ops; this table is all that knows their names."""

from __future__ import annotations

from ..errors import ArgumentError, nearest
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
    method = _METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise ArgumentError(
            "unknown merge method",
            code="method.unknown",
            expected="one of " + ", ".join(_METHODS),
            got=repr(name),
            hint=nearest(name, _METHODS) if isinstance(name, str) else None,
        )
    return method
