"""What is merged by PEFT and by us: sets of adapters, types and their options."""

from __future__ import annotations

from typing import Any

__all__ = ["CASES", "SETS", "SHAPES", "case"]

ALL = ["embed", "q_proj", "c_attn", "conv", "head"]
SHAPES = {
    "embed.weight": (50, 24),
    "q_proj.weight": (32, 24),
    "c_attn.weight": (24, 40),
    "conv.weight": (28, 8, 3, 3),
    "head.weight": (26, 36),
}


def _lora(r: int, alpha: float, targets: list[str] = ALL, **fields: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": alpha, "target_modules": targets, **fields}


SETS: dict[str, list[dict[str, Any]]] = {
    "equal": [_lora(4, 6), _lora(4, 8), _lora(4, 1)],
    "mixed": [
        _lora(2, 4),
        _lora(8, 8, use_rslora=True),
        _lora(5, 20, rank_pattern={"head": 20, "conv": 3}, alpha_pattern={"embed": 2}),
    ],
    "partial": [_lora(4, 6), _lora(4, 3, ["q_proj", "embed"]), _lora(4, 2, ["conv", "q_proj", "c_attn"])],
    "leaky": [_lora(4, 6, use_rslora=True), _lora(4, 8)],
    "one": [_lora(4, 6)],
}
_EQUAL = ("linear", "magnitude_prune", "dare_linear", "ties", "dare_ties")
_ANY = ("cat", "svd", "magnitude_prune_svd", "dare_linear_svd", "ties_svd", "dare_ties_svd")
_WEIGHTS = {
    "equal": [1.0, -0.7, 2.5],
    "mixed": [0.5, 1.5, -2.0],
    "partial": [1.0, 0.3, -1.0],
    "leaky": [1.0, 0.5],
    "one": [1.3],
}


def case(name: str, set_: str, type_: str, **options: Any) -> dict[str, Any]:
    """One call. options : PEFT's, by its names."""
    if type_ not in ("linear", "cat", "svd"):
        options = {"density": 0.3, **options}
    return {"name": name, "set": set_, "type": type_, "weights": _WEIGHTS[set_], "options": options}


CASES = [
    *(case(f"{s}-{t}", s, t) for s in ("equal", "partial", "leaky", "one") for t in (*_EQUAL, *_ANY)),
    *(case(f"mixed-{t}", "mixed", t) for t in _ANY),
    *(case(f"mixed-{t}-9", "mixed", t, svd_rank=9) for t in _ANY if t != "cat"),
    *(case(f"equal-{t}-vote", "equal", t, majority_sign_method="frequency") for t in _EQUAL + _ANY if "ties" in t),
    *(case(f"equal-{t}-all", "equal", t, density=1.0) for t in _EQUAL + _ANY if "_" in t or "ties" in t),
    case("leaky-svd-7", "leaky", "svd", svd_rank=7),
]
