"""`LoraModel.add_weighted_adapter`: PEFT makes the new adapter, the factors of all layers are computed together."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import MergeError
from .._hooks import NotServed
from ._config import put_right, refuse_lossy, tell_uncombined
from ._layers import Slot, common_device, module_in, slot_of
from ._products import Request, combined

if TYPE_CHECKING:
    from .._integration import Integration
    from ._options import Options

__all__ = ["Combining"]

_SVD = ("svd", "magnitude_prune_svd", "dare_linear_svd", "ties_svd", "dare_ties_svd")
_FACTORS = ("linear", "magnitude_prune", "dare_linear", "ties", "dare_ties")


@dataclass
class _Pending:
    """One call of add_weighted_adapter. names : of the modules, by identity. waiting : layers whose factors are due."""

    adapter: str
    names: Mapping[int, str]
    seed: int
    waiting: list[tuple[Request, Slot, Any]] = field(default_factory=list)


class Combining:
    """The three replaced methods.

    doubled : whether this PEFT applies alpha / r twice in the types that end in an SVD.
    """

    def __init__(self, state: Integration[Options], options: Options, doubled: bool) -> None:
        self._state = state
        self._options = options
        self._doubled = doubled
        self._told = False
        self._current = threading.local()
        name = "add_weighted_adapter"
        self.svd = state.served(f"{name}: types of deltas", self._svd, self._name_of_svd)
        self.factors = state.served(f"{name}: types of factors", self._factors, self._name_of_factors)

    def whole(self, original: Any) -> Any:
        """In place of `add_weighted_adapter`."""

        @functools.wraps(original)
        def add_weighted_adapter(
            model: Any,
            adapters: list[str],
            weights: list[float],
            adapter_name: str,
            combination_type: str = "svd",
            *args: Any,
            **kwargs: Any,
        ) -> None:
            if adapter_name in model.peft_config or self._pending is not None:
                if adapter_name in model.peft_config:
                    warnings.warn(f"PEFT leaves the adapter '{adapter_name}' as it is: the name is taken", stacklevel=2)
                original(model, adapters, weights, adapter_name, combination_type, *args, **kwargs)
                return
            if not self._options.exact:
                refuse_lossy(model, adapters, weights)
                tell_uncombined(model, adapters)
                _tell_ignored(adapters, combination_type, args, kwargs)
            # Its dictionary, since a module without the attribute looks for it at length.
            layers = {name: m for name, m in model.model.named_modules() if "lora_embedding_A" in m._modules}
            names = {id(module): name for name, module in layers.items()}
            pending = _Pending(adapter_name, names, self._seed(combination_type))
            self._current.pending = pending
            try:
                with _untouched_base(model, adapters, self._options.exact):
                    original(model, adapters, weights, adapter_name, combination_type, *args, **kwargs)
                _finish(pending)
                if not self._options.exact:
                    put_right(model, adapter_name, layers)
            except BaseException:
                # A name that is left behind would make the next call return without a word.
                if adapter_name in model.peft_config:
                    model.delete_adapter(adapter_name)
                raise
            finally:
                self._current.pending = None

        return add_weighted_adapter

    def beginning(self, original: Any) -> Any:
        """In place of `reset_parameters` of linear layers: the new adapter's factors, which are overwritten, begin as
        zeros; at large widths PEFT's random ones take longer than the combination. Other threads see no difference.
        """

        @functools.wraps(original)
        def reset_parameters(layer: Any) -> None:
            if self._pending is None or self._options.exact:
                original(layer)
                return
            for parameter in layer._parameters.values():
                if parameter is not None:
                    parameter.data.zero_()

        return reset_parameters

    @property
    def _pending(self) -> _Pending | None:
        return getattr(self._current, "pending", None)

    def _seed(self, combination_type: str) -> int:
        import torch

        if self._options.seed is not None or "dare" not in str(combination_type):
            return self._options.seed or 0
        return int(torch.randint(1 << 62, ()))

    def _svd(
        self,
        model: Any,
        combination_type: str,
        adapters: Sequence[str],
        weights: Sequence[float],
        new_rank: int,
        target: Any,
        target_lora_A: Any,
        target_lora_B: Any,
        density: float | None,
        majority_sign_method: str,
        clamp: float | None = None,
        full_matrices: bool = True,
        driver: str | None = None,
    ) -> tuple[Any, Any]:
        if combination_type not in _SVD:
            raise NotServed("an unknown type of combination")
        if clamp is not None:
            raise NotServed("svd_clamp, which depends on the signs of singular vectors")
        if self._doubled and self._options.exact:
            raise NotServed("this PEFT applies alpha / r twice")
        if self._options.exact and target_lora_A.ndim > 2 and type(target).__name__ != "Conv2d":
            raise NotServed("a convolution that PEFT does not combine")
        if self._doubled and not self._told:
            self._told = True
            warnings.warn(
                "this release of PEFT applies alpha / r twice in svd types of add_weighted_adapter; mergekernels "
                "applies it once (dialect='peft' leaves such calls to PEFT)",
                stacklevel=2,
            )
        kind = (combination_type, density, majority_sign_method)
        return self._asked(model, target, adapters, weights, kind, Slot(target_lora_A, target_lora_B), int(new_rank))

    def _factors(
        self,
        model: Any,
        combination_type: str,
        adapters: Sequence[str],
        weights: Sequence[float],
        target: Any,
        density: float | None,
        majority_sign_method: str,
    ) -> list[Any]:
        if combination_type not in _FACTORS:
            raise NotServed("an unknown type of combination")
        kind = (combination_type, density, majority_sign_method)
        return list(self._asked(model, target, adapters, weights, kind, None, None))

    def _asked(
        self,
        model: Any,
        target: Any,
        adapters: Sequence[str],
        weights: Sequence[float],
        kind: tuple[str, float | None, str],
        slot: Slot | None,
        rank: int | None,
    ) -> tuple[Any, Any]:
        """Note a layer down, and give PEFT what is there until its factors are computed."""
        pending = self._pending
        name = self._name(model, target)
        pairs = list(zip(adapters, map(float, weights), strict=False))
        held = [slot_of(target, adapter) for adapter, _ in pairs]
        modules = tuple(
            None if s is None else module_in(target, s, adapter, name)
            for s, (adapter, _) in zip(held, pairs, strict=True)
        )
        slots = [s for s in held if s is not None]
        if not slots:
            raise NotServed("no adapter has the layer")
        device = common_device(slots)
        if len({m.site.shape for m in modules if m is not None}) > 1:
            raise NotServed("factors of unequal shapes")
        if rank is None and len({s.rank for s in slots}) > 1:
            raise NotServed("factors of unequal ranks")
        if len(pairs) > 64 and kind[0] not in ("svd", "linear"):
            raise NotServed("more than 64 adapters")
        request = Request(
            *kind,
            name,
            tuple(adapter for adapter, _ in pairs),
            tuple(weight for _, weight in pairs),
            modules,
            rank,
            device,
            self._dtype(slots, svd=rank is not None),
        )
        if pending is None:  # somebody calls the private method itself
            result = combined([request], self._seed(kind[0]))[0]
            return _shaped(result[0], slot or slots[0]), _shaped(result[1], slot or slots[0], second=True)
        found = slot or slot_of(target, pending.adapter)
        assert found is not None
        pending.waiting.append((request, found, slots[0]))
        return found.a.data, found.b.data

    def _dtype(self, slots: Sequence[Slot], *, svd: bool) -> Any:
        """Of the new factors."""
        import torch

        dtypes = [s.a.dtype for s in slots]
        if not self._options.exact:
            return dtypes[0] if len(set(dtypes)) == 1 else torch.float32
        if not svd:
            return dtypes[0]
        return functools.reduce(torch.promote_types, dtypes, torch.float32)

    def _name(self, model: Any, target: Any) -> str:
        pending = self._pending
        if pending is not None:
            return pending.names.get(id(target), "")
        return next((name for name, module in model.model.named_modules() if module is target), "")

    def _name_of_svd(self, model: Any, *args: Any, **kwargs: Any) -> str | None:
        return self._name(model, kwargs.get("target", args[4] if len(args) > 4 else None)) or None

    def _name_of_factors(self, model: Any, *args: Any, **kwargs: Any) -> str | None:
        return self._name(model, kwargs.get("target", args[3] if len(args) > 3 else None)) or None


@contextmanager
def _untouched_base(model: Any, adapters: Sequence[str], exact: bool) -> Iterator[None]:
    """The new adapter gets the first one's config: without a way to begin that computes values (which are overwritten)
    or even changes the base's weights, as PiSSA does.
    """
    first = adapters[0] if adapters else ""
    config = model.peft_config.get(first)
    if exact or config is None:
        yield
        return
    blank = copy.copy(config)
    blank.init_lora_weights = False
    model.peft_config[first] = blank
    try:
        yield
    finally:
        model.peft_config[first] = config


def _finish(pending: _Pending) -> None:
    """Compute what waits, and put it where PEFT would have.

    Raises
    ------
    MergeError : naming the module.
    """
    try:
        results = combined([request for request, _, _ in pending.waiting], pending.seed)
    except MergeError:
        raise
    except Exception as error:
        raise MergeError(
            f"add_weighted_adapter failed in mergekernels: {type(error).__name__}: {error}",
            code="integration.failed",
            hint="disable() gives this call back to PEFT",
        ) from error
    for (_, slot, like), (a, b) in zip(pending.waiting, results, strict=True):
        _put(slot.a, _shaped(a, like))
        _put(slot.b, _shaped(b, like, second=True))


def _put(parameter: Any, values: Any) -> None:
    """Into the memory that PEFT has given the parameter, or into memory of its own."""
    if parameter.shape == values.shape and parameter.dtype == values.dtype:
        parameter.data.copy_(values)
    else:
        parameter.data = values.clone()


def _shaped(matrix: Any, like: Slot, *, second: bool = False) -> Any:
    """A matrix in the form of a layer's parameter, which has more dimensions in a convolution."""
    if second:
        return matrix.reshape(*matrix.shape, *(1 for _ in like.b.shape[2:]))
    return matrix.reshape(matrix.shape[0], *like.a.shape[1:])


def _tell_ignored(
    adapters: Sequence[str], combination_type: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """PEFT combines a single adapter by type linear, whatever is asked for."""
    if len(adapters) != 1 or combination_type in ("linear", "cat"):
        return
    places = {"svd_rank": 0, "density": 4}
    given = [n for n, i in places.items() if kwargs.get(n, args[i] if i < len(args) else None) is not None]
    if given:
        warnings.warn(
            f"PEFT combines a single adapter by type linear: {' and '.join(given)} of type {combination_type} are "
            "ignored; mergekernels.merge_adapters obeys them",
            stacklevel=3,
        )
