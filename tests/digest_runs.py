"""Merges of `method_cases` in every way that must give the same bytes."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch

import mergekernels as mk
from golden_family import digest, family
from method_cases import CASES

FILE = Path(__file__).parent / "golden" / "digests.json"
GOLDEN: dict[str, dict[str, str]] = json.loads(FILE.read_text()) if FILE.exists() else {}


def arguments(case_id: str, dtype: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the models, the keyword arguments of merge_state_dicts)."""
    case, models = CASES[case_id], family(dtype)
    rest: dict[str, Any] = {**case.params, "dialect": case.dialect, "seed": 7, "then": list(case.then)}
    rest["base"] = models["base"] if case.base else None
    if case.companions:
        rest[case.companions] = [models[f"importance_{m}"] for m in case.models]
    return [models[m] for m in case.models], rest


def merged(case_id: str, dtype: str, **options: Any) -> str:
    """The digest of a merge in memory."""
    models, rest = arguments(case_id, dtype)
    return digest(mk.merge_state_dicts(models, CASES[case_id].method, **rest, **options))


def cut(x: torch.Tensor, dim: int, seed: int) -> Any:
    """Uneven shards, one of them empty; a tensor without that dimension stays whole."""
    if x.dim() <= dim or x.numel() == 0:
        return x
    rng = random.Random(seed)
    places = sorted([0, *(rng.randrange(x.shape[dim] + 1) for _ in range(2)), x.shape[dim]])
    places.insert(2, places[2])
    return [x.narrow(dim, a, b - a).clone() for a, b in itertools.pairwise(places)]


def merged_sharded(case_id: str, dtype: str, dim: int, **options: Any) -> str:
    """The digest of a merge of shards, joined again."""
    models, rest = arguments(case_id, dtype)

    def shards(tensors: dict[str, Any] | None) -> dict[str, Any] | None:
        return tensors and {name: cut(x, dim, i) for i, (name, x) in enumerate(tensors.items())}

    rest["base"] = shards(rest["base"])
    for name in ("importance",):
        if name in rest:
            rest[name] = [shards(m) for m in rest[name]]
    found = mk.merge_state_dicts([shards(m) for m in models], CASES[case_id].method, shard_dim=dim, **rest, **options)
    return digest({k: torch.cat(v, dim) if isinstance(v, list) else v for k, v in found.items()})
