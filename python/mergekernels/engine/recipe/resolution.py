"""A recipe against its inputs: everything that is wrong with the two at once, or numbers for every output tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..._methods import names
from ..._methods.matrix_table import matrix_names
from ..._methods.protocol import Method
from ..._methods.whole import whole_of
from ...errors import ArgumentError, FormatError, MergeError, PlanError, cut
from ...formats.checkpoint import Checkpoint
from ...tensors import dtype_of
from ..resolved import ResolvedMerge
from ..specs import plain_method
from .adapterout import as_adapter, refusals
from .assemble import Assembler
from .config import output_config
from .copied import Copied
from .inputs import Inputs
from .load import Recipe
from .mapping import depth, expand, find_tying
from .names import Stack, find_stack
from .settings import Setting
from .slices import Slice, SliceBuilder, open_inputs
from .then import modified_method, numbered, then_level
from .values import nearest

__all__ = ["resolve"]

_OF_PARAMETERS = ("recipe.unknown-parameter", "recipe.parameter")
_FROM_PARAMETERS = ("recipe.missing-parameter", "recipe.combination")


def resolve(recipe: Recipe, *, seed: int | None = None, located: Mapping[str, Path] | None = None) -> ResolvedMerge:
    """Reads the headers of all inputs and resolves the recipe to numbers.

    Parameters
    ----------
    recipe : from `load_recipe`. seed : replaces the recipe's, 0 to 2^64 - 1.
    located : where models are, by their name in the recipe; the others are looked for.

    Raises
    ------
    ArgumentError : the seed is out of range.
    PlanError : lists every problem of the recipe with its inputs.
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise ArgumentError("seed out of range", code="seed", expected="0 to 2^64 - 1", got=str(seed))
    return _Resolution(recipe, located or {}).run(seed)


