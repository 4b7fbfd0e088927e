"""karcher: the Riemannian mean of directions on the sphere, rescaled."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from .gram import Combine, Rule, cosine, norm_of, symmetric
from .protocol import MethodInfo, Param, Spec

__all__ = ["Karcher"]

_log = logging.getLogger("mergekernels")


class Karcher(Combine):
    """The point on the sphere with the least sum of squared angles to the tensors, times their mean norm."""

    info = MethodInfo(
        name="karcher",
        purpose="Mean of directions on the sphere (Riemannian centre of mass), at the mean length.",
        formula="ut = xt / |xt|, u = the normalised mean of the ut; repeat: q = <u, ut>, th = acos q, V = mean of th / "
        "sin th (ut - q u), stop if |V| < tol, u = cos|V| u + sin|V| V / |V|, normalised; y = (mean of |xt|) u",
        params=(
            Param("max_iter", "int", "steps at most", default=10, low=1),
            Param("tol", "float", "angle (and norm) below which nothing is done", default=1e-5, low=0.0),
        ),
        base="input",
        passes="2 reads of every tensor, 1 write, whatever the number of steps",
        source="Karcher 1977, Riemannian center of mass and mollifier smoothing; mergekit merge_methods/karcher.py",
        dialects={"default": "mergekit 0.1.5's rules; all steps in the Gram matrix, in float64"},
        deviations=(
            "mergekit iterates on whole tensors in their dtype and stops at once on models that are nearly parallel "
            "in bfloat16; here steps are taken in float64",
            "a tensor opposite to the mean within tol is left out of the step with a warning; mergekit takes a step "
            "without bound",
        ),
        tier="T1",
    )

    def rule(self, spec: Spec) -> Rule:
        """The coefficients after the last step."""
        tol, max_iter, num_models = spec.params["tol"], spec.params["max_iter"], spec.num_models

        def rule(entries: Sequence[float]) -> Sequence[float]:
            if num_models == 1:
                return (1.0,)
            gram = symmetric(entries, num_models)
            norms = [math.sqrt(gram[t][t]) for t in range(num_models)]
            valid = [t for t in range(num_models) if norms[t] > tol and norms[t] > 0.0]
            if not valid:
                return (0.0,) * num_models
            cosines = [[1.0 if i == j else cosine(gram[i][j], norms[i], norms[j]) for j in valid] for i in valid]
            unit = _mean_direction(cosines, tol, max_iter, spec.name)
            length = math.fsum(norms) / num_models
            result = [0.0] * num_models
            for t, k in zip(valid, unit, strict=True):
                result[t] = length * k / norms[t]
            return result

        return rule


def _mean_direction(cosines: Sequence[Sequence[float]], tol: float, max_iter: int, name: str) -> list[float]:
    """The coefficients of the mean over unit vectors with these cosines."""
    count = len(cosines)
    alpha = 1.0 / count
    u = [alpha] * count
    length, noise = norm_of(u, cosines)
    u = [x / length for x in u] if length >= tol and length > noise else [1.0] + [0.0] * (count - 1)
    for _ in range(max_iter):
        step = [0.0] * count
        for t, row in enumerate(cosines):
            q = max(-1.0, min(1.0, math.fsum(k * c for k, c in zip(u, row, strict=True))))
            theta = math.acos(q)
            if theta < tol or theta == 0.0:
                continue
            if math.pi - theta < tol or math.sin(theta) <= 0.0:
                _log.warning("tensor '%s': a model is opposite to the Karcher mean and left out of a step", name)
                continue
            f = alpha * theta / math.sin(theta)
            step[t] += f
            for j in range(count):
                step[j] -= f * q * u[j]
        length = norm_of(step, cosines)[0]
        if length < tol or length == 0.0:
            break
        u = [math.cos(length) * k + math.sin(length) / length * v for k, v in zip(u, step, strict=True)]
        length = norm_of(u, cosines)[0]
        if length > tol:
            u = [k / length for k in u]
    return u
