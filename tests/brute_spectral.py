"""Element-wise and spectral rules by dense float64 algebra: slow, whole matrices, no shortcuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Matrix = torch.Tensor


def signs(u: Matrix) -> Matrix:
    """Columns with their largest entry positive."""
    top = u.gather(0, u.abs().argmax(0, keepdim=True))
    return u * torch.where(top < 0, -1.0, 1.0)


def left_basis(x: Matrix, cut: float = 1e-9) -> Matrix:
    """Left singular vectors by a dense SVD, signs fixed. cut : relative."""
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)
    return signs(u[:, s > cut * s[0]]) if len(s) else u


def kept(x: Matrix, count: int) -> Matrix:
    """The entries of at least the count-th largest magnitude."""
    if count >= x.numel():
        return x
    tau = x.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(x.abs() >= tau, x, torch.zeros_like(x))


def ties(parts: Mapping[str, Sequence[Matrix]], density: float, weights: Sequence[float]) -> dict[str, Matrix]:
    """The authors' TIES over the concatenation of all modules: int(density n) + 1 entries of each model and all that
    equal the last, unweighted votes, zero takes the majority, the mean of what agrees with weights after the vote."""
    names = sorted(parts)
    vectors = [torch.cat([parts[n][t].double().flatten() for n in names]) for t in range(len(weights))]
    n = len(vectors[0])
    trimmed = torch.stack([v if density >= 1 else kept(v, min(n, int(density * n) + 1)) for v in vectors])
    return _split(_elect(trimmed, weights), parts, names)


def _elect(trimmed: Matrix, weights: Sequence[float]) -> Matrix:
    sign = trimmed.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    w = torch.tensor(weights, dtype=torch.float64)[:, None]
    return (w * trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)


def _split(merged: Matrix, parts: Mapping[str, Sequence[Matrix]], names: Sequence[str]) -> dict[str, Matrix]:
    found, at = {}, 0
    for name in names:
        shape = parts[name][0].shape
        count = parts[name][0].numel()
        found[name] = merged[at : at + count].reshape(shape)
        at += count
    return found


def polar(x: Matrix, cut: float = 1e-5) -> Matrix:
    """U V^T over the support."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    k = s > cut * s[0]
    return u[:, k] @ vh[k]


def flatten(x: Matrix, count: int, cut: float = 1e-5) -> Matrix:
    """polar(x) times the nuclear norm over `count`."""
    s = torch.linalg.svdvals(x.double())
    return polar(x, cut) * float(s[s > cut * s[0]].sum()) / count


def tsv(parts: Sequence[Matrix], q: int, cut: float = 1e-5) -> Matrix:
    """TSV-M with k = q // T triplets of each task, on its support."""
    us, ss, vs = [], [], []
    for x in parts:
        u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
        k = min(q // len(parts), int((s > cut * s[0]).sum()))
        us.append(u[:, :k])
        ss.append(s[:k])
        vs.append(vh[:k])
    return polar(torch.cat(us, 1)) @ torch.diag(torch.cat(ss)) @ polar(torch.cat(vs, 0))
