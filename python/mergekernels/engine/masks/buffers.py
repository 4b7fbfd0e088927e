"""Integer tensors, of which masks hold nothing."""

from __future__ import annotations

from math import prod

from ..context import Context, OpenTensor, Worker

__all__ = ["warn_of_unequal"]


def warn_of_unequal(ctx: Context, worker: Worker) -> None:
    """A warning for each integer tensor of an expert that differs from the base's, which it gets back instead."""
    for tensor in ctx.plan.merge.tensors:
        if tensor.action != "buffer" or tensor.base is None:
            continue
        source = OpenTensor(ctx, tensor, prod(tensor.shape))
        source.open()
        try:
            if not _equal(source, worker):
                ctx.warn(f"tensor '{tensor.name}': values differ between the inputs; every expert gets the base's back")
        finally:
            source.close()


def _equal(source: OpenTensor, worker: Worker) -> bool:
    base = source.num_models
    size, room = source.streams[base].nbytes, len(worker.tiles.out)
    for start in range(0, size, room):
        own = worker.tiles.out[: min(room, size - start)]
        other = worker.tiles.memory[0][: len(own)]
        source.read_bytes(worker, base, own, start)
        for m in range(base):
            source.read_bytes(worker, m, other, start)
            if other != own:
                return False
    return True
