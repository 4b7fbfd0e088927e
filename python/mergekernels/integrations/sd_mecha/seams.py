"""Which attributes of sd-mecha are replaced, and how a version that differs is recognised."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

from .._hooks import refuse
from .._integration import Integration
from .calls import CALLS

__all__ = ["Options", "integration"]

TOOL = "sd-mecha"

_RANDOM = ("ties_sum_with_dropout", "dropout")
_current = threading.local()


@dataclass(frozen=True)
class Options:
    """random : also replace the methods that draw masks."""

    random: bool = True


def _install(state: Integration[Options]) -> None:
    """Puts our functions into the merge methods, which keep their identifiers.

    Raises :class:`mergekernels.errors.ToolError` for an sd-mecha whose methods look or answer otherwise.
    """
    try:
        from sd_mecha.extensions import merge_methods
    except ImportError as error:
        refuse(TOOL, f"it cannot be imported ({error})")
    options = state.options
    assert options is not None
    state.hooks.restore()  # with other options fewer methods may be replaced
    found = {}
    for name in CALLS:
        try:
            method = merge_methods.resolve(name)
        except (AttributeError, ValueError, KeyError):
            refuse(TOOL, f"it has no merge method '{name}'")
        original = method.__wrapped__
        if not inspect.isfunction(original) or _shape(original) != _shape(CALLS[name]):
            refuse(TOOL, f"merge method '{name}' has another signature than the one that is known")
        found[name] = (method, original)
    import torch

    for name, (_, original) in found.items():
        with torch.device("cpu"):  # whatever default device the user has set
            alike = _answers_alike(name, original)
        if not alike:
            refuse(TOOL, f"merge method '{name}' gives another result than the one that is known")
    kind = type(found["ties_sum"][0])
    if list(inspect.signature(kind.merge_key).parameters)[1:4] != ["input_args", "input_kwargs", "key"]:
        refuse(TOOL, "merge_key has another signature than the one that is known")
    state.hooks.replace(kind, "merge_key", _remembering)
    for name, (method, _) in found.items():
        if options.random or name not in _RANDOM:
            state.hooks.replace(method, "__wrapped__", state.served(name, CALLS[name], _key))


def _remembering(original: Any) -> Any:
    """Notes the name of the tensor at hand, which most methods are not told."""

    def merge_key(self: Any, input_args: Any, input_kwargs: Any, key: str, *rest: Any, **more: Any) -> Any:
        _current.key = key
        return original(self, input_args, input_kwargs, key, *rest, **more)

    return merge_key


def _key(*args: Any, **kwargs: Any) -> str | None:
    return getattr(_current, "key", None)


def _shape(function: Any) -> list[tuple[Any, ...]]:
    """Names, kinds and defaults of the parameters; what collects further keywords may have any name."""
    parameters = inspect.signature(function).parameters.values()
    return [("" if p.kind is p.VAR_KEYWORD else p.name, p.kind, p.default) for p in parameters if not _free(p)]


def _free(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.VAR_POSITIONAL


def _answers_alike(name: str, original: Any) -> bool:
    """Compares the two on a few numbers; what draws masks is looked at where all or none of its entries are kept."""
    import torch

    first = torch.tensor([[0.5, -1.0, 0.25, 3.0], [2.0, 0.125, -0.75, 1.5], [-0.5, 0.0, 4.0, -2.5]])
    models = [first, first.flip(1) * 0.75, -first.flip(0) + 0.3125, first.roll(1, 0)]
    cases: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "ties_sum": [(tuple(models), {"k": k, "vote_sgn": v}) for k in (0.5, 1.0) for v in (False, True)],
        "ties_sum_extended": [(tuple(models), {"k": 0.5, "apply_stock": s}) for s in (False, True)],
        "ties_sum_with_dropout": [(tuple(models), {"probability": torch.tensor(0.0), "k": 0.5})],
        "dropout": [(tuple(models), {"probability": 0.0, "rescale": 2.0})],
        "model_stock": [(tuple(models[:2]), {})],
        "truncate_rank": [((first,), {"rank": 2, "approximate_basis_seed": 3})],
    }
    for args, kwargs in cases[name]:
        want = original(*args, **kwargs)
        got = CALLS[name](*args, **kwargs)
        if not isinstance(want, torch.Tensor) or want.dtype != got.dtype or want.shape != got.shape:
            return False
        if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
            return False
    return True


integration: Integration[Options] = Integration(TOOL, _install)
