"""What PEFT's combination types share: their source, and where dialects differ."""

from __future__ import annotations

__all__ = ["DEVIATIONS", "PEFT"]

PEFT = "peft tuners/lora/model.py (add_weighted_adapter), utils/merge_utils.py"
"""Source of the combination types."""

DEVIATIONS = {
    "scale": "PEFT before 0.21.0 applies alpha / r twice in all types that end in an SVD; here it counts once in both "
    "dialects, as in 0.21.2",
    "rslora": "PEFT 0.21.2 copies use_rslora of the first adapter into the result, which is then too large by the "
    "square root of its rank; dialect peft multiplies by that, and no result asks for rsLoRA",
    "single": "PEFT treats a single adapter as type linear, so that it is neither pruned nor truncated; default treats "
    "it like several",
    "half": "PEFT rounds deltas and pruned values of half-precision adapters to half and returns float32 factors of an "
    "SVD; both dialects here compute in float32 and return the dtype of the adapters",
    "clamp": "svd_clamp depends on the signs of singular vectors; here the largest entry of each left vector is "
    "positive, in PEFT signs are LAPACK's",
    "ties": "PEFT leaves the survivors among equal magnitudes to topk; here Philox words decide",
    "masks": "masks come from Philox by (seed, tensor, adapter, element), PEFT draws from torch's global generator",
    "zero": "density 0 keeps nothing; PEFT divides by it under DARE, which gives NaN",
    "ranks": "PEFT compares the ranks in the configs, here each module's adapters must have one rank",
}
"""Where dialects differ from PEFT 0.21.2, or from each other."""
