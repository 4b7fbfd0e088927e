"""Which linear modules of an adapter have weights stored as (in, out)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...adapters.model import Module
from ...errors import InputError
from .config import matching
from .factors import some
from .sites import Kind

__all__ = ["Orientation"]


class Orientation:
    """Which linear modules store their weight as (in, out).

    PEFT has one flag for all. Ours is also a list of patterns (as in rank_pattern) for models with both, and files
    that we wrote say it in their metadata.
    """

    def __init__(self, config: Mapping[str, Any], metadata: Mapping[str, str], where: str) -> None:
        flag = config.get("fan_in_fan_out") or False
        try:
            self.patterns: dict[str, None] | None = dict.fromkeys(json.loads(metadata["mergekernels.fan_in_fan_out"]))
        except (KeyError, ValueError, TypeError):
            self.patterns = None
        if not isinstance(flag, bool):
            if not isinstance(flag, list) or not all(isinstance(p, str) for p in flag):
                raise InputError(
                    "field 'fan_in_fan_out' of the adapter's config is unusable",
                    code="adapter.config",
                    file=where,
                    expected="true, false or a list of patterns",
                    got=repr(flag),
                )
            self.patterns, flag = dict.fromkeys(flag), False
        self.flag = flag

    def kind(self, module: str, dims: int) -> Kind:
        """Kind of a module that is no embedding."""
        if dims > 2:
            return "conv"
        flipped = self.flag if self.patterns is None else matching(self.patterns, module) is not None
        return "fan_in_fan_out" if flipped else "linear"

    def check(self, modules: Mapping[str, Module], where: str) -> None:
        """Refuses square modules whose orientation nothing shows, where the base contradicts the flag elsewhere."""
        if self.patterns is not None:
            return
        said: Kind = "fan_in_fan_out" if self.flag else "linear"
        flat = [m.site for m in modules.values() if len(m.site.weight_shape) == 2 and m.site.kind != "embedding"]
        against = [s for s in flat if s.kind != said]
        square = [s for s in flat if s.weight_shape[0] == s.weight_shape[1]]
        if against and square:
            raise InputError(
                f"fan_in_fan_out = {str(self.flag).lower()} is wrong for module '{against[0].module}', so the "
                f"orientation of square modules is unknown: {some([s.module for s in square])}",
                code="adapter.orientation",
                file=where,
                hint="Pass config={'fan_in_fan_out': [patterns of the modules stored as (in, out)]}",
            )
