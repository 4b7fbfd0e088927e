"""Pieces of the specification that several reference ops share, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._native import to_torch, torch_dtype
from ...ops.keep import MAX_KEY
from ...tensors import CANONICAL_BLOCK, DType, Piece, TensorView

_M = (0xD2511F53, 0xCD9E8D57)
_W = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def load(view: TensorView, compute: DType) -> torch.Tensor:
    """The values of a view as a flat tensor in the compute dtype, after the load cast."""
    x = to_torch(view).reshape(-1)
    if view.cast is not None:
        x = to_dtype(x, torch_dtype(view.cast))
    return x.to(torch_dtype(compute))


def to_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """X in a floating-point dtype, rounded once to nearest even; torch takes float64 to 16 bits in two roundings."""
    if x.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    # Rounded to odd in float32: toward zero, the last bit set where anything was cut off. That bit stands for the rest,
    # so that the second rounding gives what one rounding of the double would.
    nearest = x.float()
    back = nearest.double()
    bits = (nearest.view(torch.int32) - (back.abs() > x.abs()).int()) | (back != x).int()
    return bits.view(torch.float32).to(dtype)


def delta(x: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """X - base, or x."""
    return x if base is None else x - base


def keys(d: torch.Tensor) -> torch.Tensor:
    """The bit pattern of |d| as int64, ordered like |d|; every NaN is MAX_KEY."""
    if d.dtype == torch.float64:
        return (d.view(torch.int64) & 0x7FFFFFFFFFFFFFFF).clamp_max(MAX_KEY["F64"])
    return (d.view(torch.int32).to(torch.int64) & 0x7FFFFFFF).clamp_max(MAX_KEY["F32"])


def flat_index(piece: Piece, device: torch.device) -> torch.Tensor:
    """The flat index g of every element of a piece, int64, in the order of the piece."""
    rows = torch.arange(piece.rows, dtype=torch.int64, device=device)
    cols = torch.arange(piece.cols, dtype=torch.int64, device=device)
    return (piece.g0 + rows[:, None] * piece.ld + cols[None, :]).reshape(-1)


def _mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b, for 32-bit numbers held in int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int, tensor: int, stream: int, g: torch.Tensor) -> torch.Tensor:
    """The Philox4x32-10 word of each flat index g, as int64.

    Key: the seed. Counter: g div 4 (64 bits), tensor id, stream. Word: lane g mod 4.
    """
    return torch.stack(_groups(seed, tensor, stream, g >> 2)).gather(0, (g & 3)[None, :])[0]


def philox_run(seed: int, tensor: int, stream: int, count: int) -> torch.Tensor:
    """The words of the flat indices 0 .. count - 1, as `philox`, which makes four for each that it returns."""
    groups = _groups(seed, tensor, stream, torch.arange(-(-count // 4)))
    return torch.stack(groups, 1).flatten()[:count]


def _groups(seed: int, tensor: int, stream: int, group: torch.Tensor) -> list[torch.Tensor]:
    c = [group & _MASK, (group >> 32) & _MASK, torch.full_like(group, tensor), torch.full_like(group, stream)]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _mulhilo(_M[0], c[0])
        high1, low1 = _mulhilo(_M[1], c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + _W[0]) & _MASK, (k1 + _W[1]) & _MASK
    return c


def tie_words(seed: int, tensor: int, model: int, g: torch.Tensor) -> torch.Tensor:
    """The words that order the ties of a model (purpose 2)."""
    return philox(seed, tensor, 16 * model + 2, g)


def constant(value: float, like: torch.Tensor) -> torch.Tensor:
    """A number of a program, rounded to the dtype of `like` once."""
    return torch.tensor(value, dtype=torch.float64).to(like)


def ordered_sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """+0 plus the terms, one after another."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def block_sums(products: torch.Tensor) -> torch.Tensor:
    """Sums over canonical blocks of float64 numbers along the last axis, [..., n] to [..., blocks].

    Lane i mod 256 of a block adds its elements in order, then the lanes combine by a binary tree.
    """
    n = products.shape[-1]
    blocks = -(-n // CANONICAL_BLOCK)
    padded = products.new_zeros(*products.shape[:-1], blocks * CANONICAL_BLOCK)
    padded[..., :n] = products
    rows = padded.reshape(*products.shape[:-1], blocks, CANONICAL_BLOCK // 256, 256)
    lanes = ordered_sum([rows[..., i, :] for i in range(rows.shape[-2])])
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
