"""adapter_config.json: rank, alpha and scale of each module by PEFT's rules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import FormatError, InputError

__all__ = ["CONFIG", "Scaling", "matching", "read_config", "scaling_of"]

CONFIG = "adapter_config.json"
_MAX_CONFIG = 16 * 2**20


def read_config(file: Path) -> dict[str, Any]:
    """An adapter's config as a dictionary.

    Raises
    ------
    InputError : it cannot be read. FormatError : it is not a JSON object, or has a key twice.
    """
    try:
        if file.stat().st_size > _MAX_CONFIG:
            raise FormatError(
                "too large", code="adapter.config", file=str(file), expected=f"at most {_MAX_CONFIG} bytes"
            )
        config = json.loads(file.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", code="adapter.config", file=str(file)) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON: {error}", code="adapter.config", file=str(file)) from None
    if not isinstance(config, dict):
        raise FormatError("not a JSON object", code="adapter.config", file=str(file), got=type(config).__name__)
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in names if names.count(k) > 1)!r}")
    return result


def matching(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first pattern that PEFT takes for `module`: an expression for the whole path, or for its end after a dot.

    The order is that of the mapping.
    """
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return None


@dataclass(frozen=True)
class Scaling:
    """The fields of a config that decide scales.

    rank, alpha : None where the config has none; for alpha that means alpha = rank (kohya, diffusers).
    """

    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool

    def of(self, module: str, rank: int) -> tuple[float, float, int | None]:
        """(alpha, scale, rank that the config wants or None) of a module whose factors have `rank`."""
        by_rank, by_alpha = matching(self.rank_pattern, module), matching(self.alpha_pattern, module)
        wanted = self.rank if by_rank is None else self.rank_pattern[by_rank]
        alpha = self.alpha if by_alpha is None else self.alpha_pattern[by_alpha]
        alpha = float(rank) if alpha is None else float(alpha)
        return alpha, alpha / (math.sqrt(rank) if self.rslora else rank), wanted


def scaling_of(config: Mapping[str, Any], where: str, *, alpha_needed: bool) -> Scaling:
    """Checks and takes the fields of a config.

    Parameters
    ----------
    where : the file or adapter that errors name. alpha_needed : whether a missing lora_alpha is an error.

    Raises
    ------
    InputError : naming the field, what was expected and what came.
    """
    rank = config.get("r")
    if rank is not None and not _is_int(rank):
        raise _bad(where, "r", "a positive integer", rank)
    alpha = config.get("lora_alpha")
    if alpha is None and alpha_needed:
        raise InputError(
            "the config has no lora_alpha, so the adapter's scale is unknown",
            code="adapter.alpha",
            file=where,
            hint="Add the value that it was trained with, or pass config={'lora_alpha': ...}",
        )
    if alpha is not None and not _is_number(alpha):
        raise _bad(where, "lora_alpha", "a finite number", alpha)
    rslora = config.get("use_rslora")
    if not isinstance(rslora, bool) and rslora is not None:
        raise _bad(where, "use_rslora", "true or false", rslora)
    ranks = _pattern(config, "rank_pattern", where, _is_int, "positive integers")
    alphas = _pattern(config, "alpha_pattern", where, _is_number, "finite numbers")
    return Scaling(rank, alpha, ranks, alphas, bool(rslora))


def _pattern(config: Mapping[str, Any], field: str, where: str, fits: Any, what: str) -> dict[str, Any]:
    value = config.get(field)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _bad(where, field, f"an object of pattern to {what}", value)
    for pattern, number in value.items():
        if not fits(number):
            raise _bad(where, f"{field}[{pattern!r}]", what, number)
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"{field} has a pattern that is no regular expression: {error}",
                code="adapter.pattern",
                file=where,
                got=repr(pattern),
            ) from None
    return dict(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _bad(where: str, field: str, expected: str, got: object) -> InputError:
    return InputError(
        f"field '{field}' of the adapter's config is unusable",
        code="adapter.config",
        file=where,
        expected=expected,
        got=repr(got),
    )
