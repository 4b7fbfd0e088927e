"""FusionBench on the kit's inputs. For the Python of an environment that has fusion-bench."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from make_kit import MODELS, SHAPES, Case, case, inputs

CASES = [
    case("ties", "ties", dialect="paper", params={"density": 0.2, "lambda": 0.3, "merge_function": "sum"}),
    case("ties-mean", "ties", dialect="paper", params={"density": 0.4}),
    case("ties-max", "ties", dialect="paper", params={"density": 0.3, "lambda": 0.7, "merge_function": "max"}),
    case("magmax", "magmax", params={"lambda": 0.5}),
    case("emr", "emr"),
    case("model_stock", "model_stock", "ac", dialect="fusionbench", bound=2**-17),
    case("expo", "expo", "a", params={"extrapolation_factor": 0.3}),
    case("fisher", "fisher", base=False, params={"weight": [1.0, 0.5, 2.0], "normalize_fisher": True}, bound=2**-20),
    case("fisher-raw", "fisher", base=False, params={"weight": [1.0, 0.5, 2.0], "normalize_fisher": False}),
    case("slerp", "slerp", "a", params={"t": 0.7}, bound=2**-19),
]


def fusionbench(folder: Path) -> Iterator[tuple[Case, dict[str, torch.Tensor]]]:
    """FusionBench's functions, in float32."""
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    from fusion_bench.method.magmax.magmax import _magmax_select
    from fusion_bench.method.model_stock.model_stock import compute_angle, compute_ratio, merge_weights
    from fusion_bench.method.slerp.slerp_utils import slerp
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    family = inputs(folder)
    base = family["base"]
    names = sorted(SHAPES)
    deltas = [{n: family[m][n] - base[n] for n in names} for m in MODELS[1:]]
    for entry in CASES:
        method, params = entry["method"], entry["params"]
        if method == "ties":
            flat = torch.stack([torch.cat([d[n].flatten() for n in names]) for d in deltas])
            with contextlib.redirect_stdout(io.StringIO()):
                merged = ties_merging(flat, params["density"] * 100, params.get("merge_function", "mean"))
            pieces = torch.split(params.get("lambda", 1.0) * merged, [base[n].numel() for n in names])
            found = {n: base[n] + p.reshape(base[n].shape) for n, p in zip(names, pieces)}  # noqa: B905
        elif method == "magmax":
            chosen = _magmax_select(deltas)
            found = {n: base[n] + params["lambda"] * chosen[n] for n in names}
        elif method == "emr":
            unified, masks, scales = emr_merge(deltas)
            found = {n: base[n] + unified[n] for n in names}
            found |= {
                f"expert_{m}/{n}": base[n] + scales[t] * (masks[n][t] * unified[n])
                for t, m in enumerate(MODELS[1:])
                for n in names
            }
        elif method == "model_stock":
            first, second = (family[m] for m in entry["models"])
            ratio = compute_ratio(compute_angle(first, second, base))
            found = {n: x.float() for n, x in merge_weights(first, second, base, ratio).items()}
        elif method == "expo":
            x, a = family["a"], params["extrapolation_factor"]
            found = {n: x[n] + a * (x[n] - base[n]) for n in names}
        elif method == "fisher":
            models = {n: [family[m][n] for m in entry["models"]] for n in names}
            weights = [family[f"importance_{m}"] for m in entry["models"]]
            found = merging_with_fisher_weights(
                models, weights, torch.tensor(params["weight"]), params["normalize_fisher"]
            )
        else:
            found = {n: slerp(params["t"], base[n], family["a"][n]) for n in names}
        yield entry, found
