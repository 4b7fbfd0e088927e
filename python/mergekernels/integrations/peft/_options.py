"""The options of the integration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import ArgumentError
from ...ops.arguments import check_choice, check_integer

__all__ = ["Options", "checked"]


@dataclass(frozen=True)
class Options:
    """As `enable` takes them."""

    dialect: str
    seed: int | None

    @property
    def exact(self) -> bool:
        """Whether PEFT 0.21.2 is reproduced with its peculiarities."""
        return self.dialect == "peft"


def checked(dialect: Any, seed: Any) -> Options:
    """The options, if they are usable.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(dialect, str):
        raise ArgumentError("dialect is not usable", code="argument", expected="'default' or 'peft'", got=repr(dialect))
    check_choice(dialect, ("default", "peft"), "dialect")
    return Options(dialect, None if seed is None else check_integer(seed, 0, 1 << 64, "seed"))
