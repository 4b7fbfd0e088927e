"""PEFT's own calls served by these kernels: `add_weighted_adapter`, conversion to LoRA, merging into the base.

    from mergekernels.integrations import peft
    peft.enable()
    model.add_weighted_adapter(["code", "math"], [1.0, 0.5], "both", combination_type="svd")

Without any patch, `mergekernels.merge_adapters` merges adapter folders and state dicts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

from .._integration import Integration
from .._stats import Calls
from ._options import Options, checked
from ._seams import install

__all__ = ["disable", "enable", "enabled", "reset_stats", "stats"]

_state: Integration[Options] = Integration("peft", install)


def enable(*, dialect: Literal["default", "peft"] = "default", seed: int | None = None) -> None:
    """From now on PEFT (0.20 or newer) is served by these kernels, in this process.

    Parameters
    ----------
    dialect : "default": alpha / r counts once and the merged adapter's config says what it is: no rsLoRA, a rank
        pattern where ranks differ. What PEFT would lose silently is refused: DoRA and other variants, lora_bias,
        unequal numbers of adapters and weights. "peft": as PEFT 0.21.2 does it, config and dtypes included; adapters
        are merged into the base one by one, by PEFT.
    seed : of the random masks of dare types, 64 bits; None takes one from torch's generator at each call, so that
        `torch.manual_seed` repeats them.

    Raises
    ------
    ArgumentError : unknown dialect or unusable seed. ToolError : PEFT is missing or not as it is known; it was left
        untouched.
    """
    _state.enable(checked(dialect, seed))


def disable() -> None:
    """Every original back in its place."""
    _state.disable()


def enabled(
    *, dialect: Literal["default", "peft"] = "default", seed: int | None = None
) -> AbstractContextManager[None]:
    """As `enable` inside of a `with` block, as before afterwards."""
    return _state.enabled(checked(dialect, seed))


def stats() -> Calls:
    """What was served, and what PEFT did itself and why. Combinations are counted by layer."""
    return _state.calls()


def reset_stats() -> None:
    """All counts back to zero."""
    _state.stats.reset()
