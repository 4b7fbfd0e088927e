"""Which backend serves a call. An explicit request (argument, context manager, environment) never falls back."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import ArgumentError, BackendError
from ..tensors import DType, Piece, TensorView

if TYPE_CHECKING:
    from array import array

    from .._cpu import BlockSums, StreamStats, SweepStats
    from ..ops.learned import MaskMerge, Relaxed, SegDot
    from ..ops.program import Program
    from ..ops.sums import Gram, Reduce
    from ..ops.sweeps import Sweep

__all__ = ["NAMES", "Backend", "LearnedBackend", "load", "pick", "requested", "require", "use_backend"]

NAMES = ("cuda", "triton", "cpu", "reference")
_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
_context: ContextVar[str | None] = ContextVar("mergekernels_backend", default=None)
_log = logging.getLogger("mergekernels")


class Backend(Protocol):
    """What a backend module offers.

    FEATURES : what it can do beyond points and the weighted vote: `Program.features`, keys of `Sweep` ("key:variance"),
    the functions "gram", "reduce", "divergence", "mark", "seg_dot", and "concrete" (masks); "reduce:kept" if its
    `reduce` writes marks.
    """

    @property
    def FEATURES(self) -> frozenset[str]: ...

    def why_not(self, op: str, views: Sequence[TensorView]) -> str | None:
        """Why it cannot serve these views, None if it can."""
        ...

    def sweep(
        self,
        request: Sweep,
        stats: SweepStats,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView | None],
        *,
        compute: DType,
        tensor: int,
        offset: int,
        threads: int,
    ) -> None:
        """See ops.sweeps.Sweep."""
        ...

    def stream(
        self,
        program: Program,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        out: TensorView | None,
        *,
        compute: DType,
        stats: StreamStats | None,
        threads: int,
        marks: Sequence[TensorView | None] = (),
    ) -> None:
        """See ops.program.Program. marks : per model packed bits of this piece, None where its rule is not `Marked`;
        uint8, from byte g0 // 8 on. A piece with marks is flat.
        """
        ...

    def mark(
        self,
        program: Program,
        kind: Literal["kept", "agreeing", "useful"],
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        marks: Sequence[TensorView],
        *,
        compute: DType,
        threads: int,
    ) -> None:
        """Write one packed bit per element and model: whether the program keeps it (by keep[t] and by `joint`, a delta
        of zero too), the model agrees (nobody without a vote), or `Useful` counts it. Pieces are flat and begin at a
        multiple of 8; bits beyond the last element are 0. marks : uint8, ceil(elements / 8) bytes per model.
        """
        ...

    def gram(
        self,
        request: Gram,
        sums: BlockSums,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        *,
        compute: DType,
        threads: int,
    ) -> None:
        """See ops.sums.Gram. Axis "tensor": flat pieces of whole canonical blocks. "rows": boxes of whole rows, or of
        columns that begin at a multiple of 4096 and end there or with the row. "columns": boxes of rows that begin at a
        multiple of 4096 and end there or with the tensor, any columns.
        """
        ...

    def reduce(
        self,
        program: Program,
        request: Reduce,
        sums: BlockSums,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        *,
        compute: DType,
        threads: int,
        kept: Sequence[TensorView | None] = (),
    ) -> None:
        """See ops.sums.Reduce. Flat pieces of whole canonical blocks and of whole slabs of the program.

        kept : per model where to write one packed bit per element, whether the model keeps it and its delta is not 0
        (uint8, as in `mark`), None for a model nowhere; () for none. A program that keeps by such marks, with the rule
        `Marked`, gives the same bits as this one. Only where "reduce:kept" is among the features.
        """
        ...

    def divergence(
        self,
        row_length: int,
        piece: Piece,
        base: TensorView,
        model: TensorView,
        *,
        compute: DType,
        threads: int,
    ) -> array[float]:
        """For each row of a flat piece of whole rows, the divergence of the model's softmax from the base's.

        With C the compute dtype, exp and log those of `common/transcendental.h`, per row and for x the model's and the
        base's values: e = C(exp(x - max x)), Z = C(sum of e), p = C(C(e / Z) + C(1e-8)), q likewise for the base; the
        terms are C(p * C(log(C(p / q)))), and the result is their sum, 0 where it is negative. Sums are T1, in float64.
        """
        ...


class LearnedBackend(Backend, Protocol):
    """A backend that also runs the passes of learned coefficients, on tensors in memory alone."""

    def seg_dot(
        self,
        request: SegDot,
        sums: BlockSums,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        gradient: TensorView,
        logits: TensorView | None,
        *,
        compute: DType,
        threads: int,
    ) -> None:
        """See ops.learned.SegDot; logits iff it has a mask. Flat pieces of whole canonical blocks."""
        ...

    def mask_sum(
        self,
        request: Relaxed,
        sums: BlockSums,
        piece: Piece,
        logits: TensorView,
        *,
        compute: DType,
        threads: int,
    ) -> None:
        """The sum of the mask m of ops.learned.Relaxed, in slot 0. Flat pieces of whole canonical blocks."""
        ...

    def mask_merge(
        self,
        request: MaskMerge,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        gradient: TensorView | None,
        logits: TensorView,
        out: TensorView,
        *,
        compute: DType,
        threads: int,
    ) -> None:
        """See ops.learned.MaskMerge; gradient iff it asks for dz. Flat pieces that begin at a multiple of 4."""
        ...


def load(name: str) -> Backend:
    """The backend module called `name`."""
    if name not in NAMES:
        raise ArgumentError(
            "unknown backend", code="backend.unknown", expected="auto, " + ", ".join(NAMES), got=repr(name)
        )
    missing = "torch" if name != "cpu" else ""
    if missing and importlib.util.find_spec(missing) is None:
        raise BackendError(f"backend '{name}' needs {missing}, which is not installed", code="backend.missing")
    return importlib.import_module(f".{name}", __package__)


def requested(argument: str | None = None) -> str | None:
    """The backend asked for: the argument, else the context manager, else MERGEKERNELS_BACKEND; None for auto."""
    for value in (argument, _context.get(), os.environ.get("MERGEKERNELS_BACKEND")):
        if value:
            return None if value == "auto" else value
    return None


def pick(op: str, views: Sequence[TensorView], request: str | None = None, device: str = "cpu") -> tuple[str, Backend]:
    """The backend for an op on these views.

    request : as from `requested`. device : where the call computes, if there are no views to tell.

    Raises
    ------
    BackendError : the backend asked for cannot run it, with its reason; or none can, with every reason.
    """
    if request is not None:
        backend = load(request)
        reason = backend.why_not(op, views)
        if reason is not None:
            raise BackendError(
                f"backend '{request}' cannot run {op}: {reason}",
                code="backend.cannot",
                hint="Ask for another backend, or for auto.",
            )
        return request, backend
    kind = (views[0].device if views else device).split(":")[0]
    reasons = []
    for name in _ORDER.get(kind, ()):
        try:
            backend = load(name)
            reason = backend.why_not(op, views)
        except (BackendError, ImportError) as error:
            if getattr(error, "code", "") == "backend.isa":
                # An instruction set is asked for by name too: nothing takes its place.
                raise
            reason = str(error)
        if reason is None:
            _log.debug("%s: %s", op, name)
            return name, backend
        reasons.append(f"{name}: {reason}")
    raise BackendError(
        f"no backend can run {op} on {kind}",
        code="backend.none",
        got="; ".join(reasons) or "no backend for this kind of device",
    )


def require(backend: Backend, needs: frozenset[str]) -> None:
    """Refuse a pass that a backend cannot run.

    Raises
    ------
    BackendError : naming what it lacks.
    """
    missing = needs - backend.FEATURES
    if missing:
        name = getattr(backend, "__name__", type(backend).__name__).rpartition(".")[2]
        raise BackendError(
            f"backend '{name}' cannot run this pass",
            code="backend.feature",
            got="it lacks " + ", ".join(sorted(missing)),
            hint="Ask for another backend, or for auto.",
        )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the block with one backend ("auto" for the default table).

    Raises
    ------
    ArgumentError : no such backend.
    """
    if name != "auto" and name not in NAMES:
        load(name)
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)
