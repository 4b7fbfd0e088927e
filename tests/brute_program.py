"""Programs element by element in numpy scalars, written from the docstring of `Program`; shares no code with the
package but for exp, log and tanh, which have their own test.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from brute import philox
from mergekernels import _cpu
from mergekernels.ops.keep import Band, Draw, Keep, Marked, RankBand, RankDraw
from mergekernels.ops.program import Balance, Program, Table

Number = Any
"""A numpy scalar of the compute dtype."""


def key(x: Number) -> int:
    """The bits of |x|; one above infinity for NaN."""
    if x != x:
        return 0x7F800001 if isinstance(x, np.float32) else 0x7FF0000000000001
    code, bits = ("<f", "<I") if isinstance(x, np.float32) else ("<d", "<Q")
    return int(struct.unpack(bits, struct.pack(code, abs(x)))[0])


def function(name: str, x: Number) -> Number:
    """exp, log or tanh of x, rounded once."""
    return type(x)(_cpu.transcendental(name, float(x)))


@dataclass
class Element:
    """What becomes of one element."""

    deltas: list[Number] = field(default_factory=list)
    masks: list[bool] = field(default_factory=list)
    trimmed: list[Number] = field(default_factory=list)
    kept: list[Number] = field(default_factory=list)
    weighted: list[Number] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    useful: list[bool] = field(default_factory=list)
    vote: Number = 0
    q: Number = 0
    y: Number = 0
    out: Number = 0


class Brute:
    """One program over a piece. x0, xs, fs : lists of scalars of one type. g : flat indices. bits : of marks."""

    def __init__(
        self,
        program: Program,
        f: Callable[[float], Number],
        x0: Sequence[Number] | None,
        xs: Sequence[Sequence[Number]],
        fs: Sequence[Sequence[Number]],
        g: Sequence[int],
        bits: Sequence[Sequence[int] | None],
    ) -> None:
        self.p, self.f, self.x0, self.xs, self.fs, self.g, self.bits = program, f, x0, xs, fs, g, bits
        self.models = range(len(program.weights))
        with np.errstate(all="ignore"):
            self.deltas = [[self._delta(t, i) for t in self.models] for i in range(len(g))]
        self.ranks = [self._ranks(t) for t in self.models]

    def _delta(self, t: int, i: int) -> Number:
        x = self.xs[t][i]
        return x if self.x0 is None or not self.p.subtract else x - self.x0[i]

    def word(self, purpose: int, t: int, g: int) -> int:
        return philox(self.p.seed, self.p.tensor, 16 * t + purpose, g)

    def _ranks(self, t: int) -> list[int]:
        ranks = [0] * len(self.g)
        rule, rows = self.p.keep[t], self.p.rows
        if not isinstance(rule, (RankDraw, RankBand)) or rows is None:
            return ranks
        members: dict[tuple[int, int], list[int]] = {}
        for i, g in enumerate(self.g):
            members.setdefault((g // (rows.length * rows.stride), g % rows.stride), []).append(i)
        for row in members.values():
            assert len(row) == rows.length
            row.sort(key=lambda i: (key(self.deltas[i][t]), -self.word(2, t, self.g[i]), -self.g[i]))
            for r, i in enumerate(row):
                ranks[i] = r + 1
        return ranks

    def passes(self, point: Keep, k: int, t: int, g: int) -> bool:
        if k != point.tau:
            return k > point.tau
        if point.ties == "hash":
            return (self.word(2, t, g), g) <= (point.word, point.index)
        return {"all": True, "none": False, "index": g <= point.index}[point.ties]

    def rule(self, i: int, t: int) -> tuple[bool, Number]:
        """(kept, divisor or None)."""
        rule, g, k = self.p.keep[t], self.g[i], key(self.deltas[i][t])
        if rule is None:
            return True, None
        if isinstance(rule, Keep):
            return self.passes(rule, k, t, g), None
        if isinstance(rule, Band):
            wide = rule.wide is None or self.passes(rule.wide, k, t, g)
            return wide and not self.passes(rule.top, k, t, g), None
        if isinstance(rule, Draw):
            passed = rule.point is None or self.passes(rule.point, k, t, g)
            return passed and self.word(0, t, g) < rule.threshold, None
        if isinstance(rule, Marked):
            bits = self.bits[t]
            assert bits is not None
            return bits[i] == 1, None
        assert self.p.rows is not None
        m, r = self.p.rows.length, self.ranks[t][i]
        if isinstance(rule, RankBand):
            return rule.first < m + 1 - r <= rule.last, None
        threshold = rule.single if m == 1 else rule.low + ((r - 1) * rule.span) // (m - 1)
        divisor = self.f(self.f(threshold) * self.f(2.0**-32)) if rule.divide else None
        return self.word(0, t, g) < threshold, divisor

    def value(self, table: Table, t: int, g: int) -> Number:
        count = len(table.values) // (1 if table is self.p.importance else len(self.models))
        if table.axis == "groups":
            at = (philox(self.p.seed, table.tensor, 3, g) * table.length) >> 32
        else:
            at = g // table.length if table.axis == "rows" else g % table.length
        return self.f(table.values[t * count + at])

    def total(self, terms: Sequence[Number]) -> Number:
        s = self.f(0.0)
        for v in terms:
            s = s + v
        return s

    def variance(self, deltas: Sequence[Number]) -> Number:
        count = self.f(len(deltas))
        mean = self.total(deltas) / count
        return self.total([(d - mean) * (d - mean) for d in deltas]) / count

    def balance(self, rule: Balance, d: Number, total: Number) -> tuple[Number, Number]:
        f = self.f
        lo, hi = f(rule.lo), f(rule.hi)
        a = abs(d)
        a = lo if a < lo else hi if a > hi else a
        m = f(0.0) if hi == lo else (a - lo) / (hi - lo)
        z = function("exp", f(rule.spread) * (m * m)) * function("tanh", d * total)
        return a, f(0.0) if z < 0 else z

    def elements(self) -> list[Element]:
        with np.errstate(all="ignore"):
            return [self.element(i) for i in range(len(self.g))]

    def element(self, i: int) -> Element:
        p, f, g = self.p, self.f, self.g[i]
        e = Element(self.deltas[i])
        joint = True
        if p.joint is not None:
            number = self.variance(e.deltas)
            if p.importance is not None:
                number = abs(e.deltas[0]) * self.value(p.importance, 0, g)
            joint = self.passes(p.joint, key(number), 0, g)
        w = [f(p.weights[t]) if p.table is None else self.value(p.table, t, g) for t in self.models]
        for t, d in enumerate(e.deltas):
            kept, divisor = self.rule(i, t)
            kept = kept and joint
            e.masks.append(kept)
            v = f(0.0) if not kept else d if divisor is None else d / divisor
            e.trimmed.append(v)
            if p.factors and p.factors[t] != 1.0:
                v = v * f(p.factors[t])
            e.kept.append(v)
            e.weighted.append(w[t] * v)
        s = self.total(e.weighted)
        e.vote, sign = s, 0
        if p.vote != "none":
            if p.vote == "plain":
                e.vote = self.total(e.kept)
            elif p.vote == "count":
                e.vote = f(sum((v > 0) * 1 - (v < 0) * 1 for v in e.kept))
            sign = 1 if e.vote > 0 else -1 if e.vote < 0 else p.zero_vote
        stand = e.weighted if p.vote == "weighted" else e.kept
        e.agree = [bool(sign != 0 and v * f(sign) > 0) for v in stand]
        num = self.merge(i, e, w, s, sign)
        q = self.divide(e, w, num)
        nonzero = [t for t in self.models if e.kept[t] != 0]
        if p.alone and len(nonzero) == 1:
            q = f(p.alone[nonzero[0]]) * e.kept[nonzero[0]]
        if p.limit is not None:
            limit = f(p.limit)
            if p.limit < 1e-6 and abs(q) < f(1e-6):
                q = q * f(p.limit * 1e6)
            else:
                q = limit if q > limit else -limit if q < -limit else q
        if p.useful is not None:
            e.useful = [bool(abs(d) > f(u) * abs(q - d)) for d, u in zip(e.deltas, p.useful.thresholds, strict=True)]
            q = q if sum(e.useful) >= p.useful.at_least else f(0.0)
        e.q = q
        e.y = q if p.scale == 1.0 else q * f(p.scale)
        poison = num if p.merge in ("importance", "balance") else s
        if poison != poison:
            e.y = f(float("nan"))
        e.out = e.y
        if self.x0 is not None:
            e.out = (self.x0[i] if p.anchor == "base" else self.xs[0][i]) + e.y
        return e

    def merge(self, i: int, e: Element, w: Sequence[Number], s: Number, sign: int) -> Number:
        p, f = self.p, self.f
        if p.merge == "max":
            return f(sign) * max([f(0.0), *(abs(v) for v, a in zip(e.weighted, e.agree, strict=True) if a and v == v)])
        if p.merge == "largest":
            ranked = [(abs(v), t) for t, v in enumerate(e.kept) if v == v and v != 0]
            return e.weighted[max(ranked)[1]] if ranked else f(0.0)
        if p.merge == "importance":
            a = [wt * (self.fs[t][i] + f(p.epsilon)) for t, wt in enumerate(w)]
            return self.total([at * self.xs[t][i] for t, at in enumerate(a)]) / self.total(a)
        if p.merge == "balance":
            c, b, total = [], [], self.total(e.deltas)
            for rule, d in zip(p.balance, e.deltas, strict=True):
                a, z = self.balance(rule, d, total)
                cut, top = f(rule.cut), f(rule.top)
                z = cut if z < cut else z
                c.append(f(0.0) if cut == top else (z - cut) / (top - cut))
                b.append(f(0.0) if d == 0 else -a if d < 0 else a)
            whole = self.total(c)
            whole = f(p.epsilon) if whole < f(p.epsilon) else whole
            return self.total([x * y for x, y in zip(c, b, strict=True)]) / whole
        if p.vote != "none":
            return self.total([v for v, a in zip(e.weighted, e.agree, strict=True) if a])
        return s

    def divide(self, e: Element, w: Sequence[Number], num: Number) -> Number:
        p, f = self.p, self.f
        if p.divisor == "value":
            return num / f(p.divisor_value)
        if p.divisor == "agreeing_weights":
            u = self.total([wt for wt, a in zip(w, e.agree, strict=True) if a])
            if p.divisor_floor > 0:
                return num / (f(p.divisor_floor) if u < f(p.divisor_floor) else u)
            return num / (f(1.0) if u == 0 else u)
        if p.divisor == "agreeing_count":
            return num / f(max(1, sum(e.agree)))
        if p.divisor == "kept_count":
            return num / f(max(1, sum(bool(v != 0) for v in e.kept)))
        return num


def exact_sum(values: Sequence[float]) -> float:
    """The sum over canonical blocks: 256 lanes of 16 elements, a tree over lanes, a tree over blocks."""
    blocks = []
    for start in range(0, len(values), 4096):
        lanes = [0.0] * 256
        for i, v in enumerate(values[start : start + 4096]):
            lanes[i % 256] += v
        stride = 128
        while stride:
            for i in range(stride):
                lanes[i] += lanes[i + stride]
            stride //= 2
        blocks.append(lanes[0])
    while len(blocks) > 1:
        pairs = [blocks[j] + blocks[j + 1] for j in range(0, len(blocks) - 1, 2)]
        blocks = pairs + blocks[len(pairs) * 2 :]
    return blocks[0] if blocks else 0.0
