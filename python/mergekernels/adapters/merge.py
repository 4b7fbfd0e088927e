"""Merging adapters of one base: `merge_adapters`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from .cutting import cut_all
from .merged import MergedAdapter
from .opening import AdapterInput, open_job
from .result import asked_dtype, assemble, common_dtype
from .saving import check_target

if TYPE_CHECKING:
    import torch

    from ..formats.adapters import Base

__all__ = ["merge_adapters"]


def merge_adapters(
    adapters: Iterable[AdapterInput],
    method: str,
    *,
    weights: Any = None,
    rank: int | None = None,
    energy: float | None = None,
    base: Base | None = None,
    out: str | PathLike[str] | None = None,
    dialect: str = "default",
    seed: int = 0,
    spread: Literal["b", "sqrt", "a"] = "b",
    out_dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **params: Any,
) -> MergedAdapter:
    """Merge LoRA adapters of one base into one adapter.

    Modules are merged one by one: memory is bounded by one module of the adapters (of a chunk of them where the method
    sums; modules of up to 128 MiB of factors where it merges many together, as tc_lora), some modules that are
    truncated together, and the result.

    Parameters
    ----------
    adapters : one or more: PEFT folders, kohya and diffusers files, mappings of tensors, pairs (mapping, config), or
        results of a merge. Ranks, alphas, rsLoRA and patterns may differ; a module that one lacks counts as a zero
        delta. Inputs are not changed.
    method : a name from `mergekernels.methods("adapters")`: "svd", "cat", "linear", "ties_svd", ...
    weights : one number, or one per adapter; negative ones and 0 are allowed. Default 1.
    rank : most rows of lora_A per module, 1 or more; a module whose merged delta or weight has less gets less.
    energy : instead of a rank, the least rank that keeps this share of each merged delta's sum of squares, in (0, 1].
        Without both, the method decides: svd and all methods with dense results take the largest rank among the
        adapters, the others keep what they give.
    base : checkpoint folder or file, or a mapping from name to tensor or shape: names and shapes of all targets are
        checked against it. No tensor data is read.
    out : folder to write the result to, as PEFT does; it must not exist.
    dialect : variant of the method. seed : of everything random, 64 bits.
    spread : where a truncation puts the singular values: "b" (lora_B, as PEFT), "sqrt" (both) or "a".
    out_dtype : of the factors: "float32", "bfloat16", "float16", "float64" or torch's; default the adapters' common
        dtype, float32 if they differ. Everything is computed in float32 (float64 for such inputs) and rounded once.
    device : where to compute; the result comes back to the CPU.
    params : the method's own parameters (density=0.2, scale=0.5), one value, or one per adapter where it says so.

    Returns
    -------
    The adapter, alpha = rank and scale 1, with a report: per module rank, kept energy, route, warnings.

    Raises
    ------
    ArgumentError, InputError, FormatError, PlanError : before any factor is read.
    DataError : NaN or Inf in a factor, naming adapter and module, or a result beyond `out_dtype`.
    OutputError : `out` exists, or writing failed.
    """
    started = time.perf_counter()
    asked = asked_dtype(out_dtype)
    if out is not None:
        check_target(out)
    job, limits = open_job(adapters, method, weights, rank, energy, base, dialect, seed, spread, device, params)
    result = assemble(job, limits, asked or common_dtype(job.adapters), cut_all(job, limits), started)
    if out is not None:
        result.save(out)
    return result
