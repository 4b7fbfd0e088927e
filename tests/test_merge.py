"""`merge` and `merge_state_dicts`: linear, task arithmetic, passthrough, and every refusal with its words."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import mergekernels as mk
from mergekernels.errors import ArgumentError, DataError, InputError

BACKENDS = ("reference", "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_by_hand(backend: str) -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert mk.merge([a, b], "linear", weights=[1, 3], backend=backend).tolist() == [2.5, -1.0]
    assert mk.merge([a, b], "linear", weights=[1, 3], normalize=False, backend=backend).tolist() == [10.0, -4.0]
    assert mk.merge([a, b], "linear", weights=2, backend=backend).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_task_arithmetic_by_hand(backend: str) -> None:
    base, a, b = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 5.0])
    call = dict(base=base, backend=backend)
    assert mk.merge([a, b], "task_arithmetic", weights=[1, -1], **call).tolist() == [3.0, -3.0]
    assert mk.merge([a, b], "task_arithmetic", weights=[1, 3], normalize=True, scale=2, **call).tolist() == [2.0, 7.0]
    # A weight sum below 1e-8 divides by 1.
    assert mk.merge([a, b], "task_arithmetic", weights=[1, -1], normalize=True, **call).tolist() == [3.0, -3.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_passthrough_preserves_bits(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-0.0, 0.0, 1.5, -3.0], dtype=dtype)
    got = mk.merge([x], "passthrough", backend=backend)
    assert got.dtype == dtype and torch.equal(torch.signbit(got), torch.signbit(x)) and torch.equal(got, x)
    got = mk.merge([x], "passthrough", weights=None, scale=2.0, backend=backend)
    assert got.tolist() == [0.0, 0.0, 3.0, -6.0] and bool(torch.signbit(got)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (255,), (257,), (3, 5, 7)])
def test_backends_agree_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=g).to(dtype)
    models = [torch.randn(shape, generator=g).to(dtype) for _ in range(3)]
    for method, extra in (
        ("linear", {}),
        ("task_arithmetic", {"base": base, "scale": 0.3}),
        ("ties", {"base": base, "density": 0.4}),
        ("ties", {"base": base, "density": 0.4, "tie_policy": "index", "zero_vote": "majority"}),
    ):
        got = [mk.merge(models, method, weights=[0.3, 0.5, -0.1], backend=b, **extra) for b in BACKENDS]
        assert got[0].dtype == dtype and got[0].shape == torch.Size(shape)
        assert torch.equal(got[0], got[1]), method


def test_linear_is_correctly_rounded_in_float32() -> None:
    """Every step in float32, one rounding to bf16: against numpy scalars, which do not fuse."""
    g = torch.Generator().manual_seed(2)
    xs = [torch.randn(5000, generator=g).bfloat16() for _ in range(3)]
    w = np.array([0.3, 0.5, 0.17], dtype=np.float32)
    total = np.zeros(5000, dtype=np.float32)
    for x, v in zip(xs, w, strict=True):
        total = total + v * x.float().numpy()
    want = torch.from_numpy(total / ((w[0] + w[1]) + w[2])).bfloat16()
    assert torch.equal(mk.merge(xs, "linear", weights=[0.3, 0.5, 0.17]), want)


def test_dtypes_mix_and_out_dtype() -> None:
    a, b = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float16)
    assert mk.merge([a, b], "linear", weights=1).dtype == torch.float32
    assert mk.merge([a, b.double()], "linear", weights=1).dtype == torch.float64
    assert mk.merge([a, b], "linear", weights=1, out_dtype=torch.float16).dtype == torch.float16
    out = torch.full((3,), float("nan"))
    assert mk.merge([a, b], "linear", weights=1, out=out) is out and out.tolist() == [1, 1, 1]


def test_inputs_are_not_written_and_may_be_strided() -> None:
    g = torch.Generator().manual_seed(3)
    store = torch.randn(40, 60, generator=g)
    base, model = store[::2, ::3].t(), store[1::2, 1::3].t()
    before = store.clone()
    got = mk.merge([model], "ties", base=base, weights=1, density=0.5)
    want = mk.merge([model.contiguous()], "ties", base=base.contiguous(), weights=1, density=0.5)
    assert torch.equal(got, want) and torch.equal(store, before)
    out = torch.zeros(20, 40)[:, ::2].t()
    mk.merge([model], "ties", base=base, weights=1, density=0.5, out=out)
    assert torch.equal(out, want)


def test_sixty_four_models() -> None:
    xs = [torch.full((300,), float(i)) for i in range(64)]
    assert mk.merge(xs, "linear", weights=1)[0] == 31.5
    with pytest.raises(ArgumentError, match="1 to 64"):
        mk.merge([*xs, xs[0]], "linear", weights=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_values_are_refused_with_their_place(backend: str) -> None:
    x = torch.ones(1000)
    bad = x.clone()
    bad[777], bad[900] = float("inf"), float("nan")
    with pytest.raises(DataError, match=r"tensor 'w': model 1 holds NaN or Inf at flat index 777 \(2 in all\)"):
        mk.merge([x, bad], "linear", weights=1, name="w", backend=backend)
    with pytest.raises(DataError, match="the base holds NaN or Inf at flat index 777"):
        mk.merge([x], "ties", base=bad, weights=1, density=0.5, backend=backend)
    with pytest.raises(DataError, match="overflows its dtype, or is NaN at flat index 0"):
        mk.merge([x * 3e5], "linear", weights=1, out_dtype=torch.float16, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_propagates_canonically_where_asked(backend: str) -> None:
    base, x = torch.zeros(6), torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0, 0.5])
    x.view(torch.int32)[2] = -1  # a NaN with sign and payload
    got = mk.merge([x, x], "ties", base=base, weights=1, density=0.5, nan="propagate", backend=backend)
    assert got.view(torch.int32)[2] == 0x7FC00000
    # It took one of the three places of its model.
    assert got.nan_to_num().tolist() == [0.0, 5.0, 0.0, 0.0, 4.0, 0.0]


def test_state_dicts_keep_order_buffers_and_inputs() -> None:
    base = {"w": torch.zeros(4), "steps": torch.tensor(3), "mask": torch.tensor([True])}
    model = {"mask": torch.tensor([True]), "steps": torch.tensor(3), "w": torch.ones(4)}
    got = mk.merge_state_dicts([model], "task_arithmetic", base=base, weights=0.5)
    assert list(got) == ["w", "steps", "mask"] and got["w"].tolist() == [0.5] * 4 and got["steps"] == 3
    got["steps"].add_(1)
    assert base["steps"] == 3


def test_state_dicts_unequal_buffers(caplog: pytest.LogCaptureFixture) -> None:
    base, model = {"n": torch.tensor(1)}, {"n": torch.tensor(2)}
    assert mk.merge_state_dicts([model], "task_arithmetic", base=base, weights=1)["n"] == 1
    assert "integer values differ" in caplog.text
    with pytest.raises(DataError, match="tensor 'n': an integer or bool tensor differs"):
        mk.merge_state_dicts([base, model], "linear", weights=1)


def test_state_dicts_may_be_lazy() -> None:
    class Lazy(dict):
        reads: ClassVar[list[str]] = []

        def __getitem__(self, key):
            self.reads.append(key)
            return super().__getitem__(key)

    data = {"a": torch.ones(10), "b": torch.arange(20.0)}
    lazy = Lazy(data)
    got = mk.merge_state_dicts(
        [lazy], "ties", base={k: torch.zeros_like(v) for k, v in data.items()}, weights=1, density=0.5
    )
    assert lazy.reads == ["a", "b"] and int((got["b"] != 0).sum()) == 10


REFUSALS = [
    (dict(method="tise"), "unknown merge method.*Did you mean 'ties'"),
    (dict(base=None), "ties needs a base"),
    (dict(method="linear"), "linear subtracts no base.*list it among the models"),
    (dict(desnity=0.5), "ties has no parameter 'desnity'.*Did you mean 'density'"),
    (dict(weights=None), "ties needs 'weights'; expected a float or one per model"),
    (dict(weights=[1, 2, 3]), "wrong number of values; expected one value, or 2 .*; got 3"),
    (dict(density=20), r"'density' is not usable; expected a number in \[0, 1\]; got 20"),
    (dict(density=float("nan")), "'density' is not usable; expected a finite number"),
    (dict(normalize=1), "'normalize' is not usable; expected true or false; got 1"),
    (dict(tie_policy="first"), "expected one of hash, index, all; got 'first'"),
    (dict(dialect="papre"), "ties has no dialect 'papre'; expected one of default, paper"),
    (dict(dialect="paper", weights=[1, 2]), "the paper's dialect has no weights"),
    (dict(majority_sign_method="frequency"), "frequency is a vote of PEFT; expected dialect peft"),
    (dict(merge_function="max"), "merge_function is the paper.s; expected dialect paper; got dialect default"),
    (dict(dialect="peft", zero_vote="majority"), "zero_vote: majority is not available in dialect peft"),
    (dict(nan="skip"), "nan is not usable; expected 'error' or 'propagate'"),
    (dict(seed=-1), "seed is not usable"),
    (dict(threads=0), "threads must be at least 1"),
    (dict(backend="gpu"), "unknown backend; expected auto, cuda, triton, cpu, reference; got 'gpu'"),
    (dict(out_dtype=torch.int8), "out_dtype is not usable"),
    (dict(out=torch.zeros(3)), r"out does not fit the result; expected \(4,\)"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m[:30] for _, m in REFUSALS])
def test_refusals(change: dict, message: str) -> None:
    call = dict(method="ties", base=torch.zeros(4), weights=[1, 1], density=0.5, name="w") | change
    with pytest.raises(mk.MergeError, match=message):
        mk.merge([torch.ones(4), torch.ones(4)], **{k: v for k, v in call.items() if v is not None})


def test_refused_tensors() -> None:
    x = torch.ones(4)
    cases = [
        ([x, torch.ones(5)], "shape of model 1 differs from that of model 0; expected \\(4,\\); got \\(5,\\)"),
        ([x, torch.ones(4, dtype=torch.int32)], "model 1 has a dtype that cannot be merged.*got torch.int32"),
        ([x, [1.0]], "shard 0 of model 1 is not a tensor"),
        ([x, "x"], "model 1 is not a tensor; got str"),
        ([x, torch.ones(4, device="meta")], "model 1 has no plain memory"),
        ([x, x.to_sparse()], "model 1 has no plain memory"),
        ([], "linear cannot merge this many models; expected 1 to 64; got 0"),
    ]
    for tensors, message in cases:
        with pytest.raises(ArgumentError, match=message):
            mk.merge(tensors, "linear", weights=1, name="w")
    with pytest.raises(ArgumentError, match="lie in one range of memory"):
        store = torch.ones(5)
        mk.merge([store[:4]], "linear", weights=1, out=store[1:])
    with pytest.raises(ArgumentError, match="cut into other shards"):
        mk.merge([[x[:2], x[2:]], [x[:1], x[1:]]], "linear", weights=1)
    with pytest.raises(ArgumentError, match="weights sum to zero"):
        mk.merge([x, x], "linear", weights=[1, -1])
    with pytest.raises(InputError, match="model 1 lacks b"):
        mk.merge_state_dicts([{"a": x, "b": x}, {"a": x}], "linear", weights=1)


def test_requested_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("cuda", "triton"):
        with pytest.raises(mk.MergeError, match=f"'{name}'"):
            mk.merge([x], "linear", weights=1, backend=name)
        with mk.use_backend(name), pytest.raises(mk.MergeError, match=f"'{name}'"):
            mk.merge([x], "linear", weights=1)
        monkeypatch.setenv("MERGEKERNELS_BACKEND", name)
        with pytest.raises(mk.MergeError, match=f"'{name}'"):
            mk.merge([x], "linear", weights=1)
        # The argument wins over the context, and both over the environment.
        with mk.use_backend("reference"):
            assert mk.merge([x], "linear", weights=1).tolist() == [1, 1, 1, 1]
        assert mk.merge([x], "linear", weights=1, backend="cpu").tolist() == [1, 1, 1, 1]


def test_errors_survive_serialisation() -> None:
    import pickle

    error = DataError("m", code="c", tensor="t", expected="e", got="g", hint="h", line=3, file="f")
    again = mk.MergeError.from_dict(error.to_dict())
    assert type(again) is DataError and str(again) == str(error) == "f:3: tensor 't': m; expected e; got g. h"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_place_of_a_nan_is_exact_in_large_tensors(backend: str) -> None:
    """Above the size at which a sample is drawn, whose elements have other places."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x[150_001:] = float("nan")
    base = torch.zeros(200_000)
    message = r"model 0 holds NaN or Inf at flat index 150001 \(49999 in all\)"
    with pytest.raises(DataError, match=message):
        mk.merge([x], "ties", base=base, weights=1, density=0.2, backend=backend)
    halves = [list(t.split(100_000)) for t in (x, base)]
    with pytest.raises(DataError, match=message):
        mk.merge([halves[0]], "ties", base=halves[1], weights=1, density=0.2, backend=backend)
    dicts = [{"a": t[:1000], "w": t} for t in (x, base)]
    with pytest.raises(DataError, match="tensor 'w': " + message):
        mk.merge_state_dicts(dicts[:1], "ties", base=dicts[1], weights=1, density=0.2, scope="model", backend=backend)


