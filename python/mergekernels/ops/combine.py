"""Differentiable merging: learned coefficients (AdaMerging, aTLAS) and learned masks (Concrete).

Experts are frozen: gradients flow to coefficients and logits alone. Forward and backward each read the inputs once or
twice and hold no temporaries of the tensors' size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._checks import check_tensor
from .._native import torch_dtype
from ..errors import ArgumentError
from ..tensors import DType, promote
from .arguments import check_integer, check_range, in_compute
from .inputs import Inputs, gather
from .learned import MAX_GROUPS, Relaxed, SegDot, step_seed
from .output import check_out_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["combine", "concrete", "seg_dot"]


def seg_dot(
    gradient: torch.Tensor,
    models: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    groups: int = 1,
    seed: int = 0,
    backend: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """The dot products of a gradient with the task vectors: the gradient of `combine`'s coefficients.

    Parameters
    ----------
    gradient, models, base : tensors of one shape and device, bfloat16 to float64; deltas are models - base, or the
        models without a base, in float64 if one of all these is, else in float32.
    groups : 1 to 256; above 1 the elements are dealt to that many random groups, the same for every tensor of the
        shape. seed : 64 bits, of the groups.
    backend, threads : see `mergekernels.merge`.

    Returns
    -------
    float64 [models], or [models, groups] for groups > 1, on the gradient's device. The same bits on every backend.

    Raises
    ------
    ArgumentError, BackendError
    """
    check_integer(groups, 1, MAX_GROUPS + 1, "groups")
    check_integer(seed, 0, 1 << 64, "seed")
    import torch

    from ._autograd import Passes, shape_id

    inputs = _gather(models, base, "")
    request = SegDot(groups, seed, shape_id(inputs.shape))
    dots = Passes(inputs, backend, threads).dots(request, gradient, None)
    found = torch.tensor(dots, dtype=torch.float64, device=gradient.device).reshape(inputs.num_models, groups)
    return found[:, 0] if groups == 1 else found


def combine(
    models: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Merge with learned coefficients: y = base + sum of c_t (models[t] - base), differentiable in the c_t.

    Parameters
    ----------
    models, base : frozen tensors of one shape and device; without a base y = sum of c_t models[t].
    coefficients : float tensor [models], or [models, groups] for a coefficient per random group (aTLAS): the element
        with flat index g is in the group that Philox (purpose 3, the tensor id of its shape written as "64x32") deals
        it, the same for every tensor of the shape. A clamp is the caller's: torch.clamp gives saturated coefficients
        the gradient 0.
    seed : 64 bits, of the groups. out_dtype : default the promoted dtype of models and base.
    backend, threads : see `mergekernels.merge`.

    Returns
    -------
    The merged tensor; NaN and Inf in the inputs pass through. Its gradient with respect to the coefficients is
    `seg_dot`, computed in float64 and rounded to their dtype.

    Raises
    ------
    ArgumentError : also for a model or base that requires a gradient, which would be dropped. BackendError.

    Source: Yang et al. 2024, AdaMerging, arXiv 2310.02575; Zhang et al. 2024, aTLAS, arXiv 2407.02880.
    """
    from ._autograd import Combine, Passes

    inputs = _gather(models, base, "")
    check_integer(seed, 0, 1 << 64, "seed")
    groups = _check_coefficients(coefficients, inputs, grouped=True)
    dtype = _out_dtype(inputs, out_dtype)
    passes = Passes(inputs, backend, threads)
    result: torch.Tensor = Combine.apply(coefficients, inputs, groups, seed, dtype, passes)  # type: ignore[no-untyped-call]
    return result


