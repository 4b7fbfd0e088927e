"""mergekit 0.1.5 with these kernels: its commands, recipes and functions stay, the arithmetic is done here.

::

    import mergekernels.integrations.mergekit as fast
    fast.enable()

Or ``mergekernels-mergekit config.yml out`` in place of ``mergekit-yaml config.yml out``, or ``MERGEKERNELS_MERGEKIT=1``
in the environment of an unchanged ``mergekit-yaml``. docs/integrations.md says what is served and where results differ.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from .._integration import Integration
from .._stats import Calls
from .options import Options, options
from .seams import install

__all__ = ["disable", "enable", "enabled", "reset_stats", "stats"]

_integration: Integration[Options] = Integration("mergekit", install)


def enable(
    *, seed: int | None = None, nan: str = "propagate", backend: str | None = None, threads: int | None = None
) -> None:
    """Let mergekit's methods compute with these kernels, in this process, until :func:`disable`.

    Parameters
    ----------
    seed : of the masks of dare_* and della*, 0 to 2**64 - 1. None (default): the seed of torch's default generator,
        which ``--random-seed`` and ``torch.manual_seed`` set. Masks depend on the seed, the tensor's name and the
        place of the model, not on the order of tensors, devices or threads; a tensor without a name draws its seed
        from torch's default generator.
    nan : "propagate" (default): NaN and Inf stay where they are, as in mergekit; "error": they are refused by name.
    backend : "cpu", "cuda", "triton" or "reference"; None (default): the best for the device of the tensors. What it
        cannot serve, mergekit computes.
    threads : of the cpu backend; None (default): torch's number of threads at the time of the call.

    A second call with other options changes them.

    Raises
    ------
    ArgumentError : an option is not usable.
    ToolError : mergekit is not installed, or not as these kernels know it; it is left untouched.
    """
    _integration.enable(options(seed, nan, backend, threads))


def disable() -> None:
    """Give everything back to mergekit."""
    _integration.disable()


def enabled(
    *, seed: int | None = None, nan: str = "propagate", backend: str | None = None, threads: int | None = None
) -> AbstractContextManager[None]:
    """Enabled inside a ``with``, and as before afterwards. Parameters as of :func:`enable`."""
    return _integration.enabled(options(seed, nan, backend, threads))


def stats() -> Calls:
    """The calls served and passed on, by method: one call is one tensor, or one batch of tensors."""
    return _integration.calls()


def reset_stats() -> None:
    """Count from zero."""
    _integration.stats.reset()
