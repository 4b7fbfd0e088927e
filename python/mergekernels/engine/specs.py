"""From a resolved tensor to what a method sees, in either scope."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Literal

from .._methods import get, names
from .._methods.matrix import Asking, MatrixMethod, MatrixSpec, Wants, misfits
from .._methods.matrix_table import get_matrix, matrix_names
from .._methods.modifiers import modified
from .._methods.protocol import Coeffs, Method, Round, Spec
from .._methods.spectral.layout import Layout, layout_of
from .._methods.whole import Whole, refuse_rounds, whole_of
from ..errors import InputError, PlanError
from ..ops.selection import Scope
from ..ops.sums import Segments
from ..tensors import F64, DType, compute_dtype, tensor_id
from .adapted import WORK_COPIES, AdaptedCheckpoint, factor_bytes, low_rank_sources, module_of
from .needs import first_measured
from .resolved import ResolvedMerge, ResolvedTensor, Source, sources_of

__all__ = ["Specs", "method_of", "plain_method", "sources_of"]


def plain_method(name: str, adapters: bool = False) -> Method:
    """The method that a recipe calls `name`: of rounds and programs, or over matrices.

    adapters : methods that merge nothing but adapters may be meant too, where no other has the name.

    Raises
    ------
    ArgumentError : there is none.
    """
    if name in names():
        return get(name)
    alone = adapters and name not in matrix_names("models")
    return Whole(get_matrix(name, "adapters" if alone else "models"))


def method_of(merge: ResolvedMerge) -> Method:
    """The method of a merge, with the modifiers that follow it."""
    if merge.custom is not None:
        return merge.custom
    return modified(plain_method(merge.method, merge.output is not None), [name for name, _ in merge.then])


def matrix_spec(spec: Spec, layout: Layout, index: int) -> MatrixSpec:
    """What a method over matrices is told of matrix `index` of a tensor."""
    name = f"{spec.name}[{index}]" if layout.count > 1 else spec.name
    shape = (layout.m, layout.n)
    number = tensor_id(name)
    return MatrixSpec(name, shape, spec.num_models, spec.params, spec.dialect, spec.seed, number, plain=layout.plain)


class Specs:
    """Makes the `Spec` of each output tensor of a merge.

    scope : "model" if the method measures over the whole checkpoint with these parameters.
    members : positions in `merge.tensors` of the tensors that a method merges and that have elements, in order of name.
    matrices : those of them that a method over matrices measures, where it measures: all that are matrices to it, and
    if it has a rule of its own for the others, these too.
    generated : name of each tensor some of whose sources are made by adapters -> whether its models' tiles are task
    vectors (see engine.generated).

    Raises
    ------
    InputError : some tensors ask for the model's scope and others for their own.
    """

    def __init__(self, merge: ResolvedMerge, method: Method) -> None:
        self.merge = merge
        self.members = tuple(i for i, t in enumerate(merge.tensors) if t.action == "merge" and prod(t.shape) > 0)
        self._compute = [compute_dtype(self._dtypes(merge.tensors[i])) for i in self.members]
        kinds = {method.scope(merge.tensors[i].params, merge.dialect) for i in self.members}
        if len(kinds) > 1:
            raise InputError(
                "some tensors are measured over the whole model and some by themselves",
                code="scope.mixed",
                hint="Give every tensor the same scope.",
            )
        self.scope: Literal["tensor", "model"] = kinds.pop() if kinds else "tensor"
        self._position = {index: place for place, index in enumerate(self.members)}
        self.model_scope: Scope | None = None
        self.whole = whole_of(method)
        self.wants = Wants()
        self.matrices: tuple[int, ...] = ()
        if self.whole is not None:
            self._check_whole(method, self.whole)
        elif self.scope == "model":
            self.model_scope = self._model_scope()
        self._made_in = {merge.tensors[i].name: self.spec(i).compute for i in self.members if self._is_made(i)}
        self.generated = {merge.tensors[i].name: self._by_deltas(i, method) for i in self.members if self._is_made(i)}

    def _is_made(self, index: int) -> bool:
        tensor = self.merge.tensors[index]
        if self.merge.output is not None:
            return True  # task vectors are wanted, of full models too
        for source in sources_of(tensor):
            checkpoint = self.merge.inputs[source.input]
            if module_of(checkpoint, source.tensor) is not None:
                return True
            if tensor.base is not None and isinstance(checkpoint, AdaptedCheckpoint):
                return True  # a model that an adapter leaves as the base is need not be read
        return False

    def _by_deltas(self, index: int, method: Method) -> bool:
        """Whether a method's result on a tensor is the base and a function of task vectors."""
        if self.merge.tensors[index].base is None:
            return False
        if self.whole is not None:
            return True
        if not method.info.modifiable:
            return False
        spec = self.spec(index)
        _, _, state = first_measured(method, spec, method.start(spec))
        by_deltas = not (isinstance(state, Round) and state.op == "divergence")
        if not by_deltas and self.merge.output is not None:
            raise InputError(
                f"{method.info.name} looks at the models themselves and cannot give an adapter", code="output.method"
            )
        return by_deltas

    def _check_wants(self, whole: MatrixMethod) -> None:
        """What a method of adapters asks for."""
        merge = self.merge
        first = merge.tensors[self.members[0]].params if self.members else {}
        self.wants = whole.wants(first, merge.dialect) if isinstance(whole, Asking) else Wants()
        if self.wants.peft and merge.dialect == "peft":
            raise InputError(
                "dialect peft is that of PEFT's files",
                code="output.dialect",
                got=whole.info.name,
                hint="Use `mergekernels lora merge`.",
            )
        for index in self.members if self.wants.equal_ranks else ():
            tensor = merge.tensors[index]
            modules = (module_of(merge.inputs[s.input], s.tensor) for s in tensor.models)
            ranks = [m.rank for m in modules if m is not None]
            if len(set(ranks)) > 1:
                raise InputError(
                    f"{whole.info.name} merges adapters of one rank",
                    code="adapters.ranks",
                    tensor=tensor.name,
                    expected="equal ranks",
                    got=", ".join(map(str, ranks)),
                )

    def held(self, index: int) -> int:
        """Bytes beside tiles and statistics while `merge.tensors[index]` is merged in passes: factors, and for an
        adapter the merged task vector and what its truncation works with.
        """
        tensor = self.merge.tensors[index]
        if tensor.name not in self.generated:
            return 0
        compute = self.compute_of(tensor.name)
        size = factor_bytes(self.merge, tensor, compute)
        if self.merge.output is not None:
            size += prod(tensor.shape) * (2 * compute.itemsize + 8 * WORK_COPIES)
        return size

    def read_sources(self, index: int) -> tuple[Source, ...]:
        """Sources of `merge.tensors[index]` of whose stored bytes something is read."""
        tensor = self.merge.tensors[index]
        found = sources_of(tensor)
        if not self.generated.get(tensor.name, False):
            return found
        unread = low_rank_sources(self.merge, tensor)
        return tuple(s for i, s in enumerate(found) if i not in unread)

    def compute_of(self, name: str) -> DType:
        """The dtype in which a tensor is computed whose sources adapters make."""
        return self._made_in[name]

    def _check_whole(self, method: Method, whole: MatrixMethod) -> None:
        merge = self.merge
        self._check_wants(whole)
        plain_too = hasattr(whole, "merge_plain")
        found, problems = [], []
        for number, index in enumerate(self.members):
            spec = self.spec(index)
            if number == 0:
                refuse_rounds(method.start(spec), spec, method.info.name)
            layout = self.layout(spec)
            if plain_too or not layout.plain:
                found.append(index)
            if layout.count > 1 and self.merge.output is not None:
                problems.append(
                    InputError("experts in one tensor can have no factors", code="output.experts", tensor=spec.name)
                )
            sentences = [] if layout.plain else misfits(whole, matrix_spec(spec, layout, 0))
            if sentences:
                problems.append(
                    InputError(
                        f"{whole.info.name}: {'; '.join(sentences)}",
                        code="matrix.shape",
                        tensor=spec.name,
                        got=f"a matrix ({layout.m}, {layout.n})",
                        hint=f"exclude: '{spec.name}' gives this tensor the mean.",
                    )
                )
        if problems:
            raise PlanError(list(problems))
        self.matrices = tuple(found)
        if len({whole.scope(merge.tensors[i].params, merge.dialect) for i in self.matrices}) > 1:
            raise InputError(
                "some tensors are measured over the whole model and some by themselves",
                code="scope.mixed",
                hint="Give every tensor the same parameters.",
            )

    def layout(self, spec: Spec) -> Layout:
        """How a method over matrices sees a tensor."""
        return layout_of(spec.params, spec.name, spec.shape)

    @property
    def measures_matrices(self) -> bool:
        """Whether a method over matrices measures all of them before it merges any."""
        if self.whole is None or not self.matrices:
            return False
        return self.whole.scope(self.merge.tensors[self.matrices[0]].params, self.merge.dialect) == "model"

    def _dtypes(self, tensor: ResolvedTensor) -> list[DType]:
        sources = sources_of(tensor)
        if tensor.cast is not None:
            sources = tensor.models[len(tensor.models) - tensor.companions :]
        dtypes = [self.merge.inputs[s.input].tensors[s.tensor].dtype for s in sources]
        if tensor.cast is None:
            made = (module_of(self.merge.inputs[s.input], s.tensor) for s in sources)
            dtypes += [F64 for m in made if m is not None and m.dtype == "F64"]
        return dtypes if tensor.cast is None else [*dtypes, tensor.cast]

    def _model_scope(self) -> Scope:
        offsets, ids, total = [], [], 0
        for index in self.members:
            tensor = self.merge.tensors[index]
            offsets.append(total)
            ids.append(tensor_id(tensor.name))
            total += prod(tensor.shape)
        wide = any(c.name == "F64" for c in self._compute)
        return Scope(tuple(offsets), tuple(ids), total, "F64" if wide else "F32")

    def first_state(self, method: Method) -> tuple[list[Spec], Round | Coeffs]:
        """In the model's scope: the specs of all members, and the state from which all of them start.

        Raises
        ------
        InputError : members ask for unlike measurements.
        """
        specs = [self.spec(i) for i in self.members]
        states = [method.start(spec) for spec in specs]
        for spec, state in zip(specs, states, strict=True):
            if spec.num_models != specs[0].num_models or _comparable(state) != _comparable(states[0]):
                raise InputError(
                    "what is measured over the whole model must be asked for alike by all tensors",
                    code="scope.unequal",
                    tensor=spec.name,
                    expected=f"the parameters of tensor '{specs[0].name}'",
                    got="parameters that change with the tensor, or another number of models",
                    hint="Give density one value per model, without filters and gradients, or use scope: tensor.",
                )
        return specs, states[0]

    def spec(self, index: int) -> Spec:
        """The spec of `merge.tensors[index]`, which must be a member."""
        tensor = self.merge.tensors[index]
        place = self._position[index]
        compute = self._compute[place]
        n, number = prod(tensor.shape), tensor_id(tensor.name)
        offset = 0
        scope = self.model_scope
        if scope is not None:
            offset = scope.offsets[place]
            compute = compute_dtype(self._compute)
        else:
            scope = Scope((0,), (number,), n, "F64" if compute.name == "F64" else "F32")
        return Spec(
            num_models=len(tensor.models) - tensor.companions,
            has_base=tensor.base is not None,
            params=tensor.params,
            n=n,
            scope=scope,
            compute=compute,
            dialect=self.merge.dialect,
            name=tensor.name,
            tensor=number,
            seed=self.merge.seed,
            offset=offset,
            nan=self.merge.nan,
            shape=tensor.shape,
            block=tensor.block,
        )


def _comparable(state: Round | Coeffs) -> Round | Coeffs:
    """A state without the size of the tensor over all of which it sums."""
    if isinstance(state, Round) and state.gram is not None and state.gram.segments.axis == "tensor":
        return replace(state, gram=replace(state.gram, segments=Segments("tensor", 1, 0)))
    return state
