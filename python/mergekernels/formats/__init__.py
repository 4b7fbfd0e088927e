"""Bytes to tensors and back: safetensors headers, checkpoint folders, the hub cache. Knows no method."""
