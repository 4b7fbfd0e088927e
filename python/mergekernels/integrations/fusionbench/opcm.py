"""OPCM: FusionBench's stream of models, each projection from one symmetric decomposition."""

from __future__ import annotations

from typing import Any

import torch
from fusion_bench.method.opcm.opcm import OPCMForCLIP as TheirOPCMForCLIP
from fusion_bench.method.opcm.opcm_general import OPCM as TheirOPCM

from ..._methods.spectral.opcm import project_away

__all__ = ["OPCM", "OPCMForCLIP", "projected"]


def projected(
    merged: torch.Tensor,
    pretrained: torch.Tensor,
    task: torch.Tensor,
    alpha: float,
    device: Any,
    before: float,
    after: float,
) -> torch.Tensor:
    """The next merged weight: what the new task vector has in common with the merge so far is removed from it.

    before, after : lambda of the last step and of this one.
    """
    wide = torch.promote_types(merged.dtype, torch.float32)
    base = pretrained.to(device, wide)
    so_far, new = merged.to(device, wide) - base, task.to(device, wide) - base
    tol = min(1e-5, 1.2e-7 * max(so_far.shape))
    cleaned, _ = project_away(so_far, new, alpha, tol)
    return (base + (before * so_far + cleaned) / after).to(merged.device, merged.dtype)


class OPCM(TheirOPCM):  # type: ignore[misc]
    """FusionBench's general OPCM; parameters as there. With ray actors, FusionBench's own."""

    def merge_linear_weights(
        self, merged_W: torch.Tensor, pretrained_W: torch.Tensor, task_W: torch.Tensor, param_name: str, alpha: float
    ) -> tuple[str, torch.Tensor]:
        """(name of the module, its merged weight)."""
        device = self.fabric.device
        weight = projected(merged_W, pretrained_W, task_W, alpha, device, self.previous_lambda_t, self.lambda_t)
        return param_name.rpartition(".")[0], weight


class OPCMForCLIP(TheirOPCMForCLIP):  # type: ignore[misc]
    """FusionBench's OPCM for CLIP, which evaluates between the steps; parameters as there."""

    def merge_linear_weights(
        self,
        merged_W: torch.Tensor,
        pretrained_W: torch.Tensor,
        task_W: torch.Tensor,
        param_name: str,
        alpha: float,
        accelerator: Any = "cpu",
    ) -> torch.Tensor:
        """The merged weight."""
        return projected(merged_W, pretrained_W, task_W, alpha, accelerator, self.previous_lambda_t, self.lambda_t)
