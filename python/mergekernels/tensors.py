"""What engine, ops and backends exchange: dtypes, views of memory, pieces of a tensor.

Nothing here imports torch or numpy: a view is an address with a shape, and an owner that keeps it alive.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from math import prod

__all__ = [
    "BF16",
    "CANONICAL_BLOCK",
    "F16",
    "F32",
    "F64",
    "FLOAT_DTYPES",
    "DType",
    "Piece",
    "TensorView",
    "compute_dtype",
    "contiguous_strides",
    "dtype_of",
    "promote",
    "tensor_id",
]

CANONICAL_BLOCK = 4096
"""Elements in a canonical block of the row-major flat index; sums are taken over these blocks."""


@dataclass(frozen=True)
class DType:
    """An element type.

    name : the name in a safetensors header ("BF16").
    torch : the attribute of the torch module ("bfloat16"), which is also the name in recipes and configs.
    itemsize : bytes per element.
    code : the number that native code and kernels use, -1 where kernels do not compute with it.
    """

    name: str
    torch: str
    itemsize: int
    code: int = -1

    @property
    def is_float(self) -> bool:
        """True for the types that kernels compute with."""
        return self.code >= 0

    def __str__(self) -> str:
        return self.torch


BF16 = DType("BF16", "bfloat16", 2, 0)
F16 = DType("F16", "float16", 2, 1)
F32 = DType("F32", "float32", 4, 2)
F64 = DType("F64", "float64", 8, 3)
FLOAT_DTYPES = (BF16, F16, F32, F64)

_ALL = (
    *FLOAT_DTYPES,
    DType("BOOL", "bool", 1),
    DType("U8", "uint8", 1),
    DType("I8", "int8", 1),
    DType("U16", "uint16", 2),
    DType("I16", "int16", 2),
    DType("U32", "uint32", 4),
    DType("I32", "int32", 4),
    DType("U64", "uint64", 8),
    DType("I64", "int64", 8),
    DType("C64", "complex64", 8),
    DType("F8_E4M3", "float8_e4m3fn", 1),
    DType("F8_E5M2", "float8_e5m2", 1),
    DType("F8_E8M0", "float8_e8m0fnu", 1),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 1),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 1),
)
_BY_NAME = {d.name: d for d in _ALL} | {d.torch: d for d in _ALL}


def dtype_of(name: str) -> DType | None:
    """The dtype called `name` in a safetensors header ("BF16") or in torch ("bfloat16"); None if unknown."""
    return _BY_NAME.get(name)


def promote(dtypes: list[DType]) -> DType:
    """The common dtype of float inputs by torch's rule (bf16 with fp16 gives float32)."""
    result = dtypes[0]
    for d in dtypes[1:]:
        if d is result:
            continue
        if d.itemsize == result.itemsize:
            result = F32
        elif d.itemsize > result.itemsize:
            result = d
    return result


def compute_dtype(dtypes: list[DType]) -> DType:
    """F64 if any input is F64, else F32: the arithmetic of the default dialect."""
    return F64 if F64 in dtypes else F32


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements, of a dense tensor of `shape`."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def tensor_id(name: str) -> int:
    """The 32-bit number that stands for a tensor's name in the Philox counter.

    The first 4 bytes, little endian, of SHA-256 of the UTF-8 name.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


@dataclass(frozen=True)
class TensorView:
    """A borrowed tensor: address, shape, strides in elements, dtype.

    ptr : address of the first element, aligned to the dtype (device address if `device` is not "cpu").
    cast : dtype to which each value is rounded (nearest even) right after it is loaded, None for no rounding;
        a recipe's `dtype` is such a load cast.
    owner : whatever keeps the memory alive; never used otherwise.
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    owner: object = field(default=None, repr=False, compare=False)
    cast: DType | None = None
    device: str = "cpu"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: its element (r, c) has flat index ``g0 + r * ld + c`` in the unsharded tensor.

    g0 : flat index of the first element.
    rows, cols : extent of the box; the piece has rows * cols elements, in row-major order.
    ld : distance between the first elements of two rows, in the unsharded tensor; equal to cols for a flat piece.
    """

    g0: int
    rows: int
    cols: int
    ld: int

    @property
    def numel(self) -> int:
        """Number of elements in the box."""
        return self.rows * self.cols

    @staticmethod
    def flat(start: int, count: int) -> Piece:
        """The piece of `count` consecutive elements that begins at flat index `start`."""
        return Piece(start, 1, count, count)
