"""Comparison of outputs with those of a kit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kit import Case

if TYPE_CHECKING:
    import torch

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    """What came out for a case.

    agrees : every tensor is there and within the bound. error : largest difference, relative to the largest magnitude
    of its expected tensor (norm of the difference to its norm, where the case says so). differing : share of elements
    whose bits differ. problem : a sentence if it does not agree.
    """

    case: Case
    agrees: bool
    error: float
    differing: float
    problem: str = ""


def judge(case: Case, got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> Verdict:
    """Compare the tensors of a case with the expected ones."""
    missing = sorted(set(expected) - set(got))
    if missing:
        return Verdict(case, False, float("inf"), 1.0, f"tensor '{missing[0]}' is missing")
    worst, differing, elements, problem = 0.0, 0, 0, ""
    for name, want in expected.items():
        have = got[name]
        if have.shape != want.shape:
            expected_shape, shape = tuple(want.shape), tuple(have.shape)
            return Verdict(
                case, False, float("inf"), 1.0, f"tensor '{name}': expected shape {expected_shape}; got {shape}"
            )
        if want.numel() == 0:
            continue
        difference = (have.double() - want.double()).abs()
        whole = case.norm == "frobenius"
        size = float(want.double().norm() if whole else want.double().abs().max())
        error = float(difference.norm() if whole else difference.max()) / (size or 1.0)
        differing += int((have.double() != want.double()).sum())
        elements += want.numel()
        if not error <= case.bound and not problem:
            at = int(difference.flatten().nan_to_num(float("inf")).argmax())
            what = f"largest difference {error:.3g} of the largest magnitude, at flat index {at}"
            if whole:
                what = f"norm of the difference {error:.3g} of the norm"
            problem = f"tensor '{name}': {what}; expected at most {case.bound:.3g}"
        worst = max(worst, error) if error == error else float("nan")
    return Verdict(case, not problem, worst, differing / max(1, elements), problem)
