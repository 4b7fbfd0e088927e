"""Merging tensors and state dicts in memory: the driver of rounds, over whole tensors or shards."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ._backends.dispatch import pick, requested
from ._keeping import Kept
from ._matrix_call import MatrixCall
from ._methods import get
from ._methods.arguments import bind
from ._methods.modifiers import Then, modified, read_then
from ._methods.protocol import Coeffs, Method, Spec
from ._outputs import output_dtype, outputs
from ._rounds import resolve_scope
from .errors import ArgumentError
from .matrices import is_matrix_method, merge_matrix
from .ops.arguments import check_integer
from .ops.inputs import Inputs, gather, num_threads
from .ops.selection import Scope
from .ops.stream import run_program
from .tensors import F64

if TYPE_CHECKING:
    import torch

__all__ = ["Call", "merge", "merge_one"]


@dataclass(frozen=True)
class Call:
    """What is the same for every tensor of a merge."""

    method: Method
    arguments: Mapping[str, Any]
    dialect: str
    nan: Literal["error", "propagate"]
    seed: int
    backend: str | None
    threads: int
    shard_dim: int
    companions: tuple[Any, ...] = ()
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @staticmethod
    def of(
        method: str,
        arguments: Mapping[str, Any],
        weights: Any,
        dialect: str,
        nan: Literal["error", "propagate"],
        seed: int,
        backend: str | None,
        threads: int | None,
        shard_dim: int,
        then: Then = (),
    ) -> Call:
        """Check what does not depend on the tensors."""
        if not isinstance(method, str):
            raise ArgumentError("method is not a name", code="method.unknown", expected="a string", got=repr(method))
        if not isinstance(shard_dim, int) or isinstance(shard_dim, bool) or shard_dim < 0:
            raise ArgumentError(
                "shard_dim is not usable", code="shard_dim", expected="a dimension, 0 or more", got=repr(shard_dim)
            )
        if nan not in ("error", "propagate"):
            raise ArgumentError("nan is not usable", code="nan", expected="'error' or 'propagate'", got=repr(nan))
        seed = check_integer(seed, 0, 1 << 64, "seed")
        given = dict(arguments)
        if weights is not None:
            given["weights"] = weights
        modifiers = read_then(then)
        chosen = modified(get(method), [name for name, _ in modifiers])
        for modifier, parameters in modifiers:
            given |= {f"{modifier}.{name}": value for name, value in parameters.items()}
        companions = _companions(chosen, given)
        given = {name: _plain(value) for name, value in given.items()}
        return Call(chosen, given, dialect, nan, seed, requested(backend), num_threads(threads), shard_dim, companions)

    def inputs(self, models: Any, base: Any, companions: Sequence[Any], name: str) -> Inputs:
        """The inputs of one tensor in the method's order: a base that is an input goes first, companions last.

        Raises
        ------
        ArgumentError : they do not fit together, or there are too few or too many of them.
        """
        info = self.method.info
        if isinstance(models, (list, tuple)):
            self.check_arity(len(models), base is not None, name)
            if info.companions and len(models) != len(companions):
                raise ArgumentError(
                    f"{info.name}: '{info.companions}' has the wrong number of values",
                    code="parameter.count",
                    tensor=name or None,
                    expected=f"{len(models)}, one per model",
                    got=str(len(companions)),
                )
            labels = [f"model {i}" for i in range(len(models))]
            if info.base == "first":
                models, base, labels = [base, *models], None, ["the base", *labels]
            models = [*models, *companions]
            labels += [f"{info.companions} {i}" for i in range(len(companions))]
            return gather(models, base, name, self.shard_dim, labels if len(labels) == len(models) else ())
        return gather(models, base, name, self.shard_dim)

    def spec(self, inputs: Inputs) -> Spec:
        """The method's view of one tensor that is its own scope."""
        info = self.method.info
        num_models = inputs.num_models // 2 if info.companions else inputs.num_models
        if info.base != "first":
            self.check_arity(num_models, inputs.has_base, inputs.name)
        params = bind(self.method, self.arguments, num_models, self.dialect, self.nan, inputs.name)
        scope = Scope((0,), (inputs.tensor,), inputs.n, "F64" if inputs.compute is F64 else "F32")
        return Spec(
            num_models=num_models,
            has_base=inputs.has_base,
            params=params,
            n=inputs.n,
            scope=scope,
            compute=inputs.compute,
            dialect=self.dialect,
            name=inputs.name,
            tensor=inputs.tensor,
            seed=self.seed,
            nan=self.nan,
            shape=inputs.shape,
            block=self.blocks.get(inputs.name),
        )

    def check_arity(self, num_models: int, has_base: bool, name: str = "") -> None:
        """Refuse a number of models, or a base, that the method does not take."""
        info = self.method.info
        if info.base in ("required", "first") and not has_base:
            raise ArgumentError(
                f"{info.name} needs a base", code="base.missing", tensor=name, expected="base=...", got="None"
            )
        if info.base == "input" and has_base:
            raise ArgumentError(
                f"{info.name} subtracts no base",
                code="base.unused",
                tensor=name,
                hint="Leave base out, or list it among the models.",
            )
        if not info.min_models <= num_models <= info.max_models:
            low, high = info.min_models, info.max_models
            raise ArgumentError(
                f"{info.name} cannot merge this many models",
                code="models.count",
                tensor=name,
                expected=str(low) if low == high else f"{low} to {high}",
                got=str(num_models),
            )