class _Resolution:
    """One run of `resolve`."""

    def __init__(self, recipe: Recipe, located: Mapping[str, Path]) -> None:
        self.recipe = recipe
        self.schema = recipe.schema
        self.document = recipe.document
        self.problems: list[MergeError] = list(recipe.problems)
        self.warnings: list[str] = list(recipe.warnings)
        self.inputs = Inputs(recipe.document, located)

    def run(self, seed: int | None) -> ResolvedMerge:
        """The resolved merge."""
        schema = self.schema
        plain = self._method()
        method = None if plain is None else modified_method(plain, schema.then, self.document, self.problems)
        builder = None
        then: dict[str, Setting] = {}
        if plain is not None:
            then = then_level(
                schema.then,
                self.document,
                lenient=self.recipe.lenient,
                problems=self.problems,
                warnings=self.warnings,
            )
            builder = SliceBuilder(
                self.document,
                schema,
                plain.info,
                self.inputs,
                lenient=self.recipe.lenient,
                problems=self.problems,
                warnings=self.warnings,
            )
        open_inputs(schema, self.inputs)
        if builder is not None:
            builder.open_companions()
        opened = not self.inputs.problems
        self.problems += self.inputs.problems
        checkpoints = list(self.inputs.checkpoints)
        for checkpoint in checkpoints:
            self.warnings += checkpoint.warnings
        copied = Copied(self.recipe, self.inputs, self.problems, self.warnings)
        chat_template = copied.chat_template()
        tokenizer = copied.tokenizer()
        if method is None or builder is None or not opened or not self.recipe.whole:
            raise self._failure()
        shared = builder.levels[()] | then
        count = len(self.problems)
        stack = self._stack(checkpoints)
        slices = builder.build(stack, self._depths(checkpoints, stack))
        if not slices or len(self.problems) > count:
            raise self._failure()
        tying = find_tying(slices, checkpoints, self.warnings)
        out = dtype_of(schema.out_dtype or schema.dtype or "")
        assembler = Assembler(
            self.document,
            method,
            schema.dialect,
            schema.nan,
            checkpoints,
            shared,
            where=self.inputs.position,
            cast=dtype_of(schema.dtype or ""),
            out=out,
            problems=self.problems,
            warnings=self.warnings,
        )
        tensors = assembler.run(expand(slices, checkpoints, stack, tying))
        if not tensors and not self.problems:
            self.problems.append(FormatError("the inputs have no tensors", code="input.empty"))
        if self.problems:
            raise self._failure()
        self._unused(shared, slices)
        if schema.output is not None:
            only = schema.merge_method not in (*names(), *matrix_names("models"))
            sentences = refusals(method, schema.base_model is not None, schema.slices is not None, only, checkpoints)
            self.problems += [
                self.document.error(("output",), f"output: {text}", code="recipe.output") for text in sentences
            ]
            if self.problems:
                raise self._failure()
        donor = copied.donor(slices)
        merge = ResolvedMerge(
            method=schema.merge_method,
            then=tuple((e.name, dict(e.parameters or {})) for e in schema.then if e is not None),
            dialect=schema.dialect,
            nan=schema.nan,
            seed=schema.seed if seed is None else seed,
            inputs=tuple(checkpoints),
            tensors=tuple(numbered(tensors, stack if schema.layers is not None else None, then)),
            donor=donor,
            tokenizer=donor if tokenizer is None else tokenizer,
            chat_template=chat_template,
            config=output_config(
                checkpoints[donor],
                checkpoints,
                slices,
                tensors,
                tying,
                restacked=schema.slices is not None,
                dtype=out.torch if out is not None else None,
            ),
            aliases={tying.head: tying.embedding} if tying is not None and tying.output else {},
            recipe=self.recipe.data,
            recipe_file=self.document.file,
            warnings=tuple(dict.fromkeys(map(self._anywhere, self.warnings))),
        )
        if schema.output is not None:
            merge, self.problems = as_adapter(merge, schema.output, schema.out_dtype)
            if self.problems:
                raise self._failure()
        return merge

    def _anywhere(self, warning: str) -> str:
        """A warning in words that do not depend on the working directory, for the plan's hash and the manifest."""
        if self.document.file and warning.startswith(self.document.file + ":"):
            return Path(self.document.file).name + warning[len(self.document.file) :]
        for checkpoint in self.inputs.checkpoints:
            path = str(checkpoint.path)
            if warning.startswith((path + "/", path + ":")):
                return checkpoint.label + warning[len(path) :]
        return warning

    def _failure(self) -> MergeError:
        """All problems, without those that only follow from others; a single one of the recipe's text is itself."""
        if any(p.code in _OF_PARAMETERS for p in self.problems):
            self.problems = [p for p in self.problems if p.code not in _FROM_PARAMETERS]
        if self.recipe.problems and len(self.problems) == 1:
            return self.problems[0]
        return PlanError(self.problems)

    def _method(self) -> Method | None:
        """The method; None after noting that there is none."""
        schema = self.schema
        adapters = schema.output is not None
        known = list(
            dict.fromkeys((*names(), *matrix_names("models"), *(matrix_names("adapters") if adapters else ())))
        )
        if not schema.merge_method:
            return None
        if schema.merge_method not in known and schema.merge_method in matrix_names("adapters"):
            error = self.document.error(
                ("merge_method",),
                f"{schema.merge_method} merges adapters to an adapter",
                code="recipe.method",
                expected="output: {kind: adapter, rank: 16} for example, or a method of models",
            )
            self.problems.append(error)
            return None
        if schema.merge_method not in known:
            hint = nearest(schema.merge_method, known)
            error = self.document.error(
                ("merge_method",),
                f"this version has no merge method '{cut(schema.merge_method)}'",
                code="recipe.method",
                expected="one of " + ", ".join(known),
                hint=hint,
            )
            self.problems.append(error)
            return None
        method = plain_method(schema.merge_method, adapters)
        if whole_of(method) is not None and method.info.companions:
            self.problems.append(
                self.document.error(
                    ("merge_method",),
                    f"{method.info.name} needs a '{method.info.companions}' for each matrix, which recipes cannot name",
                    code="recipe.planned",
                    hint="Call mergekernels.merge_state_dicts, which takes them",
                )
            )
            return None
        if schema.dialect not in method.info.dialects:
            self.problems.append(
                self.document.error(
                    ("dialect",),
                    f"{method.info.name} has no dialect '{cut(schema.dialect)}'",
                    expected="one of " + ", ".join(method.info.dialects),
                )
            )
        return method

    def _stack(self, checkpoints: list[Checkpoint]) -> Stack | None:
        """The layer stack: named by the recipe, else the longest in the names."""
        tensors = dict.fromkeys(name for c in checkpoints for name in c.tensors)
        if self.schema.layers is None:
            return find_stack(tensors)
        stack = Stack.of_pattern(self.schema.layers)
        if all(stack.split(name) is None for name in tensors):
            found = find_stack(tensors)
            hint = f"Did you mean '{found}'?" if found is not None else None
            self.problems.append(self.document.error(("layers",), f"no tensor is in the stack '{stack}'", hint=hint))
            return None
        return stack

    def _depths(self, checkpoints: list[Checkpoint], stack: Stack | None) -> list[int]:
        """Layers of each input, which must be numbered without a gap."""
        depths = []
        for checkpoint in checkpoints:
            count, gaps = depth(checkpoint, stack)
            depths.append(count)
            if gaps:
                missing = ", ".join(map(str, gaps[:10]))
                self.problems.append(
                    FormatError(
                        f"the layer stack '{stack}' has no layer {missing}",
                        code="input.layers",
                        file=str(checkpoint.path),
                    )
                )
        return depths

    def _unused(self, shared: dict[str, Setting], slices: list[Slice]) -> None:
        """Warnings for filters that selected nothing, and where a gradient decides outside the layer stack."""
        levels = [shared, *(s.settings for s in slices), *(src.settings for s in slices for src in s.sources)]
        for level in levels:
            for name, setting in level.items():
                for condition in setting.conditions:
                    where = f"line {condition.line}: " if condition.line is not None else ""
                    if setting.filtered and not condition.used:
                        what = f"filter '{condition.filter}'" if condition.filter else "the last value"
                        self.warnings.append(f"{where}{what} of parameter '{name}' selects no tensor")
                    if condition.outside:
                        self.warnings.append(
                            f"{where}tensors outside the layer stack, '{condition.outside}' for one, "
                            f"take the first value of the gradient for '{name}'"
                        )
