"""Adapter files: PEFT folders, kohya and diffusers files, read lazily and written whole."""

from __future__ import annotations

from .read import AdapterLike, read_adapter
from .sites import Base, base_shapes
from .write_kohya import kohya_names, write_kohya
from .write_peft import write_peft

__all__ = ["AdapterLike", "Base", "base_shapes", "kohya_names", "read_adapter", "write_kohya", "write_peft"]
