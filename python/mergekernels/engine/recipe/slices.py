"""The output as a list of slices: which layers of which inputs, with which settings, and which input is the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..._methods.protocol import MethodInfo
from ...errors import InputError, MergeError, RecipeError
from .inputs import Inputs
from .names import Stack
from .schema import RecipeSchema, SliceEntry
from .settings import Setting, compile_level, params_of
from .source import Document
from .values import Reference

__all__ = ["Slice", "SliceBuilder", "SliceSource", "open_inputs"]

Loc = tuple[str | int, ...]
_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class SliceSource:
    """One input of a slice: its position among the inputs, its first layer, its own settings.

    is_base : it is the recipe's base. merged : it is one of the models, which a base is only for some methods.
    """

    input: int
    first: int
    is_base: bool
    merged: bool
    loc: Loc
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers that are merged together. length : number of layers. loc : place in the recipe."""

    sources: tuple[SliceSource, ...]
    length: int
    loc: Loc
    settings: Mapping[str, Setting] = field(default_factory=dict)

    @property
    def models(self) -> tuple[int, ...]:
        """Positions in `sources` of what is merged: all but the base."""
        return tuple(i for i, s in enumerate(self.sources) if s.merged)


def open_inputs(schema: RecipeSchema, inputs: Inputs) -> None:
    """Opens every model in order of the recipe, the base where it is listed, else last."""
    for i, entry in _present(schema.models):
        inputs.add(entry.model, ("models", i, "model"))
    for i, slice_ in _present(schema.slices):
        for j, source in _present(slice_.sources):
            inputs.add(source.model, ("slices", i, "sources", j, "model"))
        if slice_.base_model is not None:
            inputs.add(slice_.base_model, ("slices", i, "base_model"))
    if schema.base_model is not None:
        inputs.add(schema.base_model, ("base_model",))


def _present(entries: Sequence[_Entry | None] | None) -> Iterator[tuple[int, _Entry]]:
    """The entries that are right, with their positions in the recipe."""
    return ((i, entry) for i, entry in enumerate(entries or ()) if entry is not None)


