"""The index of a folder of masks: what it holds, of what, with which digests and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, isfinite
from typing import Any, Literal

from ...tensors import DType, promote
from ..identity import input_identities, versions
from ..layout import OutputFile
from ..receipts import Receipt
from ..resolved import ResolvedMerge, Source
from .job import Found
from .layout import FORMAT

__all__ = ["contents", "experts_of", "scales_of"]


def scales_of(kind: Literal["agreeing", "useful"], models: int, found: Sequence[Found]) -> list[float]:
    """The factor of each expert: 1, or for EMR mean |d| over mean |v| under its mask, both summed over tensors."""
    if kind == "useful":
        return [1.0] * models
    scales = []
    for m in range(models):
        own = fsum(f.means[m][0] for f in found)
        kept = fsum(f.means[m][1] for f in found)
        scales.append(own / kept if kept and isfinite(own / kept) else 1.0)
    return scales


def experts_of(merge: ResolvedMerge, members: Sequence[int]) -> list[str]:
    """The names of the experts."""
    return [merge.inputs[s.input].label for s in merge.tensors[members[0]].models]


def contents(
    merge: ResolvedMerge,
    files: Sequence[OutputFile],
    receipts: Sequence[Receipt],
    found: Mapping[int, Found],
    scales: Sequence[float],
) -> dict[str, Any]:
    """The index. files : the vector's, then a file of masks per expert. found : by tensor, in the files' order."""
    by_file = {r.file: r for r in receipts}
    digests = [{t.name: t.sha256 for t in by_file[f.name].tensors} for f in files]
    identities = input_identities(merge)
    first = merge.tensors[next(iter(found))]
    assert first.base is not None
    experts = [
        {
            "name": merge.inputs[source.input].label,
            "path": identities[source.input]["path"],
            "file": file.name,
            "size": file.size,
            "sha256": by_file[file.name].sha256,
            "scale": scale,
        }
        for source, file, scale in zip(first.models, files[1:], scales, strict=True)
    ]
    vector = files[0]
    return {
        "format": FORMAT,
        "versions": versions(),
        "kind": merge.method,
        "dialect": merge.dialect,
        "recipe": merge.recipe,
        "base": identities[first.base.input],
        "vector": {"file": vector.name, "size": vector.size, "sha256": by_file[vector.name].sha256},
        "experts": experts,
        "tensors": [_tensor(merge, i, f.base_sha256, digests) for i, f in found.items()],
    }


def _tensor(merge: ResolvedMerge, index: int, base_sha256: str, digests: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    tensor = merge.tensors[index]
    assert tensor.base is not None

    def dtype(source: Source) -> DType:
        return merge.inputs[source.input].tensors[source.tensor].dtype

    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype.name,
        "restored": [(tensor.cast or promote([dtype(s), dtype(tensor.base)])).name for s in tensor.models],
        "base_sha256": base_sha256,
        "vector_sha256": digests[0][tensor.name],
        "mask_sha256": [d[tensor.name] for d in digests[1:]],
    }
