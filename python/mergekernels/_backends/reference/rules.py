"""Which entries of the deltas a program keeps: every rule of ops/keep.py and the joint point, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ops.keep import Band, Draw, Keep, Marked, RankBand, RankDraw, Rows
from ...ops.program import Balance, Program, Table
from .common import constant, keys, ordered_sum, philox, tie_words
from .transcendental import exp, in_compute, tanh

__all__ = ["balance", "importance", "joint_mask", "kept_mask", "passes", "rank", "segment", "table_values", "variance"]


def passes(point: Keep, key: torch.Tensor, seed: int, tensor: int, model: int, g: torch.Tensor) -> torch.Tensor:
    """Whether each element passes a point."""
    limit = min(point.tau, 2**63 - 1)
    tied = key == limit
    if point.ties == "none":
        tied = torch.zeros_like(tied)
    elif point.ties == "index":
        tied = tied & (g <= point.index)
    elif point.ties == "hash":
        word = tie_words(seed, tensor, model, g)
        tied = tied & ((word < point.word) | ((word == point.word) & (g <= point.index)))
    return (key > limit) | tied


def rank(key: torch.Tensor, rows: Rows, seed: int, tensor: int, model: int, g: torch.Tensor) -> torch.Tensor:
    """The rank of each element in its row, 1 for the smallest, of a flat piece of whole slabs."""
    shape = (-1, rows.length, rows.stride)

    def by_row(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(shape).transpose(1, 2)

    # The largest first, the smaller word first among equals, then the smaller index: places 1 to m.
    by_word = torch.argsort(by_row(tie_words(seed, tensor, model, g)), dim=-1, stable=True)
    by_key = torch.argsort(by_row(key).gather(-1, by_word), dim=-1, descending=True, stable=True)
    places = torch.arange(1, rows.length + 1, device=key.device).expand_as(by_key)
    place = torch.empty_like(by_key).scatter(-1, by_word.gather(-1, by_key), places)
    return rows.length + 1 - place.transpose(1, 2).reshape(-1)


def kept_mask(
    program: Program, model: int, d: torch.Tensor, g: torch.Tensor, marks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(whether the rule of a model keeps each element, the number that divides kept deltas or None).

    marks : bytes of the bits of this flat piece, from byte g // 8 of its first element on.
    """
    rule, seed, tensor = program.keep[model], program.seed, program.tensor
    everything = torch.ones_like(d, dtype=torch.bool)
    if rule is None:
        return everything, None
    if isinstance(rule, Keep):
        return passes(rule, keys(d), seed, tensor, model, g), None
    if isinstance(rule, Band):
        wide = everything if rule.wide is None else passes(rule.wide, keys(d), seed, tensor, model, g)
        return wide & ~passes(rule.top, keys(d), seed, tensor, model, g), None
    if isinstance(rule, Draw):
        drawn = philox(seed, tensor, 16 * model, g) < rule.threshold
        return drawn if rule.point is None else drawn & passes(rule.point, keys(d), seed, tensor, model, g), None
    if isinstance(rule, Marked):
        assert marks is not None
        return (marks[(g >> 3) - (g[:1] >> 3)].long() >> (g & 7)) & 1 == 1, None
    rows = program.rows
    assert rows is not None
    r = rank(keys(d), rows, seed, tensor, model, g)
    if isinstance(rule, RankBand):
        place = rows.length + 1 - r
        return (place > rule.first) & (place <= rule.last), None
    assert isinstance(rule, RankDraw)
    threshold = torch.full_like(r, rule.single)
    if rows.length > 1:
        threshold = rule.low + ((r - 1) * rule.span) // (rows.length - 1)
    divisor = threshold.to(d.dtype) * 2.0**-32 if rule.divide else None
    return philox(seed, tensor, 16 * model, g) < threshold, divisor


def segment(table: Table, seed: int, g: torch.Tensor) -> torch.Tensor:
    """The segment of each element."""
    if table.axis == "rows":
        return g // table.length
    if table.axis == "columns":
        return g % table.length
    return (philox(seed, table.tensor, 3, g) * table.length) >> 32


def table_values(table: Table, num_models: int, model: int, at: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The number of a model for each element, in the compute dtype; `at` from `segment`."""
    values = torch.tensor(table.values, dtype=torch.float64, device=at.device).to(dtype).reshape(num_models, -1)
    return values[model][at]


def variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The number of the key "variance"."""
    count = constant(len(deltas), deltas[0])
    mean = ordered_sum(deltas) / count
    return ordered_sum([(d - mean) * (d - mean) for d in deltas]) / count


def importance(d: torch.Tensor, rows: Table, g: torch.Tensor) -> torch.Tensor:
    """The number of the key "importance"."""
    return d.abs() * table_values(rows, 1, 0, g // rows.length, d.dtype)


def balance(rule: Balance, d: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, z) of `Balance`; total : S."""
    lo, hi, spread = (constant(v, d) for v in (rule.lo, rule.hi, rule.spread))
    a = d.abs()
    a = torch.where(a < lo, lo, torch.where(a > hi, hi, a))
    m = torch.zeros_like(a) if lo == hi else (a - lo) / (hi - lo)
    z = in_compute(exp, spread * (m * m)) * in_compute(tanh, d * total)
    return a, torch.where(z < 0, torch.zeros_like(z), z)


def joint_mask(program: Program, deltas: Sequence[torch.Tensor], g: torch.Tensor) -> torch.Tensor | None:
    """Whether the joint point keeps each element, None without one."""
    if program.joint is None:
        return None
    number = variance(deltas) if program.importance is None else importance(deltas[0], program.importance, g)
    return passes(program.joint, keys(number), program.seed, program.tensor, 0, g)
