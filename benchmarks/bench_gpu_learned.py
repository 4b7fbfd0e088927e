"""Learned coefficients and masks on a GPU, a part of bench_gpu.py: the passes of a training step over one matrix.

Every result is compared with the cpu backend's, bit for bit, before it is timed. Beside it: the relaxed mask, forward
and backward, in eager torch on the same GPU. Bytes are the least that must move: every input once, the output once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mergekernels.ops import combine, concrete, seg_dot

COEFFICIENTS = (0.5, 0.3, 0.2)
GROUPS = 16
Timer = Callable[..., dict[str, float]]


class Learned:
    """One matrix with its experts (bfloat16), a gradient of the merged weights, and logits in float32."""

    def __init__(self, base: torch.Tensor, models: list[torch.Tensor]) -> None:
        draw = torch.Generator("cuda").manual_seed(8)
        self.gradient = (1e-3 * torch.randn(base.shape, generator=draw, device="cuda")).bfloat16()
        self.logits = torch.randn(base.shape, generator=draw, device="cuda")
        self.base, self.models = base, models
        self.expected = {name: call() for name, call in self.calls("cpu", "cpu").items()}

    def calls(self, backend: str, device: str) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
        """What is timed, by name."""
        base, gradient = self.base.to(device), self.gradient.to(device)
        models = [m.to(device) for m in self.models]
        z = self.logits.to(device).requires_grad_()
        c = torch.tensor(COEFFICIENTS, device=device, requires_grad=True)
        masked = concrete(models, c, z, base=base, backend=backend)
        return {
            "combine": lambda: (combine(models, c.detach(), base=base, backend=backend),),
            "seg_dot": lambda: (seg_dot(gradient, models, base=base, backend=backend),),
            f"seg_dot x{GROUPS}": lambda: (seg_dot(gradient, models, base=base, groups=GROUPS, backend=backend),),
            "concrete": lambda: (concrete(models, c.detach(), z.detach(), base=base, backend=backend),),
            "its backward": lambda: torch.autograd.grad(masked, (c, z), gradient, retain_graph=True),
        }

    def least_bytes(self) -> list[int]:
        """Of each call, in order. A mask is read once for its mean and once for its use."""
        n = self.base.numel()
        merge, dots, logits = 2 * 5 * n, 2 * 5 * n, 4 * n
        return [merge, dots, dots, merge + 2 * logits, (dots + logits) + (dots + 2 * logits)]

    def measure(self, backend: str, bandwidth: float, milliseconds: Timer) -> dict[str, Any]:
        """Correctness, then times, of one backend."""
        result: dict[str, Any] = {}
        for (name, call), moved in zip(self.calls(backend, "cuda").items(), self.least_bytes(), strict=True):
            for got, want in zip(call(), self.expected[name], strict=True):
                same = torch.equal(got.cpu().reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))
                assert same, f"{backend}: {name} differs from the cpu backend"
            timing = milliseconds(call, repeats=10)
            rate = moved / timing["median_ms"] / 1e6
            result[name] = {
                **timing,
                "least_bytes": moved,
                "gb_per_s": rate,
                "percent_of_copy": 100 * rate / bandwidth,
            }
            share = 100 * rate / bandwidth
            print(f"{backend:8} {name:12} {timing['median_ms']:9.3f} ms  {rate:7.0f} GB/s  {share:5.1f} %")
        return result

    def eager(self) -> Any:
        """Forward and backward of the relaxed mask as one writes it in torch."""
        c = torch.tensor(COEFFICIENTS, device="cuda", requires_grad=True)
        z = self.logits.detach().requires_grad_()
        u = torch.rand_like(self.logits)
        m = torch.sigmoid((z + torch.log(u) - torch.log(1 - u)) / 0.5)
        m = m / m.mean()
        y = self.base + sum(ct * m * (x - self.base) for ct, x in zip(c, self.models, strict=True))
        return torch.autograd.grad(y, (c, z), self.gradient.to(y.dtype))
