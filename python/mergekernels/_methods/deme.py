"""deme: fold copies of a diffusion model, each tuned on a range of timesteps, into one."""

from __future__ import annotations

from ..ops.program import Program
from .common import Direct, check_factors, weight
from .protocol import Coeffs, MethodInfo, Spec

__all__ = ["Deme"]


class Deme(Direct):
    """y = x0 + sum of w_t d_t."""

    info = MethodInfo(
        name="deme",
        purpose="Fold copies of a diffusion model, each tuned on a range of timesteps, into one.",
        formula="y = x0 + w1 d1 + ... + wT dT with dt = xt - x0, one weight per range of timesteps",
        params=(weight("weight of each range of timesteps, found by a search; they need not sum to 1"),),
        base="required",
        modifiable=True,
        passes="1 read of the base and every model, 1 write",
        source="Ma et al. 2024, Decouple-then-merge: towards better training for diffusion models, arXiv 2410.06664; "
        "MqLeet/DeMe merge.py",
        dialects={"default": "the authors' code"},
        deviations=("the merge step only; the search for the weights is the caller's",),
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The weighted sum of deltas on top of the base."""
        check_factors(spec, "weight")
        return Program(spec.params["weight"], (None,) * spec.num_models)
