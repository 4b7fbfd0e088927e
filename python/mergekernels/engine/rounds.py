"""A tensor on its way through the rounds of a method that sees it by itself: pass by pass, within granted memory."""

from __future__ import annotations

from math import prod

from .._cpu import StreamStats
from .._keeping import Kept
from .._methods.protocol import Coeffs, Method, Round, Spec
from ..errors import ArgumentError
from ..ops.sums import Sums
from .context import Context, OpenTensor, Worker
from .measure import Search, Shared, Sharing, measure_of, new_shared
from .needs import Needs, is_sum, of_round, of_tensor
from .passes import Measure, refuse
from .summing import Folded, SumsMeasure
from .survey import widest

__all__ = ["Rounds"]


class Rounds:
    """The measuring passes of `merge.tensors[index]`; what a job of the scheduler has in common with others like it.

    spec : the tensor as `method` sees it. state : where it starts. least, want : bytes of statistics, see `Job`.
    keeps : whether a summing pass may leave behind what it keeps, for a pass that writes.
    """

    def __init__(
        self, ctx: Context, index: int, method: Method, spec: Spec, state: Round | Coeffs, *, keeps: bool
    ) -> None:
        self._ctx = ctx
        self._method = method
        self._spec = spec
        self._state = state
        self._keeps = keeps
        plan = ctx.plan
        tensor = plan.merge.tensors[index]
        self.name = tensor.name
        self._n = prod(tensor.shape)
        self._source = OpenTensor(ctx, tensor, self._n)
        needs = of_tensor(method, spec, state, widest(plan.specs, tensor))
        self._held = plan.specs.held(index)
        self.least = needs.statistics + self._held
        self.want = self.least + needs.entries
        self.granted = 0
        self.moved = 0
        self.tiles = 1
        self._measure: Measure | None = None
        self._doubtful: Folded | None = None
        self._kept: Kept | None = None

    def _next_measure(self) -> bool:
        """Makes ready the pass for the round at hand; False if the method has its coefficients."""
        self._measure = None
        method, spec, state = self._method, self._spec, self._state
        if not isinstance(state, Round):
            return False
        shared, room = None, self.granted - self.least
        if not is_sum(state):
            shared = new_shared(state, self._source.num_models, room, self._n)
        elif self._keeps and state.op == "reduce" and state.coeffs is not None and not self._source.marks:
            self._kept = Kept.of(self._ctx.backend, method.apply(spec, state.coeffs), self._n, room)
        self._begin(measure_of(self._ctx, self._source, spec, method, state, shared, self._kept))
        return True

    def _begin(self, measure: Measure) -> None:
        if isinstance(self._state, Round) and isinstance(measure, SumsMeasure):
            self._refuse_size(of_round(self._method, self._spec, self._state, 1))
            measure.begin()
        self._measure = measure
        self.tiles = measure.tiles

    def _refuse_size(self, needs: Needs) -> None:
        """Statistics beyond what was granted, in a pass that the method's first round did not let foresee."""
        if needs.statistics > max(self.granted, self.least) - self._held:
            raise ArgumentError(
                "the memory budget cannot hold the statistics of the tensor",
                code="memory.too-small",
                tensor=self.name,
                expected=f"{needs.statistics + self._held} bytes",
                got=f"{self.granted}",
                hint="Give more memory or fewer threads.",
            )

    def _tile(self, worker: Worker, index: int) -> int:
        """One tile of the current pass; bytes that were read for the first time."""
        before = worker.bytes_read
        if self._measure is not None:
            self._measure.run(worker, index)
        else:
            self._apply(worker, index)
        size = worker.bytes_read - before
        first = min(size, self._source.nbytes - self.moved)
        self.moved += size
        return first

    def _apply(self, worker: Worker, index: int) -> None:
        """One tile of a pass that follows the rounds, of jobs that have one."""
        raise NotImplementedError

    def _measured(self, measure: Measure) -> bool:
        """After a measuring pass: the method goes on. False if the values must be looked at once more first."""
        if self._spec.nan == "error":
            refuse(self._source, measure.nonfinite())
        if isinstance(measure, SumsMeasure):
            folded = measure.finish()
            if self._spec.nan == "error" and SumsMeasure.doubtful(folded):
                # A sum does not know where it went wrong: look at the values once more.
                self._doubtful = folded
                self._begin(Search(self._ctx, self._source, self._spec, StreamStats(self._source.num_models, 0)))
                return False
            self._resolve(Sums((folded,)), measure.visited)
        elif self._doubtful is not None:
            folded, self._doubtful = self._doubtful, None
            self._resolve(Sums((folded,)), measure.visited)
        else:
            assert isinstance(measure, Sharing)
            self._resolve(measure.stats, measure.visited)
        return True

    def _resolve(self, stats: Shared | Sums, visited: int) -> None:
        assert isinstance(self._state, Round)
        self._measure = None
        self._state = self._method.resolve(self._spec, self._state, stats, visited)
