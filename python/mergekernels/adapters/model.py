"""An adapter in memory: low-rank matrices at the sites of a base model.

All mathematics is done in the orientation (out, in). Where a base stores its weight otherwise (Conv1D, embeddings,
convolutions), `Site` turns matrices into weights and back, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Union

if TYPE_CHECKING:
    import torch

__all__ = ["Adapter", "Delta", "Factors", "Module", "Site"]


@dataclass(frozen=True)
class Factors:
    """The matrix b @ a without forming it; every scale (alpha / r) is inside b.

    b : (m, r). a : (r, n). Both float32 or both float64, on one device; r may be 0.
    """

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        """Columns of b, which bound the rank of the product."""
        return int(self.b.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def dense(self) -> torch.Tensor:
        """The product, (m, n)."""
        return self.b @ self.a


Delta = Union["torch.Tensor", Factors]
"""A task vector's matrix: dense (m, n), or in factors."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a low-rank matrix belongs in the base.

    module : dotted path of the module in the base, without any wrapper's prefix ("model.layers.0.self_attn.q_proj").
    kind : "linear": weight (out, in). "fan_in_fan_out": weight (in, out). "embedding": weight (vocab, dim), the matrix
    is (dim, vocab). "conv": weight (out, in, *kernel), the matrix is (out, in * prod(kernel)).
    weight_shape : shape of the base's weight.
    """

    module: str
    kind: Literal["linear", "fan_in_fan_out", "embedding", "conv"]
    weight_shape: tuple[int, ...]

    @property
    def weight(self) -> str:
        """Name of the weight's tensor in the base."""
        return f"{self.module}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        if self.kind in ("fan_in_fan_out", "embedding"):
            return self.weight_shape[1], self.weight_shape[0]
        n = 1
        for size in self.weight_shape[1:]:
            n *= size
        return self.weight_shape[0], n

    def to_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix (m, n) as the weight's shape: a view."""
        if self.kind in ("fan_in_fan_out", "embedding"):
            return matrix.T
        return matrix.reshape(self.weight_shape)

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as a matrix (m, n): a view where strides allow."""
        if self.kind in ("fan_in_fan_out", "embedding"):
            return weight.T
        return weight.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted module: read lazily.

    rank, alpha, scale : as the files say; scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    dtype : of the stored factors ("F32", "BF16", "F16", "F64").
    load : (b, a) in the orientation of `Site`, unscaled, in the stored dtype.
    """

    site: Site
    rank: int
    alpha: float
    scale: float
    dtype: str
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]

    def factors(self, *, fold_scale: bool = True) -> Factors:
        """The factors in float32 (float64 if stored so), the scale folded into b.

        fold_scale : False leaves the scale out, for parity with tools that ignore alpha.
        """
        import torch

        b, a = self.load()
        wide = torch.float64 if b.dtype == torch.float64 or a.dtype == torch.float64 else torch.float32
        b, a = b.to(wide), a.to(wide)
        return Factors(b * self.scale if fold_scale and self.scale != 1.0 else b, a)


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    label : what errors and reports call it (its path, or "adapter 0"). base : name of its base model as written in its
    config, "" if absent. modules : module path -> Module, in name order. extras : full tensors it replaces
    (modules_to_save), base tensor name -> loader. config : its config as read ({} where the format has none).
    form : "peft", "kohya", "diffusers" or "memory". path : folder or file, "" in memory. notes : sentences about what
    was read, for a report. digest : computes `sha256`.
    """

    label: str
    modules: Mapping[str, Module]
    base: str = ""
    extras: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    form: str = "memory"
    path: str = ""
    notes: tuple[str, ...] = ()
    digest: Callable[[], str] | None = None

    @cached_property
    def sha256(self) -> str:
        """Of its weights file, "" in memory. Reads the whole file on first use."""
        return self.digest() if self.digest is not None else ""