class SliceBuilder:
    """Makes the slices of a recipe and notes what is wrong with them."""

    def __init__(
        self,
        document: Document,
        schema: RecipeSchema,
        info: MethodInfo,
        inputs: Inputs,
        *,
        lenient: bool,
        problems: list[MergeError],
        warnings: list[str],
    ) -> None:
        self.document = document
        self.schema = schema
        self.info = info
        self.inputs = inputs
        self.lenient = lenient
        self.problems = problems
        self.warnings = warnings
        self.levels: dict[Loc, dict[str, Setting]] = {}
        self._compile((), schema.parameters)
        for i, entry in _present(schema.models):
            self._compile(("models", i), entry.parameters)
        for i, slice_ in _present(schema.slices):
            self._compile(("slices", i), slice_.parameters)
            for j, source in _present(slice_.sources):
                self._compile(("slices", i, "sources", j), source.parameters)

    def _compile(self, loc: Loc, parameters: Mapping[str, object] | None) -> None:
        """The settings of one `parameters` mapping; every level is checked, also where an input is missing."""
        self.levels[loc] = compile_level(
            self.document,
            loc,
            parameters,
            self.info,
            lenient=self.lenient,
            problems=self.problems,
            warnings=self.warnings,
        )

    def open_companions(self) -> None:
        """Opens what accompanies the models, by the names that any level of parameters gives."""
        name = self.info.companions
        for loc, level in self.levels.items():
            setting = level.get(name) if name else None
            if setting is not None:
                for path in dict.fromkeys(value for c in setting.conditions for value in c.values):
                    self.inputs.add(Reference(path), (*loc, "parameters", name))

    def error(
        self,
        loc: Loc,
        message: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        kind: type[MergeError] = RecipeError,
        code: str = "recipe.slices",
    ) -> None:
        """Notes a problem at a place in the recipe."""
        line = self.document.line(loc)
        file = self.document.file or None
        self.problems.append(kind(message, code=code, file=file, line=line, expected=expected, got=got))

    def build(self, stack: Stack | None, depths: list[int]) -> list[Slice]:
        """The slices. depths : number of layers of every input."""
        if self.schema.models is not None:
            slice_ = self._from_models(depths)
            return [slice_] if slice_ is not None else []
        if stack is None:
            self.error(
                ("slices",),
                "slices need a layer stack, and no tensor name has one",
                expected="names such as layers.0.*",
            )
            return []
        found = [self._from_slice(i, entry, depths) for i, entry in _present(self.schema.slices)]
        return [s for s in found if s is not None]

    def _base(self, reference: Reference | None) -> int | None:
        """The position of the base among the inputs."""
        return None if reference is None else self.inputs.add(reference, ("base_model",))

    def _from_models(self, depths: list[int]) -> Slice | None:
        base = self._base(self.schema.base_model)
        sources: list[SliceSource] = []
        for i, entry in _present(self.schema.models):
            loc: Loc = ("models", i)
            position = self.inputs.add(entry.model, (*loc, "model"))
            if position is not None:
                sources.append(self._source(loc, position, 0, base, sources))
        if base is not None and all(s.input != base for s in sources):
            sources.append(self._source(("base_model",), base, 0, base, sources))
        names = self.inputs.checkpoints
        if len({depths[s.input] for s in sources}) > 1:
            got = ", ".join(f"{names[s.input].label}: {depths[s.input]}" for s in sources)
            message = "the models have different numbers of layers"
            self.error(("models",), message, expected="equal numbers", got=got, kind=InputError, code="input.layers")
            return None
        return self._checked(Slice(tuple(sources), depths[sources[0].input] if sources else 0, ("models",)))

    def _from_slice(self, number: int, entry: SliceEntry, depths: list[int]) -> Slice | None:
        loc: Loc = ("slices", number)
        base = self._base(entry.base_model or self.schema.base_model)
        sources: list[SliceSource] = []
        lengths: list[int] = []
        for j, item in _present(entry.sources):
            here: Loc = (*loc, "sources", j)
            first, end = item.layer_range
            lengths.append(end - first)
            position = self.inputs.add(item.model, (*here, "model"))
            if position is None:
                return None
            if end > depths[position]:
                label = self.inputs.checkpoints[position].label
                got = f"[{first}, {end}]"
                expected = f"an end of at most {depths[position]}, the number of layers of '{label}'"
                self.error((*here, "layer_range"), "layer_range past the last layer", expected=expected, got=got)
                return None
            sources.append(self._source(here, position, first, base, sources))
        if len(set(lengths)) > 1:
            self.error(loc, "the sources of a slice must have equally many layers", got=str(lengths))
            return None
        if base is not None and self.info.base != "input" and all(s.input != base for s in sources):
            label = self.inputs.checkpoints[base].label
            self.error(loc, f"base_model '{label}' must be listed among the sources of every slice")
            return None
        return self._checked(Slice(tuple(sources), lengths[0], loc, self.levels[loc]))

    def _source(
        self,
        loc: Loc,
        position: int,
        first: int,
        base: int | None,
        others: list[SliceSource],
    ) -> SliceSource:
        label = self.inputs.checkpoints[position].label
        if any(s.input == position for s in others):
            self.error(loc, f"model '{label}' is listed twice", expected="each model once")
        is_base = position == base
        merged = not is_base or self.info.base in ("input", "first")
        settings = self.levels.get(loc, {})
        params = params_of(self.info)
        for name in list(settings):
            why = None
            if not params[name].per_model:
                why = "is one value for all models and is not read under a model"
            elif not merged:
                why = "is not read from the base model"
            if why is not None:
                del settings[name]
                line = self.document.line((*loc, "parameters", name))
                self.warnings.append(f"line {line}: parameter '{name}' of '{label}' has no effect: it {why}")
        return SliceSource(position, first, is_base, merged, loc, settings)

    def _checked(self, slice_: Slice) -> Slice | None:
        """The slice, if it has a base where one is needed and a possible number of models."""
        info, count = self.info, len(slice_.models)
        if info.base in ("required", "first") and all(not s.is_base for s in slice_.sources):
            if self.schema.base_model is None:
                self.error(("merge_method",), f"{info.name} needs a base_model", code="recipe.missing-base")
            return None
        if info.base == "first":
            count -= 1
            slice_ = replace(slice_, sources=tuple(sorted(slice_.sources, key=lambda s: not s.is_base)))
        if not info.min_models <= count <= info.max_models:
            what = "models" if info.base == "input" else "models beside the base"
            if info.min_models == info.max_models:
                expected = f"exactly {info.min_models}"
            else:
                expected = f"{info.min_models} to {info.max_models}"
            message = f"{info.name} cannot merge this number of {what}"
            self.error(slice_.loc, message, expected=f"{expected} in each slice", got=str(count))
            return None
        return slice_
