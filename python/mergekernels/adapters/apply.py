"""Adapters folded into their base: a checkpoint, in one pass over the base and with one rounding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, InputError

if TYPE_CHECKING:
    from ..engine.events import ProgressSink, RunReport
    from ..engine.resolved import ResolvedMerge

__all__ = ["apply_adapters"]

_MOST = 64


def apply_adapters(
    base: str | PathLike[str],
    adapters: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    weights: float | Sequence[float] | None = None,
    out_dtype: str | None = None,
    backend: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: str | int | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    progress: ProgressSink | None = None,
) -> RunReport:
    """Write base + w1 B1 A1 + ... + wN BN AN as a checkpoint; every product has its adapter's scale.

    A run of the recipe ``task_arithmetic`` over the models ``base+adapter``: the base is read once, products are made
    tile by tile and added in float32 (float64 if an input is), and each value is rounded once. OUT is absent or
    complete, a killed call is resumed by the same call, and `verify` checks the result. Tensors that an adapter
    replaces (modules_to_save) become base + w (theirs - base); two adapters that replace the same are refused.

    Parameters
    ----------
    base : checkpoint folder or file, or org/name in the hub cache. adapters : 1 to 64 of its adapters, as files.
    weights : one number, or one per adapter; default 1. Negative ones and 0 are allowed.
    out_dtype : of the result ("bfloat16"); default that of the base's tensors.
    The other arguments are those of `mergekernels.engine.run.run`.

    Raises
    ------
    ArgumentError : no adapters or too many, or weights that do not fit. PlanError, InputError, FormatError, DataError,
    OutputError, BackendError : as from a run.
    """
    from ..engine.run import SHARD_SIZE, run

    merge = _resolved(os.fspath(base), [os.fspath(a) for a in adapters], weights, out_dtype)
    _refuse_doubled(merge)
    return run(
        merge,
        out,
        backend=backend,
        device=device,
        threads=threads,
        memory=memory,
        overwrite=overwrite,
        shard_size=SHARD_SIZE if shard_size is None else shard_size,
        progress=progress,
    )


def _resolved(base: str, adapters: list[str], weights: Any, out_dtype: str | None) -> ResolvedMerge:
    from ..engine.recipe import load_recipe, resolve

    if not 1 <= len(adapters) <= _MOST:
        raise ArgumentError(
            "another number of adapters can be applied at once",
            code="adapters.count",
            expected=f"1 to {_MOST}",
            got=str(len(adapters)),
            hint="Merge them first: `mergekernels lora merge cat` keeps the sum exactly." if adapters else None,
        )
    given = [1.0 if weights is None else weights] * len(adapters) if not _listed(weights) else list(weights)
    if len(given) != len(adapters):
        raise ArgumentError(
            "weights do not fit the adapters",
            code="parameter.count",
            expected=f"one number, or {len(adapters)}",
            got=str(len(given)),
        )
    models = [
        {"model": {"model": base, "lora": adapter}, "parameters": {"weight": w}}
        for adapter, w in zip(adapters, given, strict=True)
    ]
    recipe: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": base, "models": models}
    kept = out_dtype or _common_dtype(base)
    if kept is not None:
        recipe["out_dtype"] = kept
    return resolve(load_recipe(recipe, collect=True))


def _listed(weights: Any) -> bool:
    return isinstance(weights, (list, tuple))


def _common_dtype(base: str) -> str | None:
    """The dtype that all floating tensors of a base have, which a replaced tensor of the adapter's must not widen."""
    from ..engine.recipe.inputs import Inputs
    from ..engine.recipe.source import Document
    from ..engine.recipe.values import Reference

    inputs = Inputs(Document({}))
    position = inputs.add(Reference(base), ())
    if position is None:
        return None  # what is wrong with it is said with everything else
    found = {t.dtype.torch for t in inputs.checkpoints[position].tensors.values() if t.dtype.is_float}
    return found.pop() if len(found) == 1 else None


def _refuse_doubled(merge: ResolvedMerge) -> None:
    from ..engine.adapted import AdaptedCheckpoint

    owners: dict[str, str] = {}
    for checkpoint in merge.inputs:
        if not isinstance(checkpoint, AdaptedCheckpoint):
            continue
        for name in sorted(checkpoint.replaced):
            if name in owners:
                raise InputError(
                    f"two adapters replace the tensor: '{owners[name]}' and '{checkpoint.adapter.label}'",
                    code="adapters.replaced",
                    tensor=name,
                    expected="modules_to_save of one adapter at most",
                )
            owners[name] = checkpoint.adapter.label
