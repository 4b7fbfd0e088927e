"""Products of a stack with factor matrices by the Triton kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._device import no_gpu
from ._triton_ranks import run
from ._triton_tables import interpreted, kernels

if TYPE_CHECKING:
    import torch

__all__ = ["outer", "serves", "task_sums"]


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels take a stack: on a GPU, float32."""
    if not x.is_cuda or str(x.dtype) != "torch.float32" or importlib.util.find_spec("triton") is None:
        return False
    return no_gpu() is None and not interpreted()


def outer(x: torch.Tensor, p: torch.Tensor, c: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """The product of x with p * c[owner], float32 (rows, width). Returns before the device is done.

    x : (rows, R), p : (R, width), c : (T, width), float32. ranks : of each task, R in all.
    """
    import torch

    module = kernels("mttkrp")
    rows, step, width = module.tile_sizes(interpreted())
    out = torch.empty((x.shape[0], p.shape[1]), dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    owner = torch.repeat_interleave(torch.arange(len(ranks), dtype=torch.int32), torch.tensor(list(ranks)))
    grid = (-(-x.shape[0] // rows), -(-p.shape[1] // width))
    arguments = (x.contiguous(), p.contiguous(), c.contiguous(), owner.to(x.device), out, *x.shape, p.shape[1])
    run(module.outer_kernel, grid, arguments, {"ROWS": rows, "STEP": step, "WIDTH": width})
    return out


def task_sums(p: torch.Tensor, s: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """The sums of p * s over the rows of each task, float64 (T, width). p, s : (R, width), float32."""
    import torch

    module = kernels("mttkrp")
    _, step, width = module.tile_sizes(interpreted())
    out = torch.empty((len(ranks), p.shape[1]), dtype=torch.float64, device=p.device)
    if not out.numel():
        return out
    ends = torch.tensor([0, *ranks], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(p.device)
    arguments = (p.contiguous(), s.contiguous(), ends, out, p.shape[1])
    run(module.task_kernel, (len(ranks), -(-p.shape[1] // width)), arguments, {"STEP": step, "WIDTH": width})
    return out
