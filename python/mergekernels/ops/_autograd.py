"""The passes behind `mergekernels.ops.combine` and `concrete`, and their place in torch's automatic differentiation.

Imported where it is used: importing torch takes a second, and merging checkpoints on the CPU does without.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.function import once_differentiable

from .. import _cpu
from .._backends.dispatch import LearnedBackend, pick, requested, require
from .._checks import check_tensor
from .._native import view_of
from ..errors import ArgumentError
from ..tensors import Piece, TensorView, compute_dtype, dtype_of, tensor_id
from .arguments import check_range
from .inputs import Inputs, num_threads
from .learned import MaskMerge, Relaxed, SegDot
from .program import Program, Table
from .stream import run_program

if TYPE_CHECKING:
    from .._cpu import BlockSums

__all__ = ["Combine", "Concrete", "Passes", "shape_id"]


class Passes:
    """The passes over one set of inputs by one backend."""

    def __init__(
        self, inputs: Inputs, backend: str | None, threads: int | None, logits: torch.Tensor | None = None
    ) -> None:
        self.inputs = inputs
        self.request = requested(backend)
        self.threads = num_threads(threads)
        self.base, self.models = inputs.views(0)
        views = [*inputs.all_views] + ([] if logits is None else [self._logits(logits)])
        self.compute = compute_dtype([v.dtype for v in views])
        self.piece = Piece.flat(0, inputs.n)

    def run(self, program: Program, out: torch.Tensor) -> None:
        """The element-wise pass."""
        _, backend = pick("stream", self.inputs.all_views, self.request)
        run_program(program, self.inputs, [out], backend, self.threads, "propagate")

    def backend(self, op: str, feature: str, views: Sequence[TensorView]) -> LearnedBackend:
        """The backend for an op on the inputs and further views."""
        _, backend = pick(op, [*self.inputs.all_views, *views], self.request)
        require(backend, frozenset({feature}))
        return cast(LearnedBackend, backend)

    def dots(self, request: SegDot, gradient: torch.Tensor, logits: torch.Tensor | None) -> list[float]:
        """The sums of `SegDot`, slot by slot."""
        if not isinstance(gradient, torch.Tensor) or gradient.shape != self.inputs.shape:
            raise ArgumentError(
                "gradient is not usable",
                code="gradient",
                expected=f"a float tensor of shape {self.inputs.shape}",
                got=str(tuple(gradient.shape)) if isinstance(gradient, torch.Tensor) else type(gradient).__name__,
            )
        dtype = dtype_of(str(gradient.dtype).removeprefix("torch."))
        if dtype is None or not dtype.is_float:
            raise ArgumentError(
                "gradient is not usable",
                code="gradient",
                expected="bfloat16, float16, float32 or float64",
                got=str(gradient.dtype),
            )
        slope = self._gradient(gradient)
        z = None if logits is None else self._logits(logits)
        # A mask is the one of the merge; without one nothing needs the gradient rounded to the merge's arithmetic.
        compute = (
            self.compute
            if request.mask is not None
            else compute_dtype([*(v.dtype for v in self.inputs.all_views), slope.dtype])
        )
        backend = self.backend("seg_dot", "seg_dot", [slope] if z is None else [slope, z])
        sums = _cpu.BlockSums(self.inputs.num_models * request.groups, 1, self.inputs.n)
        if self.inputs.n:
            backend.seg_dot(
                request, sums, self.piece, self.base, self.models, slope, z, compute=compute, threads=self.threads
            )
        return _fold(sums)

    def mask_mean(self, mask: Relaxed, logits: torch.Tensor) -> float:
        """The mean of the mask."""
        z = self._logits(logits)
        backend = self.backend("mask_sum", "concrete", [z])
        sums = _cpu.BlockSums(1, 1, self.inputs.n)
        if not self.inputs.n:
            return 0.0
        backend.mask_sum(mask, sums, self.piece, z, compute=self.compute, threads=self.threads)
        return _fold(sums)[0] / self.inputs.n

    def masked(
        self, request: MaskMerge, gradient: torch.Tensor | None, logits: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Merge inside the mask, or the gradient of the logits, into `out`."""
        slope = None if gradient is None else self._gradient(gradient)
        z = self._logits(logits)
        backend = self.backend("mask_merge", "concrete", [z] if slope is None else [z, slope])
        if self.inputs.n:
            backend.mask_merge(
                request,
                self.piece,
                self.base,
                self.models,
                slope,
                z,
                view_of(out),
                compute=self.compute,
                threads=self.threads,
            )
        return out

    def _logits(self, logits: torch.Tensor) -> TensorView:
        return view_of(check_tensor(logits, "the tensor of logits", self.inputs.name))

    def _gradient(self, gradient: torch.Tensor) -> TensorView:
        return view_of(check_tensor(gradient, "the gradient", self.inputs.name).contiguous())


