"""The files of a kit.

`kit.json` lists the cases, and the configs of the adapters; `inputs/*.safetensors` hold every model's and adapter's
tensors as "model/tensor"; `outputs/CASE.safetensors` holds what the tool of a case gave: "tensor" for each tensor of
the result ("module" for the delta of each module of a merged adapter), and "mask_MODEL/tensor" for random masks that it
drew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["Case", "Kit", "open_kit"]


@dataclass(frozen=True)
class Case:
    """One merge that a tool has done.

    id : of the case, and the name of its file. tool, version : what made the output. method, dialect, params : the
    merge in the terms of this package, parameters by their recipe names, per-model ones as lists. models, base : whose
    tensors are merged. bound : largest allowed difference, relative to the largest magnitude of the expected tensor;
    with norm "frobenius" the Frobenius norm of the difference, relative to the norm of the expected tensor.
    dtype : of the inputs of the case. without : tensors that the tool refuses. takes : "adapters" where adapters are
    merged. rank : to which the result is cut, None for as it comes.
    """

    id: str
    tool: str
    version: str
    method: str
    models: tuple[str, ...]
    base: str | None
    bound: float
    dialect: str = "default"
    params: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    without: tuple[str, ...] = ()
    takes: Literal["models", "adapters"] = "models"
    norm: Literal["largest", "frobenius"] = "largest"
    rank: int | None = None


@dataclass(frozen=True)
class Kit:
    """A folder with cases.

    inputs : model or adapter -> tensor name -> values, float32. adapters : adapter -> its config.
    """

    folder: Path
    cases: tuple[Case, ...]
    inputs: dict[str, dict[str, torch.Tensor]]
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)

    def expected(self, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
        """(tensor -> values, model -> tensor -> mask that the tool drew)."""
        return read_output(self.folder / "outputs" / f"{case.id}.safetensors")


def read_output(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """The tensors of an output file, and the masks beside them. Entries for single experts and other numbers of a tool
    ("kind/tensor") are left out.

    Raises
    ------
    InputError : the file is missing or damaged.
    """
    if not file.is_file():
        raise InputError("this output is missing", code="conformance.output", file=str(file))
    tensors: dict[str, torch.Tensor] = {}
    masks: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in _load(file, "conformance.output").items():
        kind, _, name = key.rpartition("/")
        if not kind:
            tensors[name] = value
        elif kind.startswith("mask_"):
            masks.setdefault(kind.removeprefix("mask_"), {})[name] = value
    return tensors, masks


def open_kit(folder: str | Path | None = None) -> Kit:
    """The kit in a folder, by default the one that comes with the package.

    Raises
    ------
    InputError : there is none, or it is laid out in another way.
    """
    place = _default() if folder is None else Path(folder)
    try:
        raw = json.loads((place / "kit.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"no conformance kit: {error}", code="conformance.kit", file=str(place)) from None
    layout = raw.get("layout") if isinstance(raw, dict) else None
    if layout != 1:
        raise InputError(
            "the kit is laid out in another way", code="conformance.kit", expected="layout 1", got=str(layout)
        )
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted((place / "inputs").glob("*.safetensors")):
        for key, value in _load(file, "conformance.kit").items():
            model, _, name = key.partition("/")
            inputs.setdefault(model, {})[name] = value
    cases = []
    for number, entry in enumerate(raw.get("cases", ())):
        try:
            case = Case(**entry | {key: tuple(entry[key]) for key in ("models", "without") if key in entry})
        except TypeError as error:
            raise InputError(
                f"case {number} of the kit is not usable: {error}", code="conformance.kit", file=str(place / "kit.json")
            ) from None
        for model in (*case.models, *(() if case.base is None else (case.base,))):
            if model not in inputs:
                raise InputError(
                    f"case '{case.id}' merges a model that the kit lacks",
                    code="conformance.kit",
                    file=str(place / "kit.json"),
                    expected="one of " + ", ".join(sorted(inputs)),
                    got=repr(model),
                )
        cases.append(case)
    return Kit(place, tuple(cases), inputs, dict(raw.get("adapters", {})))


def _load(file: Path, code: str) -> dict[str, torch.Tensor]:
    """The tensors of a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", code=code, file=str(file)) from None


def _default() -> Path:
    here = Path(__file__).resolve().parent
    return here / "golden" if (here / "golden").is_dir() else here.parents[2] / "tests" / "golden"
