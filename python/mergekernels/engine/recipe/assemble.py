"""Output tensors with dtype, action and parameters, after checking that their sources fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..._methods.arguments import default_of
from ..._methods.protocol import REQUIRED, Method, Param
from ...errors import InputError, MergeError, RecipeError
from ...formats.checkpoint import Checkpoint, TensorInfo
from ...tensors import DType, promote
from ..resolved import ResolvedTensor, Source
from .mapping import Output
from .names import is_optional_buffer, is_vocabulary
from .settings import Setting, find, params_of
from .slices import Slice, SliceSource
from .source import Document

__all__ = ["Assembler"]

_MAX_OF_A_KIND = 20


class Assembler:
    """Turns outputs into resolved tensors and notes what is wrong with them."""

    def __init__(
        self,
        document: Document,
        method: Method,
        dialect: str,
        nan: str,
        inputs: Sequence[Checkpoint],
        shared: Mapping[str, Setting],
        *,
        where: Callable[[str], int],
        cast: DType | None,
        out: DType | None,
        problems: list[MergeError],
        warnings: list[str],
    ) -> None:
        self.document = document
        self.method = method
        self.dialect = dialect
        self.nan = nan
        self.inputs = inputs
        self.shared = shared
        self.where = where
        self.cast = cast
        self.out = out
        self.problems = problems
        self.warnings = warnings
        self._missing: dict[int, list[str]] = {}
        self._unsupported: dict[tuple[int, str], list[str]] = {}
        self._counts: dict[str, int] = {}
        self._constant: dict[tuple[int, Any, str], Any] = {}
        self._required: set[tuple[Any, str]] = set()
        self._checked: set[Any] = set()

    def run(self, outputs: Sequence[Output]) -> list[ResolvedTensor]:
        """The resolved tensors in order of name."""
        found = [t for o in outputs if (t := self._tensor(o)) is not None]
        self._report()
        return sorted(found, key=lambda t: t.name.encode())

    def _tensor(self, output: Output) -> ResolvedTensor | None:
        slice_ = output.slice
        infos: list[tuple[SliceSource, TensorInfo]] = []
        absent: list[SliceSource] = []
        for source, name in zip(slice_.sources, output.tensors, strict=True):
            if name is None:
                absent.append(source)
            else:
                infos.append((source, self.inputs[source.input].tensors[name]))
        if absent:
            if is_optional_buffer(output.name, [i.shape for _, i in infos]):
                return self._copied(output, infos, absent)
            for source in absent:
                self._missing.setdefault(source.input, []).append(self._name_in(source, output))
            return None
        if not self._fits(output, infos):
            return None
        dtypes = [info.dtype for _, info in infos]
        shape = infos[0][1].shape
        if not dtypes[0].is_float:
            # The base decides here, also where it is one of the merged models.
            base, models = _parted(infos, [s.is_base for s, _ in infos])
            return ResolvedTensor(output.name, shape, dtypes[0], "buffer", models, base)
        base, models = _parted(infos, [not s.merged for s, _ in infos])
        params = self._params(output)
        if params is None:
            return None
        companions = self._companions(output, shape)
        if companions is None:
            return None
        work = self.cast or promote(dtypes)
        cast = self.cast if any(d is not self.cast for d in dtypes) else None
        return ResolvedTensor(
            output.name,
            shape,
            self.out or work,
            "merge",
            (*models, *companions),
            base,
            cast,
            params,
            len(companions),
        )

    def _companions(self, output: Output, shape: tuple[int, ...]) -> tuple[Source, ...] | None:
        """The tensors that accompany those of the models; None after noting what is wrong with them."""
        name = self.method.info.companions
        if not name:
            return ()
        param = params_of(self.method.info)[name]
        found = []
        for index in output.slice.models:
            label = self._value(param, output.slice, output, index)
            if label is REQUIRED:
                continue
            position, tensor = self.where(label), output.tensors[index]
            info = self.inputs[position].tensors.get(tensor or "")
            if info is None:
                self._missing.setdefault(position, []).append(tensor or output.name)
            elif info.shape != shape:
                got = f"'{label}': {list(info.shape)}"
                self._note(f"{name} and model differ in shape", output.name, expected=str(list(shape)), got=got)
            elif not info.dtype.is_float:
                self._unsupported.setdefault((position, info.dtype.name), []).append(info.name)
            else:
                found.append(Source(position, info.name))
        return tuple(found) if len(found) == len(output.slice.models) else None

    def _name_in(self, source: SliceSource, output: Output) -> str:
        """What the missing tensor would be called in `source`."""
        other, name = next((s, n) for s, n in zip(output.slice.sources, output.tensors, strict=True) if n is not None)
        if other.first == source.first or output.name == name:
            return name
        at = output.name
        return f"{at} (the counterpart of '{name}' of '{self.inputs[other.input].label}')"

    def _copied(
        self, output: Output, infos: list[tuple[SliceSource, TensorInfo]], absent: list[SliceSource]
    ) -> ResolvedTensor:
        """An optional buffer that some inputs lack: the base's bytes, else those of the first that has it."""
        source, info = next(((s, i) for s, i in infos if s.is_base), infos[0])
        giver = self.inputs[source.input].label
        self.warnings.append(f"'{output.name}': optional, missing in {self._labels(absent)}; copied from '{giver}'")
        return ResolvedTensor(output.name, info.shape, info.dtype, "copy", (Source(source.input, info.name),))

    def _labels(self, sources: Sequence[SliceSource]) -> str:
        return ", ".join(f"'{self.inputs[s.input].label}'" for s in sources)

    def _fits(self, output: Output, infos: list[tuple[SliceSource, TensorInfo]]) -> bool:
        """Whether shapes and dtypes go together; notes the problem otherwise."""
        shapes = {info.shape for _, info in infos}
        dtypes = [info.dtype for _, info in infos]
        if len(shapes) > 1:
            got = ", ".join(f"'{self.inputs[s.input].label}': {list(i.shape)}" for s, i in infos)
            if is_vocabulary(infos[0][1].name) and len({s[1:] for s in shapes}) == 1:
                hint = "Bring the models to one vocabulary first; building one (tokenizer:) is planned"
                self._note("vocabulary sizes differ", output.name, expected="equal sizes", got=got, hint=hint)
            else:
                self._note("shapes differ", output.name, expected="equal shapes", got=got)
            return False
        known = True
        for source, info in infos:
            if not info.dtype.is_float and info.dtype.name.startswith(("F", "C")):
                self._unsupported.setdefault((source.input, info.dtype.name), []).append(info.name)
                known = False
        if not known:
            return False
        if any(not d.is_float for d in dtypes) and len(set(dtypes)) > 1:
            got = ", ".join(f"'{self.inputs[s.input].label}': {i.dtype}" for s, i in infos)
            self._note("dtypes do not go together", output.name, expected="all floating, or one and the same", got=got)
            return False
        return True

    def _note(self, message: str, tensor: str, **fields: str) -> None:
        """A problem, counted instead of listed after the first of its kind."""
        self._counts[message] = self._counts.get(message, 0) + 1
        if self._counts[message] <= _MAX_OF_A_KIND:
            self.problems.append(InputError(message, code="input.mismatch", tensor=tensor, **fields))  # type: ignore[arg-type]

    def _report(self) -> None:
        """The problems that are collected per input."""
        for position, names in sorted(self._missing.items()):
            self.problems.append(
                InputError(
                    f"{len(names)} tensor{'s' * (len(names) != 1)} missing that other inputs have: {_some(names)}",
                    code="input.missing-tensor",
                    file=str(self.inputs[position].path),
                )
            )
        for (position, dtype), names in sorted(self._unsupported.items()):
            self.problems.append(
                InputError(
                    f"dtype {dtype} cannot be merged: {_some(names)}",
                    code="input.dtype",
                    file=str(self.inputs[position].path),
                    expected="BF16, F16, F32, F64, or integers",
                    hint="Dequantise it first; reading quantised inputs is planned" if dtype[0] == "F" else None,
                )
            )
        for message, count in self._counts.items():
            if count > _MAX_OF_A_KIND:
                self.problems.append(
                    InputError(f"{message} in {count - _MAX_OF_A_KIND} more tensors", code="input.more")
                )

    def _params(self, output: Output) -> dict[str, Any] | None:
        """The parameters of the tensor, complete and checked; None if one is missing or they do not go together."""
        slice_ = output.slice
        params: dict[str, Any] = {}
        complete = True
        for param in self.method.info.params:
            if param.per_model:
                values = tuple(self._value(param, slice_, output, i) for i in slice_.models)
                params[param.name] = values
                complete = complete and REQUIRED not in values
            else:
                params[param.name] = self._value(param, slice_, output, None)
                complete = complete and params[param.name] is not REQUIRED
        if not complete:
            return None
        key = tuple(params.values())
        if key not in self._checked and self.dialect in self.method.info.dialects:  # another one is a problem noted
            self._checked.add(key)
            for sentence in self.method.check(params, self.dialect, self.nan):
                error = RecipeError(
                    sentence,
                    code="recipe.combination",
                    tensor=output.name,
                    file=self.document.file or None,
                    line=self.document.line(slice_.loc),
                )
                if all(p.message != sentence for p in self.problems):
                    self.problems.append(error)
        return params

    def _value(self, param: Param, slice_: Slice, output: Output, index: int | None) -> Any:
        """One parameter: of the source at `index`, or of all together (None)."""
        key = (id(slice_), index, param.name)
        if key in self._constant:
            return self._constant[key]
        levels = [slice_.settings.get(param.name), self.shared.get(param.name)]
        name = output.name
        if index is not None:
            levels.insert(0, slice_.sources[index].settings.get(param.name))
            name = output.tensors[index] or name
        value = find(levels, name, output.t)
        if value is None:
            value = default_of(param, self.dialect)
            if value is REQUIRED:
                self._lacking(param, slice_, name, index)
        if all(s is None or s.constant for s in levels):
            self._constant[key] = value
        return value

    def _lacking(self, param: Param, slice_: Slice, name: str, index: int | None) -> None:
        """Notes a required parameter that no level gives, once for each source."""
        source = slice_.sources[index] if index is not None else None
        key = (source.loc if source else slice_.loc, param.name)
        if key in self._required:
            return
        self._required.add(key)
        of = f" of '{self.inputs[source.input].label}'" if source else ""
        self.problems.append(
            RecipeError(
                f"required parameter '{param.name}'{of} is missing for tensor '{name}'",
                code="recipe.missing-parameter",
                file=self.document.file or None,
                line=self.document.line(key[0]),
                expected=param.help,
                hint=f"Give it under the model, or under the top-level parameters for all ({self.method.info.name})",
            )
        )


def _parted(
    infos: list[tuple[SliceSource, TensorInfo]], is_base: list[bool]
) -> tuple[Source | None, tuple[Source, ...]]:
    """(the base's tensor, those of the models)."""
    found = [Source(s.input, i.name) for s, i in infos]
    base = next((f for f, apart in zip(found, is_base, strict=True) if apart), None)
    return base, tuple(f for f in found if f != base)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in names[:_MAX_OF_A_KIND])
    return shown + (f" and {len(names) - _MAX_OF_A_KIND} more" if len(names) > _MAX_OF_A_KIND else "")