def concrete(
    models: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    logits: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    temperature: float = 0.5,
    name: str = "",
    seed: int = 0,
    step: int = 0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Merge inside one relaxed mask that all models share: y = base + m / mean(m) * sum of c_t (models[t] - base).

    m = sigmoid((logits + log u - log(1 - u)) / temperature) with a uniform draw u per element; the mean is over the
    tensor. Differentiable in the coefficients and the logits.

    Parameters
    ----------
    models, base : frozen tensors of one shape and device. coefficients : float tensor [models]. logits : float tensor
        of the models' shape.
    temperature : above 0, also once rounded to the arithmetic's dtype. name, seed, step : of the draw; the same three
        give the same mask.
    out_dtype, backend, threads : as in `combine`.

    Returns
    -------
    The merged tensor. A mask that is zero everywhere gives the base and gradients of zero.

    Raises
    ------
    ArgumentError, BackendError

    Source: Tang et al. 2023, Concrete subspace learning, arXiv 2312.06173; tanganke/subspace_fusion.
    """
    import torch

    from ._autograd import Concrete, Passes

    inputs = _gather(models, base, name)
    _check_coefficients(coefficients, inputs, grouped=False)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.shape != inputs.shape:
        raise ArgumentError(
            "logits are not usable",
            code="logits",
            tensor=name or None,
            expected=f"a float tensor of shape {inputs.shape}",
            got=str(tuple(logits.shape)) if isinstance(logits, torch.Tensor) else type(logits).__name__,
        )
    check_integer(seed, 0, 1 << 64, "seed")
    check_integer(step, 0, 1 << 64, "step")
    mask = Relaxed(temperature, step_seed(seed, step), inputs.tensor)
    dtype = _out_dtype(inputs, out_dtype)
    passes = Passes(inputs, backend, threads, logits)
    _check_temperature(mask.temperature, passes.compute, name)
    result: torch.Tensor = Concrete.apply(coefficients, logits, inputs, mask, dtype, passes)  # type: ignore[no-untyped-call]
    return result


def _gather(models: Sequence[torch.Tensor], base: torch.Tensor | None, name: str) -> Inputs:
    inputs = gather(models, base, name, 0)
    if inputs.sharded:
        raise ArgumentError("this op takes whole tensors", code="inputs", expected="tensors", got="lists of shards")
    if any(t.requires_grad for t in (*models, *([] if base is None else [base]))):
        raise ArgumentError(
            "models and base are frozen here, and one of them requires a gradient",
            code="inputs.grad",
            tensor=name or None,
            expected="tensors without requires_grad",
            hint="Detach them.",
        )
    return inputs


def _check_coefficients(coefficients: Any, inputs: Inputs, *, grouped: bool) -> int:
    """The number of groups."""
    import torch

    expected = f"a float tensor [{inputs.num_models}]" + (f" or [{inputs.num_models}, groups]" if grouped else "")
    usable = isinstance(coefficients, torch.Tensor) and coefficients.is_floating_point()
    if not usable or coefficients.dim() not in ((1, 2) if grouped else (1,)):
        got = f"{tuple(coefficients.shape)}" if isinstance(coefficients, torch.Tensor) else type(coefficients).__name__
        raise ArgumentError("coefficients are not usable", code="coefficients", expected=expected, got=got)
    groups = coefficients.shape[1] if coefficients.dim() == 2 else 1
    if coefficients.shape[0] != inputs.num_models or not 1 <= groups <= MAX_GROUPS:
        raise ArgumentError(
            "coefficients are not usable",
            code="coefficients",
            expected=expected + (f", at most {MAX_GROUPS} groups" if grouped else ""),
            got=str(tuple(coefficients.shape)),
        )
    check_tensor(coefficients, "the tensor of coefficients", inputs.name)
    return int(groups)


def _check_temperature(temperature: float, compute: DType, name: str) -> None:
    """Refuse one that the compute dtype turns into 0 or infinity."""
    check_range((temperature,), compute, "temperature", name)
    if in_compute(temperature, compute) == 0:
        raise ArgumentError(
            f"temperature is too small for {compute}, in which these tensors are merged",
            code="temperature",
            tensor=name or None,
            expected="a number that does not round to 0",
            got=repr(temperature),
        )


def _out_dtype(inputs: Inputs, asked: torch.dtype | None) -> torch.dtype:
    dtype = asked or torch_dtype(promote([v.dtype for v in inputs.all_views]))
    check_out_dtype(dtype, inputs.name)
    return dtype