def _companions(method: Method, given: dict[str, Any]) -> tuple[Any, ...]:
    """The tensors that accompany the models, taken out of the arguments."""
    name = method.info.companions
    if not name:
        return ()
    values = given.pop(name, None)
    if not isinstance(values, (list, tuple)):
        raise ArgumentError(
            f"{method.info.name} needs '{name}'",
            code="parameter.missing" if values is None else "parameter.value",
            expected="a list with one tensor (or state dict) per model",
            got="nothing" if values is None else type(values).__name__,
        )
    return tuple(values)


def _plain(value: Any) -> Any:
    """Numbers and lists out of arrays, array scalars and small tensors; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [v.tolist() if hasattr(v, "tolist") else v for v in value]
    return value


def merge_one(
    call: Call, spec: Spec, inputs: Inputs, coeffs: Coeffs | None, out_dtype: torch.dtype | None, out: Any = None
) -> Any:
    """Write one merged tensor (a list of shards for sharded inputs); resolve it first unless `coeffs` are given."""

    name, backend = pick("stream", inputs.all_views, call.backend)
    # What a summing round draws or ranks is not drawn or ranked again where the bits lie in host memory, in one piece.
    kept: list[Kept] | None = [] if name == "cpu" and not inputs.sharded else None
    if coeffs is None:
        coeffs = resolve_scope(call.method, [spec], [inputs], backend, call.threads, call.nan, kept)
    dtype = output_dtype(spec, inputs, out_dtype)
    outs = outputs(inputs, dtype, out)
    program = call.method.apply(spec, coeffs)
    if kept:
        run_program(kept[0].marked(program), inputs, outs, backend, call.threads, call.nan, marks=kept[0].views)
    else:
        run_program(program, inputs, outs, backend, call.threads, call.nan)
    return outs if inputs.sharded else outs[0]


def merge(
    tensors: Sequence[Any],
    method: str,
    *,
    base: Any = None,
    weights: Any = None,
    name: str = "",
    seed: int = 0,
    dialect: str = "default",
    nan: Literal["error", "propagate"] = "error",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    out: Any = None,
    threads: int | None = None,
    shard_dim: int = 0,
    then: Then = (),
    block: tuple[int, int] | None = None,
    report: MutableMapping[str, Any] | None = None,
    **params: Any,
) -> Any:
    """Merge one tensor from several models.

    Parameters
    ----------
    tensors : 1 to 64 tensors of one shape and device, bfloat16, float16, float32 or float64 (mixed if need be), strided
        or contiguous; or for each a list of row or column shards. Not written to, unless one of them is `out`.
    method : a name from `mergekernels.methods()`.
    base : the common base, for methods on task vectors; like one of `tensors`.
    weights : one number, or one per model.
    name : the tensor's name in its model; with `seed` (64 bits, default 0) it determines the random words.
    dialect : variant of the method, "default" or one that `methods()` lists.
    nan : "error" (default) refuses NaN, Inf and overflow; "propagate" lets them through, NaN canonical.
    out_dtype : default the promoted dtype of models and base. out : tensor (or list of shards) to write into, its own
        memory or exactly one of the inputs; what it holds after a DataError is undefined.
    backend : "cpu", "reference", "triton", "cuda"; default `use_backend`, then MERGEKERNELS_BACKEND, then the best
        for the device. threads : of the cpu backend, default torch's count.
    shard_dim : the dimension along which lists of shards are cut: 0 rows (default), 1 columns, and so on.
    then : modifiers of the merged task vector, [("lines", {"alpha": 0.2})].
    block : (number of the layer block that the tensor belongs to, number of blocks), None outside the blocks.
    report : a mapping that a method over matrices (tsv_m, iso_c, regmean ...) fills: name -> rank, route, residual and
        so on. Such methods run through torch and take neither `backend`, `then` nor nan="propagate".
    params : the method's own parameters (density=0.2, scale=0.5), one value or one per model where the method says so.

    Returns
    -------
    A new tensor, or a list of shards cut like the inputs; the same bits for every backend, thread count and cut
    (methods over matrices, of tier T2: within their bound).
    Scope "model" of a method means this tensor alone here. No gradient flows.

    Raises
    ------
    ArgumentError, BackendError, DataError : before anything is computed, except for what only the data can show.
    """
    if is_matrix_method(method):
        if not isinstance(tensors, (list, tuple)):
            gather(tensors, base, name, shard_dim)  # refuses what is no list of tensors
        models = list(tensors)
        matrix = MatrixCall.of(
            method, params, weights, len(models), base is not None, dialect, nan, seed, backend, shard_dim, then
        )
        return merge_matrix(matrix, models, base, name, out_dtype, out, threads, report)
    call = Call.of(method, params, weights, dialect, nan, seed, backend, threads, shard_dim, then)
    if block is not None:
        call = replace(call, blocks={name: _checked_block(block)})
    inputs = call.inputs(tensors, base, call.companions, name)
    return merge_one(call, call.spec(inputs), inputs, None, out_dtype, out)


def _checked_block(block: Any) -> tuple[int, int]:
    if not isinstance(block, (list, tuple)) or len(block) != 2:
        raise ArgumentError("block is not usable", code="block", expected="(number, count)", got=repr(block))
    count = check_integer(block[1], 1, 1 << 31, "block[1]")
    return check_integer(block[0], 0, count, "block[0]"), count
