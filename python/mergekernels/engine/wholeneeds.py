"""Memory for tensors that are merged whole."""

from __future__ import annotations

from .adapted import WORK_COPIES, factor_bytes, low_rank_sources
from .specs import Specs

__all__ = ["whole_bytes"]


def whole_bytes(specs: Specs, index: int) -> int:
    """Bytes that one tensor takes while it is merged whole: task vectors, the result, and what the method works with.

    An estimate for the work, which differs by method and route. Task vectors that are products stay factors.
    """
    spec, tensor = specs.spec(index), specs.merge.tensors[index]
    wide = spec.compute.itemsize
    if specs.layout(spec).plain:
        return spec.n * wide * (spec.num_models + 2)
    dense = spec.num_models - len(low_rank_sources(specs.merge, tensor))
    held = factor_bytes(specs.merge, tensor, spec.compute)
    return spec.n * (wide * (dense + 1) + 8 * WORK_COPIES) + 2 * held
