"""What `ops.select`, `ops.stream`, programs and method parameters refuse, and with which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mergekernels as mk
from mergekernels import ops
from mergekernels._methods import get
from mergekernels._methods.arguments import Unusable, convert
from mergekernels._methods.common import weight_sum
from mergekernels._methods.protocol import Coeffs, Param, Spec
from mergekernels.errors import ArgumentError, MergeError
from mergekernels.ops import Keep, Program
from mergekernels.ops.keep import Marked
from mergekernels.ops.output import check_out_dtype
from mergekernels.ops.selection import Scope
from mergekernels.tensors import F32, F64, DType

X = torch.tensor([1.0, -4.0, 3.0, 2.0])
ONE = Program((1.0,), (None,), base=False)


def said(call: Any, *args: Any, **options: Any) -> str:
    """The words of the ArgumentError that the call raises."""
    with pytest.raises(ArgumentError) as caught:
        call(*args, **options)
    return str(caught.value)


SELECT = [
    (dict(policy="foo"), "policy is not usable; expected 'hash', 'index' or 'all'; got 'foo'"),
    (
        dict(policy="hsah"),
        "policy is not usable; expected 'hash', 'index' or 'all'; got 'hsah'. Did you mean 'hash'?",
    ),
    (dict(policy=None), "policy is not usable; expected 'hash', 'index' or 'all'; got None"),
    (dict(nan="foo"), "nan is not usable; expected 'error' or 'propagate'; got 'foo'"),
    (dict(seed=-1), "seed is not usable; expected an integer in [0, 2**64); got -1"),
    (dict(seed=2**64), "seed is not usable; expected an integer in [0, 2**64); got 18446744073709551616"),
    (dict(seed=1.0), "seed is not usable; expected an integer in [0, 2**64); got 1.0"),
    (dict(seed=True), "seed is not usable; expected an integer in [0, 2**64); got True"),
    (dict(k=3.0), "k is not usable; expected an integer in [1, 4]; got 3.0"),
    (dict(k=0), "k is not usable; expected an integer in [1, 4]; got 0"),
    (dict(k=5), "k is not usable; expected an integer in [1, 4]; got 5"),
    (dict(k=True), "k is not usable; expected an integer in [1, 4]; got True"),
    (dict(k="2"), "k is not usable; expected an integer in [1, 4]; got '2'"),
    (dict(k=None), "k is not usable; expected an integer in [1, 4]; got None"),
    (dict(k=[3.0]), "k[0] is not usable; expected an integer in [1, 4]; got 3.0"),
    (dict(k=torch.tensor(2.0)), "k is not usable; expected an integer in [1, 4]; got tensor(2.)"),
    (dict(k=[1, 2]), "k has the wrong number of values; expected one integer, or 1 (one per model); got 2"),
    (dict(k=[]), "k has the wrong number of values; expected one integer, or 1 (one per model); got 0"),
]


@pytest.mark.parametrize(("change", "message"), SELECT)
def test_select_refuses(change: dict[str, Any], message: str) -> None:
    assert said(ops.select, [X], **({"k": 2} | change)) == message
    assert said(ops.select, [X], **({"k": 2} | change), name="w") == f"tensor 'w': {message}"


def test_select_refuses_empty_tensors() -> None:
    assert said(ops.select, [torch.ones(0, 3)], 1) == (
        "models have no elements to select from; expected at least one element; got shape (0, 3)"
    )


@pytest.mark.parametrize("k", [np.int64(2), torch.tensor(2), np.array([2]), (2,), torch.tensor([2])])
def test_select_takes_any_integer(k: Any) -> None:
    (keep,) = ops.select([X], k, seed=np.uint64(2**64 - 1))
    assert keep == ops.select([X], 2)[0] == Keep(0x40400000)


FIELDS = [
    (dict(weights=()), "weights is not usable; expected 1 to 64 numbers, one per model; got 0"),
    (dict(weights=(1.0,) * 65), "weights is not usable; expected 1 to 64 numbers, one per model; got 65"),
    (dict(weights=[1.0]), "weights is not usable; expected a tuple, one entry per model; got list"),
    (dict(weights=("1",)), "weights[0] is not usable; expected a finite number; got '1'"),
    (dict(weights=(float("nan"),)), "weights[0] is not usable; expected a finite number; got nan"),
    (dict(weights=(True,)), "weights[0] is not usable; expected a finite number; got True"),
    (dict(keep=(None, None)), "keep is not usable; expected 1 entries, one per weight; got 2"),
    (dict(keep=None), "keep is not usable; expected a tuple, one entry per model; got NoneType"),
    (dict(keep=(3,)), "keep[0] is not usable; expected a rule of ops.keep or None; got 3"),
    (dict(vote="foo"), "vote is not usable; expected 'none', 'weighted', 'plain' or 'count'; got 'foo'"),
    (
        dict(merge="smu"),
        "merge is not usable; expected 'sum', 'max', 'largest', 'importance' or 'balance'; got 'smu'. "
        "Did you mean 'sum'?",
    ),
    (dict(divisor="agreeing_count"), "divisor is not usable; expected a vote, for agreeing_count; got vote 'none'"),
    (
        dict(divisor="agreeing_weight"),
        "divisor is not usable; expected 'none', 'value', 'agreeing_weights', 'agreeing_count' or 'kept_count'; "
        "got 'agreeing_weight'. Did you mean 'agreeing_weights'?",
    ),
    (dict(zero_vote=2), "zero_vote is not usable; expected an integer in [-1, 1]; got 2"),
    (dict(divisor_value=None), "divisor_value is not usable; expected a finite number; got None"),
    (dict(scale=float("inf")), "scale is not usable; expected a finite number; got inf"),
    (dict(scale=10**400), "scale is not usable; expected a finite number; got 1" + "0" * 76 + "..."),
    (dict(base=1), "base is not usable; expected True or False; got 1"),
    (dict(copy="yes"), "copy is not usable; expected True or False; got 'yes'"),
    (dict(seed=-1), "seed is not usable; expected an integer in [0, 2**64); got -1"),
    (dict(tensor=2**32), "tensor is not usable; expected an integer in [0, 2**32); got 4294967296"),
    (
        dict(copy=True, weights=(1.0, 1.0), keep=(None, None)),
        "copy is not usable; expected one model to copy; got 2 models",
    ),
]


@pytest.mark.parametrize(("change", "message"), FIELDS)
def test_program_refuses(change: dict[str, Any], message: str) -> None:
    assert said(Program, **({"weights": (1.0,), "keep": (None,)} | change)) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((-1,), "tau is not usable; expected an integer in [0, 2**64); got -1"),
        ((2**64,), "tau is not usable; expected an integer in [0, 2**64); got 18446744073709551616"),
        ((0.5,), "tau is not usable; expected an integer in [0, 2**64); got 0.5"),
        ((0, "foo"), "ties is not usable; expected 'all', 'none', 'hash' or 'index'; got 'foo'"),
        (
            (0, "indx"),
            "ties is not usable; expected 'all', 'none', 'hash' or 'index'; got 'indx'. Did you mean 'index'?",
        ),
        ((0, "hash", 2**32), "word is not usable; expected an integer in [0, 2**32); got 4294967296"),
        ((0, "hash", 0, -2), "index is not usable; expected an integer in [-1, 2**63); got -2"),
    ],
)
def test_keep_refuses(fields: tuple[Any, ...], message: str) -> None:
    assert said(Keep, *fields) == message


STREAM = [
    (dict(program="linear"), "program is not usable; expected a mergekernels.ops.Program; got str"),
    (dict(nan="foo"), "nan is not usable; expected 'error' or 'propagate'; got 'foo'"),
    (
        dict(out_dtype=torch.int32),
        "out_dtype is not usable; expected bfloat16, float16, float32 or float64 of torch; got torch.int32",
    ),
    (
        dict(out_dtype=torch.float8_e4m3fn),
        "out_dtype is not usable; expected bfloat16, float16, float32 or float64 of torch; got torch.float8_e4m3fn",
    ),
    (
        dict(out_dtype="float32"),
        "out_dtype is not usable; expected bfloat16, float16, float32 or float64 of torch; got 'float32'",
    ),
    (
        dict(out=torch.zeros(4, dtype=torch.int32)),
        "the dtype of out is not usable; expected bfloat16, float16, float32 or float64 of torch; got torch.int32",
    ),
    (dict(out=[0.0] * 4), "out is not usable; expected a tensor; got list"),
    (dict(models=[X, X]), "the inputs do not fit the program; expected 1 models and no base; got 2 models and no base"),
    (dict(models=[[X]]), "stream takes whole tensors; expected tensors; got lists of shards"),
    (
        dict(program=Program((1e39,), (None,), base=False)),
        "weights is beyond the range of float32, in which these tensors are merged; "
        "expected a magnitude below 2**128; got 1e+39. Use a smaller number, or float64 inputs.",
    ),
    (
        dict(program=Program((1.0,), (None,), base=False, scale=-1e39)),
        "scale is beyond the range of float32, in which these tensors are merged; "
        "expected a magnitude below 2**128; got -1e+39. Use a smaller number, or float64 inputs.",
    ),
]


@pytest.mark.parametrize(("change", "message"), STREAM)
def test_stream_refuses(change: dict[str, Any], message: str) -> None:
    call = {"models": [X], "program": ONE} | change
    assert said(ops.stream, **call) == message
    assert said(ops.stream, **call, name="w") == f"tensor 'w': {message}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_stream_writes_every_float_dtype(dtype: torch.dtype) -> None:
    check_out_dtype(dtype, "w")
    assert ops.stream([X], ONE, out_dtype=dtype).tolist() == X.tolist()
    out = torch.zeros(4, dtype=dtype)
    assert ops.stream([X], ONE, out=out) is out
    assert out.tolist() == X.tolist()


def test_a_large_weight_is_fine_in_float64() -> None:
    program = Program((1e39,), (None,), base=False)
    assert ops.stream([X.double()], program).tolist() == [1e39, -4e39, 3e39, 2e39]


def test_an_empty_name_is_not_printed() -> None:
    assert str(MergeError("wrong", tensor="")) == "wrong"
    assert str(MergeError("wrong", tensor="w")) == "tensor 'w': wrong"


def spec(method: str, compute: DType = F32, nan: str = "error", **params: Any) -> Spec:
    """One tensor of 4 elements; params : recipe name -> value, defaults for the rest."""
    values = {p.name: (p.default,) * 2 if p.per_model else p.default for p in get(method).info.params} | params
    kind = "F64" if compute is F64 else "F32"
    return Spec(2, True, values, 4, Scope((0,), (0,), 4, kind), compute, name="w", nan=nan)  # type: ignore[arg-type]


BEYOND = "tensor 'w': {} is beyond the range of float32, in which these tensors are merged; "


@pytest.mark.parametrize(
    ("method", "params", "name"),
    [
        ("linear", {"weight": (1.0, 1e39)}, "weight"),
        ("task_arithmetic", {"weight": (1.0, -1e39)}, "weight"),
        ("task_arithmetic", {"weight": (1.0, 1.0), "lambda": 1e39}, "lambda"),
        ("ties", {"weight": (1e39, 1.0)}, "weight"),
        ("ties", {"weight": (1.0, 1.0), "lambda": -1e39}, "lambda"),
        ("passthrough", {"scale": (1e39,)}, "scale"),
    ],
)
def test_numbers_beyond_float32(method: str, params: dict[str, Any], name: str) -> None:
    """Refused by the first step of a merge, which reads no data; float64 holds them."""
    narrow, wide = spec(method, **params), spec(method, F64, **params)
    assert said(get(method).start, narrow).startswith(BEYOND.format(name) + "expected a magnitude below 2**128; got ")
    coeffs = get(method).start(wide)
    assert isinstance(coeffs, Coeffs)
    assert said(get(method).apply, narrow, coeffs).startswith(BEYOND.format(name))
    assert isinstance(get(method).apply(wide, coeffs), Program)


def test_the_largest_float32_is_in_range() -> None:
    top = float(np.finfo(np.float32).max)
    assert mk.merge([torch.tensor([1.0])], "linear", weights=top, normalize=False).tolist() == [top]
    halfway = 2.0**128 - 2.0**103  # rounds to even, which is infinity
    message = said(mk.merge, [torch.tensor([1.0])], "linear", weights=halfway, normalize=False)
    assert message.startswith("weight is beyond the range of float32")


def test_sums_beyond_float32() -> None:
    expected = (
        "tensor 'w': the sum of the weights is beyond the range of float32, in which these tensors are merged; "
        "expected partial sums of a magnitude below 2**128; got [3e+38, 3e+38]"
    )
    assert said(get("linear").start, spec("linear", weight=(3e38, 3e38))) == expected
    assert said(get("task_arithmetic").start, spec("task_arithmetic", weight=(3e38, 3e38), normalize=True)) == expected
    program = get("linear").apply(spec("linear", F64, weight=(3e38, 3e38)), Coeffs())
    assert program.divisor_value == 6e38


def test_zero_sums_are_judged_in_the_compute_dtype() -> None:
    """As the arithmetic adds: in recipe order, each step rounded. `check` refuses only what is zero in both dtypes."""
    linear = get("linear")

    def check(*weights: float, normalize: bool = True, nan: str = "error") -> list[str]:
        return linear.check({"weight": weights, "normalize": normalize}, "default", nan)

    x = [torch.ones(2)] * 3
    float32_only = [1.0, 1e-9, -1.0]
    assert weight_sum(float32_only, F32) == 0.0 != weight_sum(float32_only, F64)
    assert check(*float32_only) == []
    assert said(mk.merge, x, "linear", weights=float32_only) == (
        "the weights sum to zero in float32, and normalize divides by their sum; expected a sum other than 0; "
        "got [1.0, 1e-09, -1.0]. Change the weights or set normalize to false."
    )
    assert mk.merge([t.double() for t in x], "linear", weights=float32_only).tolist() == [1.0, 1.0]

    float64_only = [0.1, 0.6, -0.7]
    assert weight_sum(float64_only, F64) == 0.0 != weight_sum(float64_only, F32)
    assert check(*float64_only) == []
    assert mk.merge(x, "linear", weights=float64_only).tolist() == [1.0, 1.0]
    assert said(mk.merge, [t.double() for t in x], "linear", weights=float64_only).startswith(
        "the weights sum to zero in float64"
    )

    # The exact sum is 1, but 1 + 1e16 is rounded to 1e16 in both dtypes.
    assert check(1.0, 1e16, -1e16) == [
        "the weights sum to zero, and normalize divides by their sum; expected a sum other than 0; "
        "got [1.0, 1e+16, -1e+16]"
    ]
    assert check(1.0, -1.0, nan="propagate") == check(1.0, -1.0, normalize=False) == []
    assert check(1e39, -1e39) == []  # refused for its range, where the tensors are float32


DENSITY = Param("d", "float", "", low=0.0, high=1.0)
FLAG = Param("f", "bool", "")
COUNT = Param("c", "int", "", low=1)
MODE = Param("m", "str", "", choices=("tensor", "model"))


@pytest.mark.parametrize("recipe", [False, True])
@pytest.mark.parametrize(
    ("param", "value", "problem", "expected", "hint"),
    [
        (DENSITY, True, "wrong type", "a finite number", None),
        (DENSITY, "x", "wrong type", "a finite number", None),
        (DENSITY, float("nan"), "wrong type", "a finite number", None),
        (DENSITY, 10**400, "wrong type", "a finite number", None),
        (DENSITY, None, "wrong type", "a finite number", None),
        (DENSITY, 20, "out of range", "a number in [0, 1]", None),
        (COUNT, 0, "out of range", "a number of at least 1", None),
        (Param("u", "float", "", high=2.0), 3, "out of range", "a number of at most 2", None),
        (COUNT, 1.5, "wrong type", "an integer", None),
        (COUNT, True, "wrong type", "an integer", None),
        (FLAG, 2, "wrong type", "true or false", None),
        (FLAG, "true", "wrong type", "true or false", None),
        (MODE, "tensr", "not a possible value", "one of tensor, model", "Did you mean 'tensor'?"),
        (MODE, 1, "not a possible value", "one of tensor, model", None),
    ],
)
def test_one_rule_for_recipes_and_calls(
    param: Param, value: Any, problem: str, expected: str, hint: str | None, recipe: bool
) -> None:
    with pytest.raises(Unusable) as caught:
        convert(param, value, recipe=recipe)
    assert (caught.value.problem, caught.value.expected, caught.value.hint) == (problem, expected, hint)


def test_spellings_of_yaml() -> None:
    """Text for a number, and 0 and 1 for booleans, count in recipes only."""
    for param, value, expected in [(DENSITY, "1e-3", 0.001), (COUNT, "2", 2), (FLAG, 1, True), (FLAG, 0.0, False)]:
        got = convert(param, value, recipe=True)
        assert got == expected
        assert type(got) is type(expected)
        with pytest.raises(Unusable):
            convert(param, value)


def test_numbers_of_other_libraries() -> None:
    for value in (np.float32(0.5), np.float64(0.5)):
        assert type(convert(DENSITY, value)) is float
    assert convert(COUNT, np.int32(7)) == 7


def test_stream_takes_importances_after_the_models() -> None:
    program = Program((1.0, 3.0), (None, None), base=False, merge="importance")
    x, y = torch.tensor([2.0, 2.0]), torch.tensor([6.0, 6.0])
    got = ops.stream([x, y, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])], program)
    assert got.tolist() == [5.0, 4.0]
    assert "expected 4 models and no base; got 2 models" in said(ops.stream, [x, y], program)


def test_stream_refuses_marks() -> None:
    assert said(ops.stream, [X], Program((1.0,), (Marked(),), base=False)).startswith("stream takes no marks")


def test_nearest_choice_of_a_library_call() -> None:
    assert said(mk.merge, [X], "ties", base=X, weights=1, density=0.5, scope="tensr") == (
        "ties: 'scope' is not usable; expected one of tensor, model; got 'tensr'. Did you mean 'tensor'?"
    )
    assert said(mk.merge, [X], "ties", base=X, weights=1, dialect="papre").endswith("Did you mean 'paper'?")


def test_messages_of_combinations_say_what_was_expected() -> None:
    ties = dict(base=X, density=0.5, name="w")
    assert said(mk.merge, [X], "ties", weights=2, dialect="paper", **ties).endswith("; expected weight 1; got [2.0]")
