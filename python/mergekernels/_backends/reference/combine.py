"""From the kept deltas to the merged one: election, merge, divisor and what follows, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ops.program import Program
from .common import constant, ordered_sum
from .rules import balance

__all__ = ["Merged", "combine"]


@dataclass(frozen=True)
class Merged:
    """The steps from wt to q.

    total : s. vote : v, s without a vote. agree : per model. num : what the merge gives. q : after everything but
    scale and anchor. useful : per model whether `Useful` counts it, None without that rule.
    """

    total: torch.Tensor
    vote: torch.Tensor
    agree: list[torch.Tensor]
    num: torch.Tensor
    q: torch.Tensor
    useful: list[torch.Tensor] | None


def combine(
    program: Program,
    w: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    weighted: Sequence[torch.Tensor],
    fisher: Sequence[torch.Tensor],
) -> Merged:
    """The merged delta; w : weights of each model (a number, or one per element), fisher : F1..FT or nothing."""
    total = ordered_sum(weighted)
    vote, sign, agree = _elect(program, total, kept, weighted)
    num = _merge(program, w, deltas, kept, weighted, fisher, sign, agree)
    q = _divide(program, w, kept, agree, num)
    if program.alone:
        one = ordered_sum([_number(e != 0, q) for e in kept]) == 1
        for e, factor in zip(kept, program.alone, strict=True):
            q = torch.where(one & (e != 0), constant(factor, q) * e, q)
    if program.limit is not None:
        limit = constant(program.limit, q)
        clipped = torch.where(q > limit, limit, torch.where(q < -limit, -limit, q))
        if program.limit < 1e-6:
            clipped = torch.where(q.abs() < constant(1e-6, q), q * constant(program.limit * 1e6, q), clipped)
        q = clipped
    useful = None
    if program.useful is not None:
        pairs = zip(deltas, program.useful.thresholds, strict=True)
        useful = [d.abs() > constant(threshold, q) * (q - d).abs() for d, threshold in pairs]
        enough = torch.stack(useful).sum(0) >= program.useful.at_least
        q = torch.where(enough, q, torch.zeros_like(q))
    return Merged(total, vote, agree, num, q, useful)


def _number(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return mask.to(like.dtype)


def _elect(
    program: Program, total: torch.Tensor, kept: Sequence[torch.Tensor], weighted: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(v, the elected sign, per model whether it agrees)."""
    nobody = torch.zeros_like(total, dtype=torch.bool)
    if program.vote == "none":
        return total, torch.zeros_like(total), [nobody for _ in kept]
    stand = weighted if program.vote == "weighted" else kept
    vote = total
    if program.vote == "plain":
        vote = ordered_sum(kept)
    elif program.vote == "count":
        vote = ordered_sum([_number(e > 0, total) - _number(e < 0, total) for e in kept])
    # A NaN elects like a zero; where s is NaN the result is NaN anyway.
    sign = torch.where(vote > 0, 1.0, torch.where(vote < 0, -1.0, float(program.zero_vote))).to(total.dtype)
    agree = [((v > 0) & (sign > 0)) | ((v < 0) & (sign < 0)) for v in stand]
    return vote, sign, agree


def _merge(
    program: Program,
    w: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    weighted: Sequence[torch.Tensor],
    fisher: Sequence[torch.Tensor],
    sign: torch.Tensor,
    agree: Sequence[torch.Tensor],
) -> torch.Tensor:
    zero = torch.zeros_like(sign)
    if program.merge == "max":
        best = zero
        for v, a in zip(weighted, agree, strict=True):
            best = torch.where(a & (v.abs() > best), v.abs(), best)
        return sign * best
    if program.merge == "largest":
        best, num = zero, zero
        for e, v in zip(kept, weighted, strict=True):
            wins = (e != 0) & (e.abs() >= best)
            best, num = torch.where(wins, e.abs(), best), torch.where(wins, v, num)
        return num
    if program.merge == "importance":
        epsilon = constant(program.epsilon, sign)
        shares = [wt * (f + epsilon) for wt, f in zip(w, fisher, strict=True)]
        return ordered_sum([at * x for at, x in zip(shares, deltas, strict=True)]) / ordered_sum(shares)
    if program.merge == "balance":
        return _balance(program, deltas)
    if program.vote != "none":
        return ordered_sum([torch.where(a, v, zero) for v, a in zip(weighted, agree, strict=True)])
    return ordered_sum(weighted)


def _balance(program: Program, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    total = ordered_sum(deltas)
    shares, terms = [], []
    for rule, d in zip(program.balance, deltas, strict=True):
        a, z = balance(rule, d, total)
        cut, top = constant(rule.cut, d), constant(rule.top, d)
        share = torch.zeros_like(z) if cut == top else (torch.where(z < cut, cut, z) - cut) / (top - cut)
        b = torch.where(d == 0, torch.zeros_like(a), torch.where(d < 0, -a, a))
        shares.append(share)
        terms.append(share * b)
    epsilon, whole = constant(program.epsilon, total), ordered_sum(shares)
    return ordered_sum(terms) / torch.where(whole < epsilon, epsilon, whole)


def _divide(
    program: Program,
    w: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    agree: Sequence[torch.Tensor],
    num: torch.Tensor,
) -> torch.Tensor:
    zero, one = torch.zeros_like(num), torch.ones_like(num)
    if program.divisor == "value":
        return num / constant(program.divisor_value, num)
    if program.divisor == "agreeing_weights":
        u = ordered_sum([torch.where(a, wt, zero) for wt, a in zip(w, agree, strict=True)])
        floor = constant(program.divisor_floor, num)
        if program.divisor_floor > 0:
            return num / torch.where(u < floor, floor, u)
        return num / torch.where(u == 0, one, u)
    if program.divisor == "agreeing_count":
        return num / ordered_sum([_number(a, num) for a in agree]).clamp_min(1)
    if program.divisor == "kept_count":
        return num / ordered_sum([_number(e != 0, num) for e in kept]).clamp_min(1)
    return num
