"""The round "each": every tensor of a model through the rounds of a method that sees it by itself.

What is found of a tensor stays in memory until it is written; nothing of it is left on disk.
"""

from __future__ import annotations

from collections.abc import Callable

from .._methods.protocol import ByTensor, Coeffs, Round, Spec
from .context import Context, Worker
from .inputs import streams_of
from .needs import first_measured
from .readahead import ReadAhead
from .rounds import Rounds
from .scheduler import Scheduler

__all__ = ["resolve_each"]


class _EachJob(Rounds):
    """One tensor of a round "each": through all rounds of the method that sees it by itself."""

    def __init__(
        self,
        ctx: Context,
        index: int,
        spec: Spec,
        round_: Round,
        passed: Callable[[int], None],
        found: dict[str, Coeffs],
    ) -> None:
        super().__init__(ctx, index, *first_measured(ctx.plan.method, spec, round_), keeps=False)
        self._passed = passed
        self._found = found
        self.weight = self._source.nbytes

    def open(self) -> None:
        """Opens the sources."""
        self._source.open()
        self._next_measure()

    def run(self, worker: Worker, index: int) -> None:
        """One tile."""
        self._passed(self._tile(worker, index))

    def advance(self) -> bool:
        """The pass is over: the next one, or the coefficients."""
        assert self._measure is not None
        if not self._measured(self._measure) or self._next_measure():
            return True
        self._source.close()
        assert isinstance(self._state, Coeffs)
        self._found[self.name] = self._state
        return False


def resolve_each(
    ctx: Context,
    scheduler: Scheduler[Worker],
    specs: list[Spec],
    round_: Round,
    tick: Callable[[int, int, str], None],
) -> ByTensor:
    """The coefficients of each tensor by itself. Only they stay; a resumed run finds them again."""
    plan = ctx.plan
    members = {spec.name: spec for spec in specs}
    found: dict[str, Coeffs] = {}
    with_passes = []
    for file in plan.files:
        for placed in file.tensors:
            spec = members.get(placed.name)
            if spec is None:
                continue
            _, _, first = first_measured(plan.method, spec, round_)
            if isinstance(first, Coeffs):
                found[spec.name] = first
            else:
                with_passes.append((placed.index, spec))
    if not with_passes:
        return ByTensor(of=found)
    streams = [streams_of(plan.merge.inputs, plan.specs.read_sources(i), ctx.inputs.first) for i, _ in with_passes]
    total = sum(s.nbytes for tensor in streams for s in tensor)
    with ReadAhead(ctx.inputs, streams, scheduler.fail) as ahead:
        jobs = (_EachJob(ctx, i, spec, round_, ahead.passed, found) for i, spec in with_passes)
        scheduler.run(jobs, lambda done, name: tick(min(done, total), total, name), reserved=plan.survey.held)
    return ByTensor(of=found)
