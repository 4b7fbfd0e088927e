"""The route "core" for many products of equal shape at once: one call of each operation for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.model import Factors
from ._maps import FactorMap
from ._pairs import RANGE, cheapest
from .batching import groups, in_threads
from .cuts import power_of_two, rank_cut
from .mix import Mix

if TYPE_CHECKING:
    import torch

__all__ = ["Cores", "cores_of"]

BATCH = 1 << 22  # entries of results that are made at a time: 16 MB
CANCELLED = 25.0  # how many times longer than the result, squared, the terms of a float32 product may be


Term = tuple[float, "torch.Tensor", "torch.Tensor"]
"""w, b, a of w (b @ a)."""


@dataclass(frozen=True)
class Cores:
    """Triplets of several products. positions : of these in the list. us : U S, (count, m, k). vh : (count, k, n);
    float32. squares : all squared singular values, float64, falling, CPU. found : how many of k each product has.
    """

    positions: list[int]
    us: torch.Tensor
    vh: torch.Tensor
    squares: torch.Tensor
    found: list[int]


def cores_of(items: Sequence[Any], ranks: Sequence[int | None]) -> list[Cores]:
    """The leading triplets of what can be served together: two or more products of factors, or sums of them, of one
    shape, inner size, device and rank for which the route "core" is the cheapest. 16-bit and float32 factors.

    Whatever is left out needs another look: NaN and Inf, dependent columns, sizes beyond float32, terms that cancel.
    """
    import torch

    terms = [_terms(item) for item in items]
    keys = [_key(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    shares = []
    for positions in groups(keys):
        key = keys[positions[0]]
        if key is None or len(positions) < 2:
            continue
        m, n, inner, device, rank = key
        like = FactorMap(torch.empty((m, inner), device="meta"), torch.empty((inner, n), device="meta"))
        if cheapest(like, rank, None, False) != "core":
            continue
        share = -(-len(positions) // (torch.get_num_threads() if device.type == "cpu" else 1))
        shares += [positions[i : i + share] for i in range(0, len(positions), share)]

    def run(positions: list[int]) -> list[Cores]:
        m, n, _, _, rank = keys[positions[0]]  # type: ignore[misc]
        step = max(1, BATCH // ((m + n) * rank))
        chunks = [positions[i : i + step] for i in range(0, len(positions), step)]
        return [_cores(chunk, [terms[i] for i in chunk], rank) for chunk in chunks]

    return [cores for found in in_threads(shares, run) for cores in found]


def _terms(item: Any) -> list[Term]:
    """(w, b, a) of a sum of products, those with a weight of 0 left out; none of anything else."""
    if isinstance(item, Factors):
        return [(1.0, _bare(item.b), _bare(item.a))]
    if isinstance(item, Mix) and not item.dense:
        return [(float(w), _bare(f.b), _bare(f.a)) for w, f in item.factors if w != 0]
    return []


def _bare(tensor: Any) -> Any:
    import torch

    return tensor.detach() if isinstance(tensor, torch.Tensor) else tensor


def _key(terms: Sequence[tuple[float, Any, Any]], rank: int | None) -> tuple[int, int, int, torch.device, int] | None:
    """(m, n, inner size, device, rank) of what can be served, None of the rest."""
    if not terms or rank is None:
        return None
    _, first_b, first_a = terms[0]
    inner = 0
    for w, b, a in terms:
        if not (_plain(b) and _plain(a) and b.ndim == a.ndim == 2 and b.device == a.device == first_b.device):
            return None
        if b.shape[1] != a.shape[0] or b.shape[0] != first_b.shape[0] or a.shape[1] != first_a.shape[1]:
            return None
        if not math.isfinite(w):
            return None
        inner += b.shape[1]
    m, n = first_b.shape[0], first_a.shape[1]
    if not (0 < rank <= min(m, n) and 0 < inner <= min(m, n)):
        return None
    return m, n, inner, first_b.device, rank


def _plain(tensor: Any) -> bool:
    import torch

    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.dtype in narrow and not tensor.is_meta


def _grams(items: Sequence[Sequence[Term]]) -> tuple[torch.Tensor, torch.Tensor]:
    """B^T B and A A^T of every product in float64, from one piece of memory after the other."""
    import torch

    first, count = items[0], len(items)
    inner = sum(int(b.shape[1]) for _, b, _ in first)
    options: Any = {"dtype": torch.float64, "device": first[0][1].device}
    wide_b, wide_a = (
        torch.empty((len(first[0][1]), inner), **options),
        torch.empty((inner, first[0][2].shape[1]), **options),
    )
    left, right = torch.empty((count, inner, inner), **options), torch.empty((count, inner, inner), **options)
    for i, terms in enumerate(items):
        start = 0
        for _, b, a in terms:
            stop = start + b.shape[1]
            wide_b[:, start:stop] = b
            wide_a[start:stop] = a
            start = stop
        torch.mm(wide_b.mT, wide_b, out=left[i])
        torch.mm(wide_a, wide_a.mT, out=right[i])
    return left, right


def _times(
    items: Sequence[Sequence[Term]], on_b: torch.Tensor, on_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """B on_b and on_a^T A of every product, float32."""
    import torch

    # Elsewhere float32 products may run in TF32, and float64 costs little.
    dtype = torch.float32 if on_b.device.type == "cpu" else torch.float64
    on_b, on_a = on_b.to(dtype), on_a.to(dtype)
    shape = (len(items), items[0][0][1].shape[0], on_b.shape[2]), (len(items), on_b.shape[2], items[0][0][2].shape[1])
    us, vh = (torch.empty(s, dtype=torch.float32, device=on_b.device) for s in shape)
    for i, terms in enumerate(items):
        start = 0
        for _, b, a in terms:
            part = slice(start, start + b.shape[1])
            for out, x, y in ((us[i], b.to(dtype), on_b[i, part]), (vh[i], on_a[i, part].mT, a.to(dtype))):
                if dtype == out.dtype:
                    torch.addmm(out, x, y, beta=1.0 if start else 0.0, out=out)
                elif start:
                    out += x @ y
                else:
                    out.copy_(x @ y)
            start = part.stop
    return us, vh


def _cores(positions: list[int], items: list[list[Term]], rank: int) -> Cores:
    """As `_pairs._core`, whose result for one product this is."""
    import torch

    left, right = _grams(items)
    inner, device = int(left.shape[1]), left.device
    k = min(rank, inner)
    sizes = [[(w, int(b.shape[1])) for w, b, _ in terms] for terms in items]
    weights = torch.tensor(
        [[w for w, size in own for _ in range(size)] for own in sizes], dtype=torch.float64, device=device
    )
    left = left * weights[:, :, None] * weights[:, None, :]
    left_sizes, right_sizes = left.diagonal(dim1=1, dim2=2), right.diagonal(dim1=1, dim2=2)
    good = torch.isfinite(left_sizes.sum(1) + right_sizes.sum(1)) & (right_sizes > 0).all(1) & (left_sizes > 0).all(1)
    eye = torch.eye(inner, dtype=left.dtype, device=left.device)
    left = torch.where(good[:, None, None], left, eye)
    right = torch.where(good[:, None, None], right, eye)
    left_sizes, right_sizes = left.diagonal(dim1=1, dim2=2), right.diagonal(dim1=1, dim2=2)
    balance = power_of_two((right_sizes / left_sizes).sqrt().sqrt())
    left = left * balance[:, None, :] * balance[:, :, None]
    right = right / balance[:, None, :] / balance[:, :, None]
    root, info = torch.linalg.cholesky_ex(right, upper=True)
    good = good & (info == 0)
    half = left @ root.mT
    core = root @ half
    core = torch.where(good[:, None, None], (core + core.mT) / 2, eye)
    values, w = torch.linalg.eigh(core)
    squares = values.flip(1).clamp_min(0.0)
    w = w.flip(2)[:, :, :k]
    found = (squares[:, :k] > rank_cut(inner, inner) ** 2 * squares[:, :1]).sum(1)
    kept = squares[:, :k].clamp_min(1e-300)
    on_b, on_a = root.mT @ w, half @ w / kept[:, None, :]
    # What the terms of the products below measure, against what these measure: no more than noise may cancel.
    total = squares[:, :k].sum(1)
    grown = (left.diagonal(dim1=1, dim2=2)[:, :, None] * on_b.square()).sum((1, 2))
    other = (right.diagonal(dim1=1, dim2=2)[:, :, None] * on_a.square() * kept[:, None, :]).sum((1, 2))
    good = good & (torch.maximum(grown, other) < CANCELLED * total)
    all_squares = squares.sum(1)
    good = good & (all_squares > RANGE**-2) & (all_squares < RANGE**2)
    on_b, on_a = (weights * balance)[:, :, None] * on_b, on_a / balance[:, :, None]
    us, vh = _times(items, on_b, on_a)
    counts = torch.where(good, found, -1).tolist()
    served = [i for i, count in enumerate(counts) if count > 0]
    if len(served) < len(positions):
        at = torch.tensor(served, dtype=torch.int64, device=device)
        us, vh, squares = us[at], vh[at], squares[at]
    return Cores([positions[i] for i in served], us, vh, squares.cpu(), [counts[i] for i in served])
