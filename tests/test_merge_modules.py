"""merge_modules: live modules beside merge_state_dicts on their state dicts, ties, buffers, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mergekernels as mk
from mergekernels.errors import ArgumentError, DataError, InputError, MergeError, PlanError


class Net(nn.Module):
    """Tied embeddings, a layer, running statistics and a buffer that no state dict holds."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, tie: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.embed = nn.Embedding(10, 8, _weight=random(10, 8))
        self.layers = nn.ModuleList([nn.Linear(8, 8, dtype=dtype) for _ in range(2)])
        for layer in self.layers:
            layer.weight = nn.Parameter(random(8, 8))
            layer.bias = nn.Parameter(random(8))
        self.norm = nn.BatchNorm1d(8, dtype=dtype)
        self.norm.running_mean = random(8)
        self.head = nn.Linear(8, 10, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight if tie else nn.Parameter(random(10, 8))
        self.register_buffer("angles", random(4), persistent=False)
        self.layers[1].bias.requires_grad = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Enough for a gradient."""
        return self.head(self.layers[1](self.layers[0](self.embed(ids))))


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


def untied(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state(net).items() if name != "head.weight"}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(v, two[k]) and v.dtype == two[k].dtype for k, v in one.items())


CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("linear", {"weights": [0.3, 0.9], "normalize": False}, False),
    ("ties", {"weights": [1, -0.4], "density": 0.4}, True),
    ("ties", {"weights": 1, "density": 0.4, "scope": "model"}, True),
    ("dare_ties", {"weights": 1, "density": 0.5, "seed": 5}, True),
    ("della", {"weights": 1, "density": 0.5, "epsilon": 0.2, "then": [("lines", {"alpha": 0.2})]}, True),
    ("tsv_m", {}, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "params", "needs"), CASES)
def test_new_and_in_place_are_the_merge_of_the_state_dicts(
    method: str, params: dict[str, Any], needs: bool, dtype: torch.dtype
) -> None:
    nets, base = [Net(i, dtype) for i in (1, 2)], Net(9, dtype)
    before = [state(n) for n in (*nets, base)]
    origin = base if needs else None
    want = mk.merge_state_dicts([untied(n) for n in nets], method, base=untied(base) if needs else None, **params)
    new = mk.merge_modules(nets, method, base=origin, **params)
    assert same(untied(new), want)
    assert all(same(state(n), b) for n, b in zip((*nets, base), before, strict=True))
    for target in (nets[1], base if needs else Net(3, dtype), nets[0]):
        given = [Net(i, dtype) for i in (1, 2)]
        fresh = Net(9, dtype) if needs else None
        target = {id(nets[1]): given[1], id(nets[0]): given[0], id(base): fresh}.get(id(target), target)
        places = {name: t.data_ptr() for name, t in target.state_dict().items()}
        assert mk.merge_modules(given, method, base=fresh, out=target, **params) is target
        assert same(untied(target), want)
        assert {name: t.data_ptr() for name, t in target.state_dict().items()} == places
        assert target.head.weight is target.embed.weight


def test_a_new_module_is_like_its_pattern_and_shares_nothing() -> None:
    nets, base = [Net(i) for i in (1, 2)], Net(9)
    base.eval()
    base.label = "kept"  # type: ignore[assignment]
    base.embed.weight.marked = True  # type: ignore[attr-defined]
    new = mk.merge_modules(nets, "task_arithmetic", base=base, weights=0.5)
    assert type(new) is Net and not new.training and new.label == "kept" and new.embed.weight.marked  # type: ignore[attr-defined]
    assert new.head.weight is new.embed.weight and isinstance(new.head.weight, nn.Parameter)
    assert torch.equal(new.angles, base.angles) and new.angles.data_ptr() != base.angles.data_ptr()  # type: ignore[union-attr, arg-type]
    wanted = {name: p.requires_grad for name, p in base.named_parameters()}
    assert {name: p.requires_grad for name, p in new.named_parameters()} == wanted and not all(wanted.values())
    taken = {t.data_ptr() for n in (*nets, base) for t in (*n.parameters(), *n.buffers())}
    assert not taken & {t.data_ptr() for t in (*new.parameters(), *new.buffers())}
    new(torch.tensor([1])).sum().backward()
    assert mk.merge_modules(nets, "linear", weights=1).training  # the first model's


def test_dtypes() -> None:
    nets = [Net(1), Net(2, torch.bfloat16)]
    want = mk.merge_state_dicts([untied(n) for n in nets], "linear", weights=0.5)
    assert same(untied(mk.merge_modules(nets, "linear", weights=0.5)), want)
    half = mk.merge_modules(nets, "linear", weights=0.5, out_dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    out = Net(3, torch.bfloat16)
    mk.merge_modules(nets, "linear", weights=0.5, out=out)
    assert torch.equal(out.embed.weight, want["embed.weight"].bfloat16())


def test_ties_of_the_pattern_hold_or_are_refused() -> None:
    loose, tied = [Net(i, tie=False) for i in (1, 2)], Net(9)
    with pytest.raises(InputError, match=r"embed\.weight.*ties 'head\.weight'.*model 0"):
        mk.merge_modules(loose, "task_arithmetic", base=tied, weights=1)
    for net in loose:
        net.head.weight.data = net.embed.weight.data.clone()
    new = mk.merge_modules(loose, "task_arithmetic", base=tied, weights=1)
    assert new.head.weight is new.embed.weight
    out = Net(3, tie=False)
    mk.merge_modules([Net(1), Net(2)], "linear", weights=1, out=out)
    assert out.head.weight is not out.embed.weight and torch.equal(out.head.weight, out.embed.weight)
    shared = Net(1, tie=False)  # tied by memory, not by identity
    shared.head.weight.data = shared.embed.weight.data
    new = mk.merge_modules([shared, Net(2)], "linear", weights=1)
    assert new.head.weight.data_ptr() == new.embed.weight.data_ptr()


def test_integer_buffers(caplog: pytest.LogCaptureFixture) -> None:
    nets, base = [Net(1), Net(2)], Net(9)
    for i, net in enumerate((*nets, base)):
        net.norm.num_batches_tracked.fill_(i)  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"norm\.num_batches_tracked"):
        mk.merge_modules(nets, "linear", weights=1)
    new = mk.merge_modules(nets, "task_arithmetic", base=base, weights=1)
    assert int(new.norm.num_batches_tracked) == 2 and "norm.num_batches_tracked" in caplog.text  # type: ignore[arg-type, union-attr]
    mk.merge_modules(nets, "task_arithmetic", base=base, weights=1, out=nets[0])
    assert int(nets[0].norm.num_batches_tracked) == 2  # type: ignore[arg-type]


def test_autograd_sees_the_write() -> None:
    net = Net(1)
    loss = net(torch.tensor([1, 2])).pow(2).sum()
    mk.merge_modules([net, Net(2)], "linear", weights=1, out=net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_companions_may_be_modules() -> None:
    nets, importance = [Net(1), Net(2)], [Net(3), Net(4)]
    for net in importance:
        for t in (*net.parameters(), *net.buffers()):
            t.data = t.data.abs()
    want = mk.merge_state_dicts([untied(n) for n in nets], "fisher", importance=[untied(n) for n in importance])
    assert same(untied(mk.merge_modules(nets, "fisher", importance=importance)), want)
    assert same(untied(mk.merge_modules(nets, "fisher", importance=[untied(n) for n in importance])), want)


def test_wrappers_are_looked_through() -> None:
    nets = [Net(1), Net(2)]
    want = untied(mk.merge_modules(nets, "linear", weights=1))
    assert same(untied(mk.merge_modules([nn.DataParallel(nets[0]), nets[1]], "linear", weights=1)), want)
    wrapped = nn.DataParallel(nets[0])
    assert mk.merge_modules([nn.DataParallel(nets[0]), nets[1]], "linear", weights=1, out=wrapped) is wrapped
    assert same(untied(nets[0]), want)


def _meta(net: Net) -> None:
    net.layers[0].to("meta")


def _int8(net: Net) -> None:
    net.layers[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)


def _shape(net: Net) -> None:
    net.layers[0].weight = nn.Parameter(torch.zeros(8, 9))


def _name(net: Net) -> None:
    net.layers[0].extra = nn.Parameter(torch.zeros(1))  # type: ignore[assignment]


def _lazy(net: Net) -> None:
    net.layers[0] = nn.LazyLinear(8)


@pytest.mark.parametrize("spoil", [_meta, _int8, _shape, _name, _lazy])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_does_not_fit_is_refused_before_anything_is_written(spoil: Callable[[Net], None], where: int) -> None:
    nets = [Net(1), Net(2), Net(9)]
    spoil(nets[where])
    out = Net(4)
    before = state(out)
    label = ("model 0", "model 1", "the base")[where]
    with pytest.raises((ArgumentError, InputError, PlanError), match=r"layers\.0\.(weight|extra)") as caught:
        mk.merge_modules(nets[:2], "ties", base=nets[2], weights=1, density=0.5, out=out)
    assert spoil in (_name,) or label in str(caught.value)
    assert same(state(out), before)


class Views(nn.Module):
    """Two parameters of one memory."""

    def __init__(self, seed: int, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        self.one = nn.Parameter(whole[:, :2])
        self.two = nn.Parameter(view(whole))


@pytest.mark.parametrize("view", [lambda w: w[:, :2].T, lambda w: w[:, 1:], lambda w: w[3:4], lambda w: w])
def test_memory_under_two_names_is_refused_in_place(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    nets = [Views(1, view), Views(2, view)]
    want = {name: (t + state(nets[1])[name]) / 2 for name, t in state(nets[0]).items()}
    before = state(nets[0])
    with pytest.raises(ArgumentError, match="lies in the same memory") as caught:
        mk.merge_modules(nets, "linear", weights=1, out=nets[0])
    assert caught.value.code == "module.overlap"
    assert same(state(nets[0]), before)
    assert same(state(mk.merge_modules(nets, "linear", weights=1)), want)


def test_memory_of_another_name_in_an_input_is_refused_in_place() -> None:
    nets, out = [Net(1), Net(2)], Net(4)
    out.layers[0].weight = nets[1].layers[1].weight
    with pytest.raises(ArgumentError, match=r"layers\.[01]\.weight.*layers\.[01]\.weight"):
        mk.merge_modules(nets, "linear", weights=1, out=out)


def test_columns_of_one_matrix_are_no_overlap() -> None:
    nets = [Views(seed, lambda w: w[:, 2:]) for seed in (1, 2)]
    want = {name: (t + state(nets[1])[name]) / 2 for name, t in state(nets[0]).items()}
    assert mk.merge_modules(nets, "linear", weights=1, out=nets[0]) is nets[0]
    assert same(state(nets[0]), want)


def test_other_errors() -> None:
    nets = [Net(1), Net(2)]
    nets[1].layers[0].weight.data[3, 4] = float("nan")
    with pytest.raises(DataError, match=r"layers\.0\.weight.*model 1"):
        mk.merge_modules(nets, "linear", weights=1)
    for args, kwargs, code in (
        ((Net(1), "linear"), {}, "models.type"),
        (([], "linear"), {}, "models.count"),
        (([{"w": torch.ones(1)}], "linear"), {}, "models.type"),
        (([Net(1)], "linear"), {"out": Net(2), "out_dtype": torch.float16}, "out_dtype"),
        (([Net(1)], "linaer"), {}, "method.unknown"),
    ):
        with pytest.raises(MergeError) as caught:
            mk.merge_modules(*args, weights=1, **kwargs)  # type: ignore[arg-type]
        assert caught.value.code == code


def test_dtensors_have_the_bits_of_the_whole_call(tmp_path: Path) -> None:
    """Two processes, every one with its shards."""
    driver = Path(__file__).parent / "dtensor_ranks.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(driver), str(rank), "2", str(tmp_path / "store")],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_on_other_devices() -> None:
    nets, base = [Net(1), Net(2)], Net(9)
    want = mk.merge_modules(nets, "ties", base=base, weights=1, density=0.5)
    base.layers.to("cuda")
    nets[0].to("cuda")
    new = mk.merge_modules(nets, "ties", base=base, weights=1, density=0.5)
    assert new.layers[0].weight.is_cuda and not new.embed.weight.is_cuda
    assert same(untied(new.cpu()), untied(want))


def test_state_dicts_are_written_into_tensors_of_the_caller() -> None:
    """`out` of merge_state_dicts: whole and in shards, with its own dtype; what does not fit is refused."""
    dicts = [{"w": torch.full((4, 3), float(i)), "n": torch.tensor([5])} for i in (1, 2)]
    out = {"n": torch.tensor([0]), "w": torch.zeros(4, 3, dtype=torch.float64)}
    got = mk.merge_state_dicts(dicts, "linear", weights=1, out=out)
    assert list(got) == ["w", "n"] and got["w"] is out["w"] and got["n"] is out["n"]
    assert bool((out["w"] == 1.5).all()) and int(out["n"]) == 5
    shards: Any = {"w": list(torch.zeros(4, 3).split([1, 3])), "n": torch.tensor([0])}
    cut: Any = [{"w": list(d["w"].split([1, 3])), "n": d["n"]} for d in dicts]
    mk.merge_state_dicts(cut, "linear", weights=1, out=shards)
    assert bool((torch.cat(shards["w"]) == 1.5).all())
    for bad, code in (
        ({"w": out["w"]}, "names"),
        ({**out, "n": torch.tensor([0.0])}, "out"),
        ({**out, "w": torch.zeros(3, 4)}, "out"),
        ({**out, "w": "w"}, "out"),
        (7, "models.type"),
    ):
        with pytest.raises(MergeError) as caught:
            mk.merge_state_dicts(dicts, "linear", weights=1, out=bad)  # type: ignore[arg-type]
        assert caught.value.code == code
