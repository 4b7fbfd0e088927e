"""Small tensors of a merge of state dicts, collected and streamed together where the backend can."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._backends.dispatch import pick, require
from ._methods.protocol import Coeffs, Round, Spec
from ._native import view_of
from ._outputs import output_dtype, outputs
from .merging import Call
from .ops.inputs import Inputs
from .ops.stream import run_program

if TYPE_CHECKING:
    import torch

__all__ = ["SmallTensors"]

_SMALL = 1 << 16
_MOST = 1 << 22


@dataclass
class SmallTensors:
    """Tensors whose program needs no more rounds, waiting for a launch that they share.

    Results are allocated at once and hold their values after `flush`. What a tensor holds that is not finite is refused
    then, with the error that the tensor alone would have raised.
    """

    call: Call
    waiting: list[tuple[Any, Any, Inputs, torch.Tensor]] = field(default_factory=list)
    elements: int = 0

    def take(
        self, spec: Spec, inputs: Inputs, coeffs: Coeffs | None, out_dtype: torch.dtype | None, target: Any = None
    ) -> torch.Tensor | None:
        """The tensor that will hold the result (`target`, if given), or None if this one is not to be streamed with
        others.
        """
        if inputs.sharded or not 0 < inputs.n <= _SMALL:
            return None
        _, backend = pick("stream", inputs.all_views, self.call.backend)
        lists = getattr(backend, "LISTS", None)
        if lists is None:
            return None
        state: Round | Coeffs = self.call.method.start(spec) if coeffs is None else coeffs
        if isinstance(state, Round):
            return None
        program = self.call.method.apply(spec, state)
        if not lists.can_list(program):
            return None
        require(backend, program.features)
        out = outputs(inputs, output_dtype(spec, inputs, out_dtype), target)[0]
        self.waiting.append((backend, program, inputs, out))
        self.elements += inputs.n * len(inputs.all_views)
        if self.elements > _MOST:
            self.flush()
        return out

    def flush(self) -> None:
        """Stream what waits.

        Raises
        ------
        DataError : with nan="error", NaN or Inf in an input, or overflow in a result.
        """
        if not self.waiting:
            return
        work, self.waiting, self.elements = self.waiting, [], 0
        lists = work[0][0].LISTS
        jobs = []
        for _, program, inputs, out in work:
            base, models = inputs.views(0)
            jobs.append(lists.Job(program, inputs.pieces[0], base, models, view_of(out), inputs.compute))
        for number in lists.stream_list(jobs, check=self.call.nan == "error"):
            backend, program, inputs, out = work[number]
            # By itself, for the error that names the place.
            run_program(program, inputs, [out], backend, self.call.threads, self.call.nan)
