"""mergekernels: merging neural networks, exact, in bounded memory and fast.

Names are loaded on first use, so that importing the package costs nothing and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import backends, diff, merge, merge_state_dicts, methods, plan, run, use_backend, verify
    from .errors import MergeError

__all__ = [
    "MergeError",
    "__version__",
    "backends",
    "diff",
    "merge",
    "merge_state_dicts",
    "methods",
    "plan",
    "run",
    "use_backend",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "MergeError":
        from .errors import MergeError

        return MergeError
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'mergekernels' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
