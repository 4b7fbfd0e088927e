"""FusionBench's functions on tensors, one tensor at a time, as its algorithms call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ...merging import merge
from .._hooks import NotServed
from .._plain import check_alike, check_plain
from .arithmetic import matrix, ties_of_vectors, wide

if TYPE_CHECKING:
    import torch

__all__ = ["iso_c_tensor", "iso_cts_tensor", "regmean_parameter", "regmean_tensor", "ties_merging", "tsv_m_tensor"]


SMALLEST_SIDE = 256
"""Matrices with a smaller side are the tool's: LAPACK decomposes them about as fast."""


def ties_merging(flat_task_checks: Any, reset_thresh: float | None = None, merge_func: str = "") -> torch.Tensor:
    """TIES of the rows of a matrix of flattened task vectors."""
    rows = check_plain(flat_task_checks)
    if rows.dim() != 2 or not rows.shape[0] or rows.shape[0] > 64:
        raise NotServed("no matrix of 1 to 64 rows")
    share = reset_thresh / 100 if reset_thresh is not None and reset_thresh > 1 else reset_thresh
    if share is None or not 0.0 <= share < 1.0 or int(rows.shape[1] * share) >= rows.shape[1]:
        raise NotServed("a threshold that keeps everything or nothing")
    if str(merge_func).split("-")[-1] not in ("sum", "mean", "max"):
        raise NotServed("an unknown merge_func")
    return ties_of_vectors(list(rows.unbind(0)), share, merge_func)


def tsv_m_tensor(vectors: Sequence[Any], key: str, options: Mapping[str, Any]) -> torch.Tensor:
    """One tensor of `compute_and_sum_svd_mem_reduction`."""
    tensors = check_alike(vectors)
    if _is_plain(tensors, key, options):
        return _mean(tensors, key)
    q, count = min(tensors[0].shape), len(tensors)
    if q < count:
        return tensors[0].new_zeros(tensors[0].shape)  # not one direction per task
    _check_size(tensors[0])
    result, report = matrix("tsv_m", _moved(tensors, options), key, conv="mean", experts="")
    sizes = report.get("k", [])
    full = len(sizes) == count and min(sizes) == q // count and report.get("rank", q) >= sum(sizes)
    if count > 1 and not full and any(bool(t.any()) for t in tensors):
        raise NotServed("task vectors of too low a rank")
    return result.to(tensors[0].device)


def iso_c_tensor(vectors: Sequence[Any], key: str, options: Mapping[str, Any]) -> torch.Tensor:
    """One tensor of `iso_c`."""
    tensors = check_alike(vectors)
    if _is_plain(tensors, key, options):
        return _mean(tensors, key)
    _check_size(tensors[0])
    result, report = matrix("iso_c", _moved(tensors, options), key, conv="mean", experts="")
    if 0 < report.get("rank", 0) < min(tensors[0].shape):
        raise NotServed("task vectors of too low a rank")
    return result.to(tensors[0].device)


def iso_cts_tensor(vectors: Sequence[Any], key: str, options: Mapping[str, Any]) -> torch.Tensor:
    """One tensor of `iso_cts`."""
    tensors = check_alike(vectors)
    if _is_plain(tensors, key, options):
        return _mean(tensors, key)
    _check_size(tensors[0])
    fraction = float(options["common_space_fraction"])
    if not 0.0 <= fraction <= 1.0:
        raise NotServed("a common space larger than the space")
    params = {"common_space_fraction": fraction, "conv": "mean", "experts": ""}
    result, report = matrix("iso_cts", _moved(tensors, options), key, **params)
    if any(bool(t.any()) for t in tensors) and report.get("rank", 0) < min(tensors[0].shape):
        raise NotServed("task vectors of too low a rank")
    return result.to(tensors[0].device)


def regmean_tensor(
    values: Sequence[Any], grams: Sequence[Mapping[str, Any]], key: str, ratio: float, transposed: bool
) -> torch.Tensor:
    """One parameter of `merging_with_regmean_weights`; what `regmean_parameter` refuses is the tool's."""
    tensors = check_alike(values)
    module = key.removesuffix(".weight")
    if key.endswith(".weight") and module in grams[0]:
        if not 0.0 <= ratio <= 1.0:
            raise NotServed("a ratio outside [0, 1]")
        check_alike([g[module] for g in grams])
    try:
        return regmean_parameter(tensors, grams, key, ratio, transposed)
    except DataError as error:
        raise NotServed(_REASONS.get(error.code, "values that are not finite")) from error


def regmean_parameter(
    values: Sequence[torch.Tensor],
    grams: Sequence[Mapping[str, torch.Tensor]],
    key: str,
    ratio: float,
    transposed: bool,
) -> torch.Tensor:
    """A merged parameter: by the Grams of its layer's inputs if there are any, else the mean.

    ratio : what Grams are multiplied by off the diagonal. transposed : the weight is (out, in), as of a linear layer.
    """
    module = key.removesuffix(".weight")
    if not key.endswith(".weight") or module not in grams[0]:
        return _mean(list(values), key)
    weights = [v if transposed else v.T for v in values]
    own = [g[module].to(weights[0].device) for g in grams]
    result: torch.Tensor = merge(weights, "regmean", gram=own, alpha=ratio, name=key, out_dtype=wide(weights[0]))
    result = result.to(weights[0].dtype)
    return result if transposed else result.T


_REASONS = {
    "gram.singular": "a sum of Grams that is singular",
    "gram.symmetric": "a Gram that is not symmetric",
}


def _is_plain(tensors: Sequence[torch.Tensor], key: str, options: Mapping[str, Any]) -> bool:
    """Whether FusionBench takes the mean."""
    return tensors[0].dim() != 2 or not tensors[0].numel() or key in (options.get("exclude_keys") or ())


def _check_size(tensor: torch.Tensor) -> None:
    if min(tensor.shape) < SMALLEST_SIDE:
        raise NotServed("a matrix too small to gain")


def _mean(tensors: Sequence[torch.Tensor], key: str) -> torch.Tensor:
    result: torch.Tensor = merge(list(tensors), "linear", weights=1.0, name=key, nan="propagate")
    return result


def _moved(tensors: Sequence[torch.Tensor], options: Mapping[str, Any]) -> list[torch.Tensor]:
    device = options.get("accelerator")
    return [t if device is None else t.to(device) for t in tensors]
