"""sd-mecha with these kernels: the arithmetic of its built-in merge methods is replaced, recipes stay as they are.

ties_sum, ties_sum_extended, ties_sum_with_dropout (DARE and DELLA), dropout, model_stock and truncate_rank are served;
sd-mecha is imported when :func:`enable` is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .._stats import Calls

__all__ = ["disable", "enable", "enabled", "reset_stats", "stats"]


def enable(*, random: bool = True) -> None:
    """Serves sd-mecha's merge methods from now on, in all threads.

    random : also those that draw masks. Their probabilities are sd-mecha's, but for the same seed the masks are others.

    Raises :class:`mergekernels.errors.ToolError` if sd-mecha is not one that is known; it is then left untouched.
    """
    from .seams import Options, integration

    integration.enable(Options(random))


def disable() -> None:
    """Puts sd-mecha's own functions back."""
    from .seams import integration

    integration.disable()


@contextmanager
def enabled(*, random: bool = True) -> Iterator[None]:
    """`enable` inside, afterwards as before."""
    from .seams import Options, integration

    with integration.enabled(Options(random)):
        yield


def stats() -> Calls:
    """What was served here and what went to sd-mecha's own code, and why."""
    from .seams import integration

    return integration.calls()


def reset_stats() -> None:
    """All counts back to zero."""
    from .seams import integration

    integration.stats.reset()
