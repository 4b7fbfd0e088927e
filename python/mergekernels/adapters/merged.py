"""The adapter that a merge gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ArgumentError, nearest
from ..tensors import dtype_of
from .model import Adapter, Factors, Module, Site
from .report import MergeReport

if TYPE_CHECKING:
    import torch

__all__ = ["MergedAdapter"]


@dataclass(frozen=True)
class MergedAdapter:
    """A merged adapter in memory: the factors of every module, as a file would hold them, and a report.

    modules : module path -> (site, factors); the factors have the adapter's dtype, every scale is inside b, the ranks
    may differ by module. extras : full tensors that replace the base's (modules_to_save), name -> loader.
    dtype : of the factors ("F32", "BF16", "F16", "F64"). base : name of the base model as the inputs give it.
    report : ranks, kept energy, routes and warnings. inherited : fields of the configs in which all inputs agree.
    sources : the inputs, whose digests go into saved files. shapes : of the base's tensors by name, if one was given:
    the config then says which modules PEFT must leave alone.
    """

    modules: Mapping[str, tuple[Site, Factors]]
    report: MergeReport
    dtype: str = "F32"
    base: str = ""
    extras: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    inherited: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Adapter, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The fields of adapter_config.json: lora_alpha = r, no rsLoRA, patterns where ranks differ."""
        from ..formats.adapters.write_peft import adapter_config

        return adapter_config(
            self._by_site(), base_name=self.base, extras=self.extras, config=self.inherited, shapes=self.shapes
        )

    @property
    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors under the names of PEFT's files: lora_A (r, in), lora_B (out, r), and so on."""
        from ..formats.adapters.write_peft import peft_keys

        stored = dtype_of(self.dtype)
        assert stored is not None
        planned = peft_keys(self._by_site(), stored, self.extras)
        return {name: load().reshape(shape) for name, (_, shape, load) in planned.items()}

    def delta(self, module: str) -> torch.Tensor:
        """What the adapter adds to the weight of `module`: in the weight's shape, float32 (float64 if stored so).

        Raises
        ------
        ArgumentError : the adapter does not have the module.
        """
        if module not in self.modules:
            raise ArgumentError(
                "the adapter has no such module",
                code="adapter.module",
                tensor=str(module),
                hint=nearest(module, self.modules) if isinstance(module, str) else None,
            )
        site, factors = self.modules[module]
        return site.to_weight(_widened(factors).dense())

    def as_adapter(self, label: str = "merged adapter") -> Adapter:
        """The same as an input of other functions: alpha equals the rank, the scale is 1."""
        modules = {}
        for name, (site, factors) in self.modules.items():
            rank = factors.rank
            modules[name] = Module(site, rank, float(rank), 1.0, self.dtype, _give(factors))
        return Adapter(label, modules, self.base, self.extras, self.config)

    def save(
        self, path: str | PathLike[str], form: Literal["peft", "kohya"] = "peft", *, overwrite: bool = False
    ) -> None:
        """Write the adapter; it appears complete or not at all.

        path : a folder for PEFT (adapter_config.json, adapter_model.safetensors), a file for kohya. The metadata of the
        safetensors file tell the method, its parameters, the inputs with their SHA-256, and per module rank and kept
        energy. overwrite : replace what is there.

        Raises
        ------
        ArgumentError : unknown form, or one that cannot hold these modules. OutputError : taken, or writing failed.
        """
        from .saving import save

        save(self, path, form, overwrite=overwrite)

    def _by_site(self) -> dict[Site, Factors]:
        return dict(self.modules.values())


def _give(factors: Factors) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: (factors.b, factors.a)


def _widened(factors: Factors) -> Factors:
    import torch

    wide = torch.float64 if factors.b.dtype == torch.float64 else torch.float32
    return Factors(factors.b.to(wide), factors.a.to(wide))
