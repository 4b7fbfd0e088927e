"""Element-wise combination rules of PEFT: prune, elect signs, add; over tensors or over products of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...ops.keep import KEEP_NOTHING, Draw, KeepRule
from ...ops.program import Program
from ...ops.selection import Scope, Selection

if TYPE_CHECKING:
    import torch

    from ...ops.inputs import Inputs

__all__ = ["Rule", "combine", "terms"]


@dataclass(frozen=True)
class Rule:
    """How values are pruned and combined.

    prune : "magnitude" (the floor(density n) largest of each model), or "random" (each with probability density, then
    divided by it). vote : "none" (weighted sum); "total" or "frequency": signs are elected by the sum of the pruned
    values, or of their signs, zero counts as +1; the weighted values of that sign are added, over their number.
    tie_policy : who survives among equal magnitudes.
    """

    prune: Literal["magnitude", "random"]
    density: tuple[float, ...]
    vote: Literal["none", "total", "frequency"]
    tie_policy: Literal["hash", "index", "all"] = "hash"
    seed: int = 0


def combine(inputs: Inputs, outs: list[torch.Tensor], rule: Rule, weights: tuple[float, ...]) -> None:
    """Write the combination of all models of `inputs` into `outs`, one tensor per piece.

    Raises
    ------
    DataError : NaN, Inf or overflow.
    """
    _run(inputs, rule, [(outs, weights)])


def terms(inputs: Inputs, outs: Sequence[list[torch.Tensor]], rule: Rule) -> None:
    """Write what each model contributes at weight 1 into `outs[t]`: weights come after pruning and vote, so that the
    combination is the weighted sum of these.
    """
    count = inputs.num_models
    _run(inputs, rule, [(outs[t], tuple(float(u == t) for u in range(count))) for t in range(count)])


def _run(inputs: Inputs, rule: Rule, runs: Sequence[tuple[list[torch.Tensor], tuple[float, ...]]]) -> None:
    from ..._backends.dispatch import pick, requested
    from ...ops.inputs import num_threads
    from ...ops.stream import run_program

    if inputs.n == 0:
        return
    _, backend = pick("stream", inputs.all_views, requested(None))
    threads = num_threads(None)
    keep = _kept(inputs, rule, threads)
    for outs, weights in runs:
        program = Program(
            weights,
            keep,
            base=False,
            vote={"none": "none", "total": "plain", "frequency": "count"}[rule.vote],  # type: ignore[arg-type]
            divisor="none" if rule.vote == "none" else "agreeing_count",
            seed=rule.seed,
            tensor=inputs.tensor,
            factors=_factors(rule),
        )
        run_program(program, inputs, outs, backend, threads, "error")


def _factors(rule: Rule) -> tuple[float, ...]:
    if rule.prune == "magnitude":
        return ()
    return tuple(1.0 / d if 0.0 < d < 1.0 else 1.0 for d in rule.density)


def _kept(inputs: Inputs, rule: Rule, threads: int) -> tuple[KeepRule | None, ...]:
    """What each model keeps."""
    if rule.prune == "random":
        return tuple(_draw(density) for density in rule.density)
    counts = [min(inputs.n, int(density * inputs.n)) for density in rule.density]
    searches = tuple((t, k) for t, k in enumerate(counts) if 0 < k < inputs.n)
    points = dict(zip((t for t, _ in searches), _points(inputs, searches, rule, threads), strict=True))
    return tuple(KEEP_NOTHING if k == 0 else points.get(t) for t, k in enumerate(counts))


def _draw(density: float) -> KeepRule | None:
    if density >= 1.0:
        return None
    threshold = int(density * 2.0**32)
    return Draw(threshold) if threshold > 0 else KEEP_NOTHING


def _points(
    inputs: Inputs, searches: tuple[tuple[int, int], ...], rule: Rule, threads: int
) -> tuple[KeepRule | None, ...]:
    """The points of the magnitudes that are kept."""
    from ..._backends.dispatch import pick, requested
    from ...ops.select import run_sweep

    if not searches:
        return ()
    _, backend = pick("select", inputs.all_views, requested(None))
    scope = Scope((0,), (inputs.tensor,), inputs.n, "F64" if inputs.compute.name == "F64" else "F32")
    selection = Selection.of(searches, scope, policy=rule.tie_policy, seed=rule.seed, base=False)
    while not selection.done:
        stats, visited = run_sweep(selection, [inputs], backend, threads, "error")
        selection = selection.advance(stats, visited)
    return selection.points