class Combine(torch.autograd.Function):
    """`combine` forward, `seg_dot` backward."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: torch.Tensor, inputs: Inputs, groups: int, seed: int, dtype: torch.dtype, passes: Passes
    ) -> torch.Tensor:
        numbers = coefficients.detach().double()
        keep = (None,) * inputs.num_models
        request = SegDot(groups, seed, shape_id(inputs.shape))
        if coefficients.dim() == 1:
            program = Program(tuple(_finite(numbers.tolist())), keep, base=inputs.has_base)
            check_range(program.weights, inputs.compute, "coefficients")
        else:
            check_range(numbers.reshape(-1).tolist(), inputs.compute, "coefficients")
            table = Table("groups", groups, _doubles(numbers), request.tensor)
            program = Program((1.0,) * inputs.num_models, keep, base=inputs.has_base, table=table, seed=seed)
        ctx.save_for_backward(coefficients, *inputs.tensors[0])
        ctx.request, ctx.passes = request, passes
        first = inputs.tensors[0][0]
        out = torch.empty(first.shape, dtype=dtype, device=first.device)
        passes.run(program, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        coefficients = ctx.saved_tensors[0]  # also where the models were changed in place, which it refuses
        dots = ctx.passes.dots(ctx.request, gradients[0], None)
        found = torch.tensor(dots, dtype=torch.float64).reshape(coefficients.shape)
        return found.to(coefficients), None, None, None, None, None


class Concrete(torch.autograd.Function):
    """`concrete` forward; backward one pass for the dot products and, where logits learn, one for theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: torch.Tensor,
        logits: torch.Tensor,
        inputs: Inputs,
        mask: Relaxed,
        dtype: torch.dtype,
        passes: Passes,
    ) -> torch.Tensor:
        mean = passes.mask_mean(mask, logits)
        mask = Relaxed(mask.temperature, mask.seed, mask.tensor, mean)
        weights = tuple(_finite(coefficients.detach().double().tolist()))
        check_range(weights, passes.compute, "coefficients")
        ctx.save_for_backward(coefficients, logits, *inputs.tensors[0])
        ctx.request, ctx.passes = MaskMerge(weights, mask), passes
        first = inputs.tensors[0][0]
        out = torch.empty(first.shape, dtype=dtype, device=first.device)
        return passes.masked(ctx.request, None, logits, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        coefficients, logits = ctx.saved_tensors[:2]
        request, passes, gradient = ctx.request, ctx.passes, gradients[0]
        dots = passes.dots(SegDot(mask=request.mask), gradient, logits)
        slope = None
        if ctx.needs_input_grad[1]:
            # The mean of g s m^ over the tensor is the coefficients' own dot products once more.
            terms = [w * d for w, d in zip(request.weights, dots, strict=True)]
            total = math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan
            wanted = MaskMerge(request.weights, request.mask, total / max(1, passes.inputs.n))
            slope = passes.masked(wanted, gradient, logits, torch.empty_like(logits))
        found = torch.tensor(dots, dtype=torch.float64).to(coefficients)
        return found, slope, None, None, None, None


def _finite(values: list[float]) -> list[float]:
    if not all(map(math.isfinite, values)):
        raise ArgumentError(
            "coefficients are not usable", code="coefficients", expected="finite numbers", got=str(values)[:80]
        )
    return values


def _doubles(numbers: torch.Tensor) -> array[float]:
    return array("d", _finite(numbers.reshape(-1).tolist()))


def shape_id(shape: tuple[int, ...]) -> int:
    """The tensor id of a shape, so that tensors of one shape have the same groups."""
    return tensor_id("x".join(map(str, shape)))


def _fold(sums: BlockSums) -> list[float]:
    found = array("d")
    for slot in range(sums.num_slots):
        found.frombytes(sums.fold(slot))
    return list(found)
