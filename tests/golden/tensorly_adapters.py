"""TensorLy's factorisations of the kit's adapters, as dense tensors in float64: what they say of the mean update.

Only cases whose best factorisation is found from many starts, so that reconstructions can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_kit import Case, case
from matrix_inputs import SITES, adapters, scale_of

__all__ = ["tensorly_adapters"]

_EQUAL, _MIXED = ("l1", "l2", "l3"), ("x1", "x2", "x3")


def _case(id_: str, method: str, models: tuple[str, ...] = _MIXED, **fields: Any) -> Case:
    entry = case(f"adapters-{id_}", method, norm="frobenius", takes="adapters", **{"bound": 1e-5, **fields})
    return {**entry, "models": list(models), "base": None}


_CP = {"n_starts": 12, "max_iter": 3000, "tol": 0.0}
CASES = [
    _case("tc_lora-1", "tc_lora", params={"cp_rank": 1, **_CP}),
    _case("tc_lora-2", "tc_lora", _EQUAL, params={"cp_rank": 2, **_CP}),
    _case("tc_lora-code", "tc_lora", _EQUAL, dialect="code", params={"cp_rank": 1, **_CP}),
    _case(
        "compress_then_merge",
        "compress_then_merge",
        params={"norm_share": 1.0, "frame_rank": 4, "max_iter": 300, "tol": 0.0},
    ),
]


def _cp(x: Any, rank: int) -> Any:
    """The reconstruction of least error of TensorLy's start by SVD and of eleven random ones."""
    import tensorly as tl
    from tensorly.decomposition import parafac

    best, least = None, np.inf
    for seed in range(12):
        found = parafac(x, rank, n_iter_max=3000, tol=0.0, init="random" if seed else "svd", random_state=seed)
        model = tl.cp_to_tensor(found)
        error = np.linalg.norm(model - x)
        if error < least:
            best, least = model, error
    return best


def _merged(entry: Case, pairs: list[tuple[Any, Any]]) -> Any:
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    deltas = np.stack([b @ a for b, a in pairs])
    params = entry["params"]
    if entry["method"] == "tc_lora" and entry["dialect"] == "code":
        b, a = (_cp(np.stack([pair[i] for pair in pairs]), params["cp_rank"]).mean(0) for i in range(2))
        return b @ a
    if entry["method"] == "tc_lora":
        return _cp(deltas, params["cp_rank"]).mean(0)
    rank = params["frame_rank"]
    (core, bases), _ = partial_tucker(deltas, rank=[rank, rank], modes=[1, 2], n_iter_max=3000, tol=0.0)
    return multi_mode_dot(core, bases, modes=[1, 2]).sum(0)


def tensorly_adapters(folder: Path) -> Iterator[tuple[Case, dict[str, torch.Tensor]]]:
    """Every case: deltas in the shape of the weights."""
    stored = adapters(folder)
    for entry in CASES:
        found = {}
        for m in SITES:
            pairs = []
            for t in entry["models"]:
                b, a = (x.double().numpy() for x in stored[t][m])
                pairs.append((b * (1.0 if entry["dialect"] == "code" else scale_of(t, m)), a))
            x = _merged(entry, pairs)
            found[m] = torch.from_numpy(x.T if m == "embed" else x).float()
        yield entry, found
