"""Tiles of products of factors by the Triton kernel: all products of a box in one launch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._device import no_gpu
from ._triton_ranks import run
from ._triton_tables import interpreted, kernels

if TYPE_CHECKING:
    import torch

__all__ = ["factor_tiles", "serves"]


def serves(b: torch.Tensor, ranks: Sequence[int]) -> bool:
    """Whether tiles of factors with these ranks come from the kernel: on a GPU, float32, up to rank 64."""
    if (
        not b.is_cuda
        or str(b.dtype) != "torch.float32"
        or importlib.util.find_spec("triton") is None
        or no_gpu() is not None
        or interpreted()
    ):
        return False
    return max(ranks, default=0) <= int(kernels("factors").LONGEST)


def factor_tiles(
    b: torch.Tensor, a: torch.Tensor, ends: Sequence[int], rows: tuple[int, int], cols: tuple[int, int]
) -> torch.Tensor:
    """The box of every product: float32 [products, rows, columns]. Returns before the device is done.

    b : (total rank, m), the left factors transposed; a : (total rank, n); both float32. ends : 0, then where
    each product's part ends. Every product and sum is rounded to float32, in the order of the ranks.
    """
    import torch

    module = kernels("factors")
    height, width = module.tile_size(interpreted())
    shape = (len(ends) - 1, rows[1] - rows[0], cols[1] - cols[0])
    out = torch.empty(shape, dtype=torch.float32, device=b.device)
    if not out.numel():
        return out
    header = [rows[0], shape[1], cols[0], shape[2], b.shape[1], a.shape[1]]
    table = torch.tensor([*header, *ends], dtype=torch.int64).to(b.device)
    grid = (shape[0] * -(-shape[1] // height) * -(-shape[2] // width),)
    run(module.factor_tile_kernel, grid, (table, b.contiguous(), a.contiguous(), out), {"ROWS": height, "COLS": width})
    return out