@pytest.mark.parametrize(
    ("strange", "got"),
    [
        (torch._neg_view, "a view that negates its memory"),  # type: ignore[attr-defined]
        (lambda x: x.to("meta"), "a meta tensor"),
        (lambda x: x.to_sparse(), "torch.sparse_coo"),
    ],
    ids=["negated", "meta", "sparse"],
)
def test_out_has_plain_memory(strange: Any, got: str) -> None:
    x = torch.arange(1.0, 9.0)
    with pytest.raises(ArgumentError, match=f"out has no plain memory; expected dense; got {got}"):
        mk.merge([x, x], "linear", weights=1.0, out=strange(torch.zeros(8)))
    # As an input such a view has its values.
    assert torch.equal(mk.merge([torch._neg_view(-x), x], "linear", weights=[1.0, 3.0]), x)  # type: ignore[attr-defined]


def test_out_must_have_memory_of_its_own() -> None:
    p, q = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    for outs in ([q, p], [o := torch.zeros(2), o]):
        with pytest.raises(ArgumentError, match="lie in one range of memory"):
            mk.merge([[p, q]], "linear", weights=1, out=outs)
    with pytest.raises(ArgumentError, match=r"elements that share memory; got strides \(1, 1\)"):
        mk.merge([torch.ones(3, 3)], "linear", weights=1, out=torch.zeros(5).as_strided((3, 3), (1, 1)))
    mk.merge([[p, q]], "linear", weights=1, out=[p, q])
    assert p.tolist() == [1.0, 2.0] and q.tolist() == [3.0, 4.0]
    with pytest.raises(ArgumentError, match="out requires grad"):
        mk.merge([p], "linear", weights=1, out=torch.zeros(2, requires_grad=True))
    for out, message in (
        ("x", "out is not a tensor; got str"),
        ([p], "out is not usable; expected a tensor; got list"),
    ):
        with pytest.raises(ArgumentError, match=message):
            mk.merge([p], "linear", weights=1, out=out)


