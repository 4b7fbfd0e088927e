"""Where mergekit's arithmetic is replaced, and how its version is recognised: by what it has, not by its number."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from ...errors import ToolError
from .._hooks import NotServed, refuse
from .._integration import Integration
from .check import TASK_ARITHMETIC, arithmetic_disagreement, disagreement
from .compute import linear_batch, merged, slerp_batch
from .options import Options
from .translate import FUNCTIONS, arithmetic, function

__all__ = ["install"]

_FIELDS = {
    "TensorGroup": {"entries", "metadata"},
    "TensorEntry": {"id", "tensor", "is_base"},
    "TensorMetadata": {"name", "vocabulary_axis"},
    "TensorBatch": {"tensors", "base_index"},
    "GeneralizedTaskArithmeticMerge": {"consensus_method", "sparsification_method"},
}
"""What we read from mergekit's objects."""


def install(integration: Integration[Options]) -> None:
    """Check that this is the mergekit that we know, and replace what its methods compute with.

    Raises
    ------
    ToolError : it is not installed, or not as we know it; nothing has been replaced.
    """
    package = _imported()
    registered = recognise(package)
    kind = package.GeneralizedTaskArithmeticMerge
    functions = {n: registered[n] for n in FUNCTIONS if not _foreign(n, registered[n].implementation)}
    ours = not _foreign("GeneralizedTaskArithmeticMerge", kind.merge_group)
    if not integration.hooks.active:
        problem = disagreement(package, functions)
        if problem is None and ours:
            problem = arithmetic_disagreement(package, {n: registered[n] for n in TASK_ARITHMETIC})
        if problem is not None:
            refuse("mergekit", problem)
    for name, method in functions.items():
        make = integration.served(name, _function(integration, name), _tensor)
        integration.hooks.replace(method, "implementation", make)
    if ours:
        integration.hooks.replace(kind, "merge_group", _arithmetic(integration))


def recognise(package: Any) -> dict[str, Any]:
    """The methods of ``mergekit.merge_methods``, by name.

    Raises
    ------
    ToolError : not as expected.
    """
    if not hasattr(package, "registered_methods"):
        older = hasattr(package, "REGISTERED_MERGE_METHODS")
        refuse(
            "mergekit",
            "this is the generation of version 0.1.4, whose methods are tasks of a graph; version 0.1.5 is served"
            if older
            else "merge_methods has no registered_methods",
        )
    for name, fields in _FIELDS.items():
        kind = getattr(package, name, None)
        missing = fields - set(getattr(kind, "__dataclass_fields__", ()))
        if missing:
            refuse("mergekit", f"{name} lacks {', '.join(sorted(missing))}")
    registered = {method.spec.name: method for method in package.registered_methods()}
    for name, expected in FUNCTIONS.items():
        implementation = getattr(registered.get(name), "implementation", None)
        if implementation is None:
            refuse("mergekit", f"the method {name} has no implementation")
        found = tuple(inspect.signature(implementation).parameters)
        if found != expected and not _foreign(name, implementation, quiet=True):
            refuse("mergekit", f"{name} takes ({', '.join(found)}), not ({', '.join(expected)})")
    kind = package.GeneralizedTaskArithmeticMerge
    if tuple(inspect.signature(kind.merge_group).parameters) != ("self", "group", "parameters"):
        refuse("mergekit", "GeneralizedTaskArithmeticMerge.merge_group has another signature")
    for name in TASK_ARITHMETIC:
        if not isinstance(registered.get(name), kind):
            refuse("mergekit", f"the method {name} is not a GeneralizedTaskArithmeticMerge")
    return registered


def _imported() -> Any:
    try:
        import mergekit.merge_methods as package
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != "mergekit":
            raise ToolError(f"mergekit cannot be imported: {error}", code="integration.missing") from error
        raise ToolError(
            "mergekit is not installed", code="integration.missing", hint="Install it: pip install mergekit==0.1.5"
        ) from error
    except Exception as error:
        raise ToolError(
            f"mergekit cannot be imported: {type(error).__name__}: {error}", code="integration.missing"
        ) from error
    return package


def _foreign(name: str, implementation: Any, *, quiet: bool = False) -> bool:
    """Whether somebody else has replaced it already: theirs is what the user wants then."""
    module = str(getattr(implementation, "__module__", ""))
    if module.partition(".")[0] == "mergekit":
        return False
    if not quiet:
        warnings.warn(
            f"mergekit: {name} is computed by {module or 'other'} code; mergekernels leaves it alone",
            RuntimeWarning,
            stacklevel=2,
        )
    return True


def _function(integration: Integration[Options], name: str) -> Callable[..., Any]:
    """What takes the place of ``implementation`` of a method."""

    def ours(inputs: Any, *values: Any, **parameters: Any) -> Any:
        given = _bound(name, values, parameters)
        if name == "linear":
            return linear_batch(inputs, given["weight"], given.get("normalize", True), _options(integration))
        if name == "slerp":
            return slerp_batch(inputs, given["t"], _options(integration))
        return merged(function(name, inputs, given), _options(integration))

    return ours


def _bound(name: str, values: tuple[Any, ...], parameters: dict[str, Any]) -> dict[str, Any]:
    """Positional values by name. What the function itself would refuse is its to refuse."""
    known = FUNCTIONS[name][1:]
    given = dict(zip(known, values, strict=False)) | parameters
    if len(given) != len(values) + len(parameters) or not set(given) <= set(known):
        raise NotServed("other parameters than the method has")
    required = {"linear": "weight", "slerp": "t", "nuslerp": "weight", "multislerp": "weight", "nearswap": "t"}
    if name in required and required[name] not in given:
        raise NotServed("a parameter is missing")
    return given


def _arithmetic(integration: Integration[Options]) -> Callable[[Any], Any]:
    """What takes the place of ``GeneralizedTaskArithmeticMerge.merge_group``: counted under the name of the method."""

    def make(original: Any) -> Any:
        def merge_group(self: Any, group: Any, /, **parameters: Any) -> Any:
            def ours(group: Any, **parameters: Any) -> Any:
                return merged(arithmetic(self, group, parameters), _options(integration))

            def theirs(group: Any, **parameters: Any) -> Any:
                return original(self, group, **parameters)

            return integration.served(self.method_name, ours, _tensor)(theirs)(group, **parameters)

        return merge_group

    return make


def _options(integration: Integration[Options]) -> Options:
    options = integration.options
    if options is None:  # switched off while this call was on its way
        return Options(None, "propagate", None, None)
    return options


def _tensor(inputs: Any, *_args: Any, **_parameters: Any) -> str | None:
    """The name that mergekit has for the tensor of a call."""
    name = getattr(getattr(inputs, "metadata", None), "name", None)
    return name if isinstance(name, str) else None
