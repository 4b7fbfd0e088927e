"""One or more merges for every method: what the golden digests, the engine and the backends are tested with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodCase:
    """A merge of models of `golden_family`. params: keywords of the library call."""

    method: str
    params: dict[str, Any] = field(default_factory=dict)
    models: str = "abc"
    base: bool = True
    dialect: str = "default"
    companions: str = ""
    then: tuple[tuple[str, dict[str, Any]], ...] = ()


W = [1.0, 0.5, 0.75]

CASES: dict[str, MethodCase] = {
    "linear": MethodCase("linear", {"weights": W}, base=False),
    "task_arithmetic": MethodCase("task_arithmetic", {"weights": [1.0, -0.5, 0.7], "scale": 0.6}),
    "ties": MethodCase("ties", {"weights": W, "density": 0.2}),
    "ties-rescale": MethodCase("ties", {"weights": W, "density": [0.2, 0.5, 1.0], "rescale": True}),
    "ties-model": MethodCase("ties", {"weights": W, "density": 0.3, "scope": "model"}),
    "ties-paper": MethodCase("ties", {"density": 0.2}, dialect="paper"),
    "ties-peft": MethodCase("ties", {"weights": W, "density": 0.4}, dialect="peft"),
    "dare_linear": MethodCase("dare_linear", {"weights": W, "density": 0.3}),
    "dare_linear-peft": MethodCase("dare_linear", {"weights": W, "density": 0.3}, dialect="peft"),
    "dare_ties": MethodCase("dare_ties", {"weights": W, "density": [0.3, 0.5, 1.0]}),
    "dare_ties-paper": MethodCase("dare_ties", {"density": 0.5}, dialect="paper"),
    "della": MethodCase("della", {"weights": W, "density": 0.5, "epsilon": 0.1}),
    "della_linear": MethodCase("della_linear", {"weights": W, "density": [0.4, 0.6, 1.0], "epsilon": 0.1}),
    "della_linear-paper": MethodCase("della_linear", {"weights": W, "density": 0.5, "epsilon": 0.1}, dialect="paper"),
    "breadcrumbs": MethodCase("breadcrumbs", {"weights": W, "density": 0.8, "gamma": 0.05}),
    "breadcrumbs-paper": MethodCase("breadcrumbs", {"weights": W, "density": 0.2, "gamma": 0.05}, dialect="paper"),
    "breadcrumbs_ties": MethodCase("breadcrumbs_ties", {"weights": W, "density": 0.5, "gamma": 0.1}),
    "sce": MethodCase("sce", {"select_topk": 0.4}),
    "sce-paper": MethodCase("sce", {"select_topk": 0.3}, dialect="paper"),
    "ram": MethodCase("ram", {"epsilon": 1e-3}),
    "ramplus_tl": MethodCase("ramplus_tl", {"epsilon": 1e-3, "r": 0.3, "alpha": 0.5}),
    "ramplus_tl-paper": MethodCase("ramplus_tl", {"epsilon": 1e-3}, dialect="paper"),
    "nearswap": MethodCase("nearswap", {"t": 1e-3}, "a"),
    "arcee_fusion": MethodCase("arcee_fusion", {}, "a"),
    "passthrough": MethodCase("passthrough", {"scale": 0.5}, "a", base=False),
    "magmax": MethodCase("magmax"),
    "emr": MethodCase("emr"),
    "consensus": MethodCase("consensus", {"threshold": 0.3, "at_least": 2}),
    "tall_mask": MethodCase("tall_mask", {"inner": "ties", "density": 0.3}),
    "lines": MethodCase("ties", {"weights": W, "density": 0.3}, then=(("lines", {"alpha": 0.2}),)),
    "lines-multi": MethodCase("task_arithmetic", {"weights": [1.0, 1.0, 1.0]}, then=(("lines", {"beta": 0.5}),)),
    "expo": MethodCase("expo", {"extrapolation_factor": 0.3}, "a"),
    "deme": MethodCase("deme", {"weights": [0.2, 0.3, 0.5]}),
    "pcb": MethodCase("pcb", {"ratio": 0.1}),
    "fisher": MethodCase("fisher", {"weights": W}, base=False, companions="importance"),
    "slerp": MethodCase("slerp", {"t": 0.4}, "a"),
    "nuslerp": MethodCase("nuslerp", {"weights": [1.0, 0.4]}, "ac", base=False),
    "nuslerp-rows": MethodCase("nuslerp", {"weights": [0.3, 0.7], "nuslerp_flatten": False}, "ac"),
    "nuslerp-columns": MethodCase(
        "nuslerp", {"weights": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True}, "ac"
    ),
    "multislerp": MethodCase("multislerp", {"weights": W}),
    "karcher": MethodCase("karcher", {}, base=False),
    "model_stock": MethodCase("model_stock"),
    "model_stock-rows": MethodCase("model_stock", {"filter_wise": True}),
    "model_stock-fusionbench": MethodCase("model_stock", {}, dialect="fusionbench"),
    "pcgrad": MethodCase("pcgrad"),
    "from_norm": MethodCase("from_norm", {"k": 2.0}),
}