def test_arguments_may_be_arrays() -> None:
    x, y = torch.tensor([2.0]), torch.tensor([4.0])
    for weights in (np.array([1.0, 3.0]), torch.tensor([1.0, 3.0]), [np.float32(1), torch.tensor(3)], (1, 3)):
        assert mk.merge([x, y], "linear", weights=weights).tolist() == [3.5]
    assert mk.merge([x, y], "linear", weights=np.float64(0.5)).tolist() == [3.0]
    assert mk.merge((t for t in (x, y)), "linear", weights=1).tolist() == [3.0]


WRONG_CALLS = [
    (dict(weights="ab"), "'weights' is not usable"),
    (dict(weights=[None, 1]), "'weights' is not usable"),
    (dict(shard_dim=-1), "shard_dim is not usable; expected a dimension, 0 or more; got -1"),
    (dict(threads="2"), "threads must be at least 1"),
    (dict(method=3), "method is not a name"),
    (dict(name=3), "name is not a tensor's name"),
    (dict(name="\ud800"), "name is not a tensor's name"),
    (dict(out_dtype="bfloat16"), "out_dtype is not usable; expected bfloat16, float16, float32 or float64 of torch"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_CALLS, ids=[str(c) for c, _ in WRONG_CALLS])
def test_wrong_calls(change: dict, message: str) -> None:
    call = dict(method="linear", weights=1) | change
    with pytest.raises(ArgumentError, match=message):
        mk.merge([torch.ones(2), torch.ones(2)], **call)


def test_one_tensor_is_no_list_of_tensors() -> None:
    with pytest.raises(ArgumentError, match="the models are not a list of tensors; got Tensor"):
        mk.merge(torch.ones(2, 3), "linear", weights=1)
    with pytest.raises(ArgumentError, match="the models are not a list of state dicts; got dict"):
        mk.merge_state_dicts({"a": torch.ones(2)}, "linear", weights=1)
    with pytest.raises(ArgumentError, match="is not aligned to its dtype"):
        data = np.frombuffer(bytearray(9), dtype=np.uint8)[1:].view(np.float32)
        mk.merge([torch.from_numpy(data)], "linear", weights=1)


def test_shards_that_do_not_fit_together() -> None:
    x = torch.ones(4, 6)
    with pytest.raises(ArgumentError, match=r"differ in dimension 0 \(shard_dim\) alone; got \(4, 1\), \(4, 5\)"):
        mk.merge([list(x.split([1, 5], 1))], "linear", weights=1)


def test_state_dicts_with_mixed_kinds() -> None:
    whole, real = {"a": torch.tensor([1, 2])}, {"a": torch.tensor([1.0, 2.0])}
    for models in ([whole, real], [real, whole]):
        with pytest.raises(InputError, match="tensor 'a': some inputs hold floats, others integers"):
            mk.merge_state_dicts(models, "linear", weights=1)
    with pytest.raises(ArgumentError, match="shape of model 0 differs from that of the base"):
        mk.merge_state_dicts([whole], "task_arithmetic", base={"a": torch.tensor([1, 2, 3])}, weights=1)
    with pytest.raises(ArgumentError, match="dtype of model 1 differs"):
        mk.merge_state_dicts([whole, {"a": torch.tensor([1, 2], dtype=torch.int32)}], "linear", weights=1)
    with pytest.raises(ArgumentError, match=r"dtype that cannot be merged.*complex64"):
        mk.merge_state_dicts([{"a": torch.ones(2, dtype=torch.complex64)}], "linear", weights=1)
    with pytest.raises(ArgumentError, match="passthrough cannot merge this many models; expected 1; got 2"):
        mk.merge_state_dicts([whole, whole], "passthrough")


def test_lazy_state_dicts_are_read_once_per_pass() -> None:
    """Scope model, 300,000 elements: one reading for the shapes, a sample, a sweep, the writing pass."""

    class Lazy(dict):
        reads: ClassVar[list[str]] = []

        def __getitem__(self, key):
            self.reads.append(key)
            return super().__getitem__(key)

    g = torch.Generator().manual_seed(4)
    base = {"x": torch.randn(300_000, generator=g), "y": torch.randn(10, generator=g)}
    lazy = Lazy({k: v + torch.randn(v.shape, generator=g) for k, v in base.items()})
    mk.merge_state_dicts([lazy], "ties", base=base, weights=1, density=0.3, scope="model")
    assert lazy.reads.count("x") == lazy.reads.count("y") == 4


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("name", [1, "\ud800"])
def test_names_of_state_dicts_are_unicode(name: object, scope: str) -> None:
    sd = {name: torch.ones(2)}
    with pytest.raises(ArgumentError, match="name is not a tensor's name"):
        mk.merge_state_dicts([sd], "ties", base=sd, weights=1, scope=scope)  # type: ignore[list-item, arg-type]


def test_importances_are_named_and_leave_the_dtype_alone() -> None:
    x, importance = torch.ones(3, dtype=torch.bfloat16), torch.ones(3)
    assert mk.merge([x, x], "fisher", importance=[importance] * 2).dtype == torch.bfloat16
    merged = mk.merge_state_dicts([{"a": x}] * 2, "fisher", importance=[{"a": importance}] * 2)
    assert merged["a"].dtype == torch.bfloat16
    with pytest.raises(InputError, match="importance 1 lacks a"):
        mk.merge_state_dicts([{"a": x}] * 2, "fisher", importance=[{"a": importance}, {}])


def test_seeds_are_integers_of_any_library_and_dialects_strings() -> None:
    x = torch.ones(2)
    mk.merge([x], "linear", weights=1, seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="seed is not usable"):
        mk.merge([x], "linear", weights=1, seed=True)
    with pytest.raises(ArgumentError, match="linear has no dialect"):
        mk.merge([x], "linear", weights=1, dialect=["default"])  # type: ignore[arg-type]
