"""From pairs of stored tensors to modules: checks that need no data, shared by all kinds of file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...adapters.model import Module
from ...errors import InputError, MergeError, PlanError, nearest
from ...tensors import promote
from .sites import Kind, site_of
from .stored import Stored

if TYPE_CHECKING:
    import torch

__all__ = ["Pair", "build_module", "check_pair", "locate", "raise_all", "some"]

_MAX_DIMS = 5


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of a module as stored: calling it loads (b, a) as matrices."""

    b: Stored
    a: Stored

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, a), (out, r) and (r, in), in the stored dtype."""
        b, a = self.b(), self.a()
        return b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)


_TIED = "The base may tie its head to the embeddings: an adapter of the head alone cannot be merged into it"


def check_pair(module: str, pair: Pair, kind: str, where: str) -> None:
    """Refuses factors that are no pair.

    Raises
    ------
    InputError : not float; not matrices (convolutions: 3 to 5 dimensions); empty; inner dimensions that differ.
    """
    a, b = pair.a, pair.b
    for tensor in (a, b):
        if not tensor.dtype.is_float:
            raise _bad("factor", module, tensor, where, "bfloat16, float16, float32 or float64", str(tensor.dtype))
        most = 2 if kind == "embedding" else _MAX_DIMS
        if not 2 <= len(tensor.shape) <= most:
            expected = "2 dimensions" if most == 2 else "2 dimensions, or 3 to 5 for a convolution"
            raise _bad("factor", module, tensor, where, expected, f"shape {list(tensor.shape)}", _GATHER)
        if 0 in tensor.shape:
            raise _bad("factor", module, tensor, where, "rank 1 or more", f"shape {list(tensor.shape)}", _GATHER)
    rank = a.shape[0]
    if b.shape[1] != rank or len(a.shape) != len(b.shape) or any(n != 1 for n in b.shape[2:]):
        expected = f"B of shape [out, {rank}{', 1' * (len(a.shape) - 2)}] beside A {list(a.shape)}"
        hint = "A convolution with groups cannot be merged" if len(a.shape) > 2 else None
        raise _bad("the ranks of A and B differ:", module, b, where, expected, f"B {list(b.shape)}", hint)


_GATHER = "A sharded run that was saved without gathering leaves such tensors"


def _bad(
    what: str, module: str, tensor: Stored, where: str, expected: str, got: str, hint: str | None = None
) -> InputError:
    message = f"{what} of module '{module}' is unusable" if what == "factor" else f"{what} module '{module}'"
    return InputError(
        message, code="adapter.factors", file=where, tensor=tensor.name, expected=expected, got=got, hint=hint
    )


def build_module(
    module: str,
    kind: Kind,
    pair: Pair,
    scaling: tuple[float, float],
    base: tuple[int, ...] | None,
    where: str,
) -> Module:
    """A module from a checked pair.

    scaling : (alpha, scale). base : shape of the base's weight, None if there is no base.
    """
    a, b = pair.a, pair.b
    if kind == "linear" and len(a.shape) > 2:
        kind = "conv"
    site = site_of(module, kind, a.shape, b.shape, base, where)
    dtype = a.dtype if a.dtype is b.dtype else promote([a.dtype, b.dtype])
    return Module(site, a.shape[0], scaling[0], scaling[1], dtype.name, pair)


def locate(module: str, shapes: Mapping[str, tuple[int, ...]] | None, where: str) -> tuple[int, ...] | None:
    """Shape of the module's weight in the base; None without a base.

    Raises
    ------
    InputError : the base has no such weight.
    """
    if shapes is None:
        return None
    name = f"{module}.weight"
    if name not in shapes:
        raise InputError(
            "the base has no such tensor, but the adapter changes it",
            code="adapter.target-missing",
            file=where,
            tensor=name,
            hint=_TIED if module.rpartition(".")[2] == "lm_head" else nearest(name, shapes),
        )
    return shapes[name]


def raise_all(problems: Iterable[MergeError]) -> None:
    """Raises nothing, the one problem, or all of them together."""
    found = list(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        raise PlanError(found)


def some(names: Sequence[str], most: int = 5) -> str:
    """Names for a sentence, the first few of many."""
    shown = ", ".join(f"'{n}'" for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
