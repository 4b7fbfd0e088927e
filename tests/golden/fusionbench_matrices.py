"""FusionBench's spectral methods on the kit's matrices. For the Python of an environment that has fusion-bench."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from make_kit import Case, case
from matrix_inputs import MATRICES, MATRIX_MODELS, matrices

__all__ = ["fusionbench_matrices"]

_FIELDS: dict[str, Any] = {"norm": "frobenius", "bound": 1e-5}


def _case(id_: str, method: str, **fields: Any) -> Case:
    return {**case(id_, method, **{**_FIELDS, **fields}), "models": list(MATRIX_MODELS[1:]), "base": "mbase"}


CASES = [
    _case("tsv_m", "tsv_m", params={"lambda": 0.7}),
    _case("iso_c", "iso_c", params={"lambda": 0.7}),
    _case("iso_cts", "iso_cts", params={"lambda": 0.7, "common_space_fraction": 0.8}),
    # It treats singular vectors one by one; those of neighbouring values are noise in a float32 decomposition.
    _case("opcm", "opcm", params={"alpha": 0.5}, dtype="float64"),
    _case("knots", "knots", dialect="fusionbench", params={"inner": "ties", "density": 0.3, "lambda": 0.6}),
]

Tensors = dict[str, torch.Tensor]


def fusionbench_matrices(folder: Path) -> Iterator[tuple[Case, Tensors]]:
    """Every case, in float32."""
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

    family = matrices(folder)
    base = family["mbase"]
    deltas = [{n: family[m][n] - base[n] for n in MATRICES} for m in MATRIX_MODELS[1:]]
    for entry in CASES:
        params = entry["params"]
        with contextlib.redirect_stdout(io.StringIO()):
            if entry["method"] == "tsv_m":
                merged = compute_and_sum_svd_mem_reduction(_copy(deltas), accelerator="cpu")
            elif entry["method"] == "iso_c":
                merged = iso_c(_copy(deltas), accelerator="cpu")
            elif entry["method"] == "iso_cts":
                merged = iso_cts(_copy(deltas), params["common_space_fraction"], accelerator="cpu")
            elif entry["method"] == "opcm":
                yield entry, _opcm(matrices(folder, torch.float64), params["alpha"])
                continue
            else:
                merged = _knots(deltas, params["density"])
        found = {n: base[n] + params["lambda"] * merged[n] for n in merged if "/" not in n}
        yield entry, found | {n: x for n, x in merged.items() if "/" in n}


def _copy(deltas: list[Tensors]) -> list[Tensors]:
    return [{n: x.clone() for n, x in d.items()} for d in deltas]


def _knots(deltas: list[Tensors], density: float) -> Tensors:
    """Its basis, then its TIES over the right parts of all matrices; the mean of what is no matrix."""
    from fusion_bench.method.knots.knots_utils import subspace_alignment
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    names = sorted(n for n in MATRICES if len(MATRICES[n]) == 2)
    found: Tensors = {}
    parts: dict[str, list[torch.Tensor]] = {}
    bases = {}
    for n in names:
        u, s, right = subspace_alignment([d[n] for d in deltas])
        bases[n] = u
        parts[n] = [s[:, None] * v for v in right]
        found[f"singular_values/{n}"] = s
    flat = torch.stack([torch.cat([parts[n][t].flatten() for n in names]) for t in range(len(deltas))])
    merged = ties_merging(flat, density * 100, "mean")
    for n, piece in zip(names, torch.split(merged, [parts[n][0].numel() for n in names])):  # noqa: B905
        found[n] = bases[n] @ piece.reshape(parts[n][0].shape)
    for n in set(MATRICES) - set(names):
        found[n] = sum(d[n] for d in deltas) / len(deltas)  # type: ignore[assignment]
    return found


def _opcm(family: dict[str, Tensors], alpha: float) -> Tensors:
    """Its two rules for weights, in the order of the models, and its rescaling to the mean norm so far."""
    from transformers.models.clip import modeling_clip

    # Newer versions of transformers lack a name that other modules of the package import, not these two rules.
    modeling_clip.CLIPVisionTransformer = getattr(modeling_clip, "CLIPVisionTransformer", object)
    from fusion_bench.method.opcm.opcm import OPCMForCLIP

    base = family["mbase"]
    merged = {n: x.clone() for n, x in family["m1"].items()}
    norms = [_norm(merged, base)]
    state = SimpleNamespace(previous_lambda_t=1, lambda_t=1)
    for model in MATRIX_MODELS[2:]:
        norms.append(_norm(family[model], base))
        mean = sum(norms) / len(norms)
        state.lambda_t = 1
        for n, shape in MATRICES.items():
            if len(shape) == 2:
                merged[n] = OPCMForCLIP.merge_linear_weights(state, merged[n], base[n], family[model][n], n, alpha)
            else:
                merged[n] = OPCMForCLIP.merge_other_parameters(state, merged[n], base[n], family[model][n], n)
        size = _norm(merged, base)
        state.previous_lambda_t = size / mean
        merged = {n: base[n] + (x - base[n]) * (mean / size) for n, x in merged.items()}
    return merged


def _norm(model: Tensors, base: Tensors) -> float:
    return float(torch.linalg.norm(torch.cat([(model[n] - base[n]).flatten() for n in sorted(MATRICES)])))
