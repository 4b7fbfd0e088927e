"""What can be written: the dtypes of outputs."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError
from ..tensors import dtype_of

__all__ = ["check_out_dtype"]


def check_out_dtype(dtype: Any, name: str, argument: str = "out_dtype") -> None:
    """Refuse an output dtype that kernels do not write.

    dtype : a torch.dtype; anything else is refused. name : of the tensor, for the message. argument : what gave it.

    Raises
    ------
    ArgumentError : it is not bfloat16, float16, float32 or float64.
    """
    import torch

    known = dtype_of(str(dtype).removeprefix("torch.")) if isinstance(dtype, torch.dtype) else None
    if known is None or not known.is_float:
        raise ArgumentError(
            f"{argument} is not usable",
            code="out_dtype",
            tensor=name or None,
            expected="bfloat16, float16, float32 or float64 of torch",
            got=str(dtype) if isinstance(dtype, torch.dtype) else repr(dtype),
        )
