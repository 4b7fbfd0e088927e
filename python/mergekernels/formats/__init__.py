"""Bytes to tensors and back: safetensors headers, checkpoint folders, the hub cache. Knows no method."""

from __future__ import annotations

from .checkpoint import Checkpoint, ShardFile, TensorInfo, open_checkpoint

__all__ = ["Checkpoint", "ShardFile", "TensorInfo", "open_checkpoint"]
