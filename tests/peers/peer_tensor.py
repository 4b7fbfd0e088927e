"""Runs in the peer's environment: TensorLy's factorisations of dense tensors, in float64 on numpy.

usage: python peer_tensor.py IN OUT. IN is a safetensors file with `x` (T, m, n), `c0`, `u0`, `v0`, and metadata sweeps
(comma-separated), iterations, p, p2. OUT gets, per number of sweeps k, `model k` and `errors k` from that start; `own`
and `own start i` from TensorLy's SVD start, and `tucker`, the tensor as its partial Tucker form says it.
"""

from __future__ import annotations

import sys

import numpy as np
import tensorly as tl
from safetensors import safe_open
from safetensors.numpy import save_file
from tensorly.decomposition import parafac, partial_tucker
from tensorly.decomposition._cp import initialize_cp
from tensorly.tenalg import multi_mode_dot

with safe_open(sys.argv[1], "np") as file:
    given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    options = file.metadata()
x, start = given["x"], [given[name] for name in ("c0", "u0", "v0")]
rank = start[0].shape[1]
found: dict[str, np.ndarray] = {}
for sweeps in map(int, options["sweeps"].split(",")):
    cp, errors = parafac(
        x, rank, n_iter_max=sweeps, init=(None, [f.copy() for f in start]), tol=0.0, return_errors=True
    )
    found[f"model {sweeps}"] = tl.cp_to_tensor(cp)
    found[f"errors {sweeps}"] = np.array([float(e) for e in errors])
own = initialize_cp(x, rank, init="svd", random_state=np.random.RandomState(0))
for i, factor in enumerate(own.factors):
    found[f"own start {i}"] = factor.copy()
cp = parafac(x, rank, n_iter_max=int(options["iterations"]), init=own, tol=1e-10)
found["own"] = tl.cp_to_tensor(cp)
(core, bases), _ = partial_tucker(
    x, rank=[int(options["p"]), int(options["p2"])], modes=[1, 2], n_iter_max=500, tol=1e-12
)
found["tucker"] = multi_mode_dot(core, bases, modes=[1, 2])
save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, sys.argv[2])
