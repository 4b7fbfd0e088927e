"""The key `output: {kind: adapter}`: the merge of a recipe as task vectors of the modules that may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..._methods.protocol import Method
from ..._methods.whole import whole_of
from ...errors import InputError, MergeError
from ...formats.checkpoint import Checkpoint
from ...tensors import F64, DType, compute_dtype, dtype_of, promote
from ..adapted import AdaptedCheckpoint, low_rank_sources, module_of
from ..resolved import AdapterOutput, ResolvedMerge, ResolvedTensor, sources_of

__all__ = ["as_adapter", "refusals"]


def refusals(
    method: Method, base: bool, restacked: bool, adapters_only: bool, inputs: Sequence[Checkpoint]
) -> list[str]:
    """Sentences about why no adapter can come of this.

    adapters_only : the method merges adapters and nothing else.
    """
    found = []
    if not base or not (method.info.modifiable or whole_of(method) is not None):
        found.append(
            f"an adapter holds a task vector, and {method.info.name} makes none" if base else "needs a base_model"
        )
    if restacked:
        found.append("an adapter belongs to the layers of its base, which slices restack")
    if adapters_only and sum(not isinstance(c, AdaptedCheckpoint) for c in inputs) > 1:
        found.append(f"{method.info.name} merges adapters: every model must be base+adapter")
    return found


def as_adapter(
    merge: ResolvedMerge, output: AdapterOutput, dtype: str | None
) -> tuple[ResolvedMerge, list[MergeError]]:
    """The merge with the weights that may change, in the dtype in which they are computed, and what is wrong with it.

    dtype : torch's name of the dtype asked for, None for that of the adapters.
    """
    kept: list[ResolvedTensor] = []
    left: list[str] = []
    for tensor in merge.tensors:
        if tensor.action != "merge" or not _may_change(merge, tensor):
            continue
        if not tensor.name.endswith(".weight") or not 2 <= len(tensor.shape) <= 5 or 0 in tensor.shape:
            left.append(tensor.name)
            continue
        kept.append(replace(tensor, dtype=_compute(merge, tensor)))
    warnings = list(merge.warnings)
    if left:
        shown = ", ".join(f"'{n}'" for n in left[:5]) + (" ..." if len(left) > 5 else "")
        warnings.append(f"{len(left)} merged tensors can have no factors and are not in the adapter: {shown}")
    problems: list[MergeError] = []
    if not kept:
        problems.append(InputError("no weight that could have factors is changed by any model", code="output.empty"))
    asked = dtype_of(dtype or "")
    output = replace(output, dtype=(asked or _common(merge)).name)
    changed = replace(merge, tensors=tuple(kept), output=output, aliases={}, warnings=tuple(warnings))
    return changed, problems


def _may_change(merge: ResolvedMerge, tensor: ResolvedTensor) -> bool:
    """Whether some model has another value than the base."""
    same = low_rank_sources(merge, tensor)
    return any(
        slot not in same or module_of(merge.inputs[s.input], s.tensor) is not None
        for slot, s in enumerate(tensor.models)
    )


def _compute(merge: ResolvedMerge, tensor: ResolvedTensor) -> DType:
    if tensor.cast is not None:
        return compute_dtype([tensor.cast])
    dtypes = [merge.inputs[s.input].tensors[s.tensor].dtype for s in sources_of(tensor)]
    modules = (module_of(merge.inputs[s.input], s.tensor) for s in sources_of(tensor))
    return compute_dtype(dtypes + [F64 for m in modules if m is not None and m.dtype == "F64"])


def _common(merge: ResolvedMerge) -> DType:
    """The dtype of the adapters' factors; float32 without adapters, the wider one where they differ."""
    names = {m.dtype for c in merge.inputs if isinstance(c, AdaptedCheckpoint) for m in c.modules.values()}
    found = [d for n in sorted(names) if (d := dtype_of(n)) is not None]
    fallback = dtype_of("F32")
    assert fallback is not None
    return promote(found) if found else fallback
