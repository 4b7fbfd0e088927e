"""What a merge of adapters says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["InputReport", "MergeReport", "ModuleReport"]


@dataclass(frozen=True)
class InputReport:
    """One adapter. modules : how many it adapts."""

    label: str
    form: str
    base: str
    modules: int


@dataclass(frozen=True)
class ModuleReport:
    """One module of the result.

    shape : (m, n) of the matrix. ranks, scales (alpha / r) : of the adapters that have it. adapters : how many do.
    rank : of the result. kept_energy : share of the merged delta's sum of squares that the rank keeps, 1 where nothing
    was cut. route : how the result was formed. details : what the method says (name -> number or word). warnings :
    sentences.
    """

    shape: tuple[int, int]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    adapters: int
    rank: int
    kept_energy: float
    route: str
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeReport:
    """A merge of adapters.

    params : recipe name -> value, as used. rank, energy : as asked for, None if not. modules : in name order.
    warnings : about the whole and, prefixed by the module, about modules. seconds : of merging, without saving.
    """

    method: str
    dialect: str
    params: Mapping[str, Any]
    seed: int
    rank: int | None
    energy: float | None
    inputs: tuple[InputReport, ...]
    modules: Mapping[str, ModuleReport]
    warnings: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        data = asdict(self)
        data["params"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.params.items()}
        return data
