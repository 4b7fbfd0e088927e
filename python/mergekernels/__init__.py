"""mergekernels: merging neural networks, exact, in bounded memory and fast.

Names are loaded on first use, so that importing the package costs nothing and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from ._backends.dispatch import use_backend
    from ._backends.status import backends
    from ._methods.catalogue import methods
    from .adapters.dense_stacks import checkpoint_stacks
    from .adapters.merge import merge_adapters
    from .adapters.merged import MergedAdapter
    from .adapters.prepare import prepare_adapters
    from .adapters.shared import factorise_adapters
    from .adapters.texts import cluster_texts
    from .continual.step import continual_merge
    from .engine.diff import diff
    from .engine.run import plan, run
    from .engine.verify import verify
    from .errors import MergeError
    from .merging import merge
    from .modules import merge_modules
    from .state_dicts import merge_state_dicts

__all__ = [
    "MergeError",
    "MergedAdapter",
    "__version__",
    "backends",
    "checkpoint_stacks",
    "cluster_texts",
    "continual_merge",
    "diff",
    "factorise_adapters",
    "merge",
    "merge_adapters",
    "merge_modules",
    "merge_state_dicts",
    "methods",
    "plan",
    "prepare_adapters",
    "run",
    "use_backend",
    "verify",
]

_HOME = {
    "MergeError": "errors",
    "MergedAdapter": "adapters.merged",
    "backends": "_backends.status",
    "checkpoint_stacks": "adapters.dense_stacks",
    "cluster_texts": "adapters.texts",
    "continual_merge": "continual.step",
    "diff": "engine.diff",
    "factorise_adapters": "adapters.shared",
    "merge": "merging",
    "merge_adapters": "adapters.merge",
    "merge_modules": "modules",
    "merge_state_dicts": "state_dicts",
    "methods": "_methods.catalogue",
    "plan": "engine.run",
    "prepare_adapters": "adapters.prepare",
    "run": "engine.run",
    "use_backend": "_backends.dispatch",
    "verify": "engine.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mergekernels' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
