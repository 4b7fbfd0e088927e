"""The GPU backends on real devices, bit for bit against the reference; elsewhere only what they say about it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import pytest
import torch

from gpu_matrix import SEED, TENSOR, check_stream, check_sweep, inputs, key_interval, tau_of
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._backends._device import place
from mergekernels._native import view_of
from mergekernels.ops.keep import Keep
from mergekernels.ops.program import Program
from mergekernels.ops.sums import Gram, Segments
from mergekernels.ops.sweeps import Sweep
from mergekernels.tensors import BF16, F32, Piece, TensorView

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is no device", allow_module_level=True)

DEVICE = "cuda:0"
BACKENDS = {name: importlib.import_module(f"mergekernels._backends.{name}") for name in ("triton", "cuda")}
REASONS = {
    name: backend.why_not("stream", [TensorView(0, (0,), (1,), BF16, device=DEVICE)])
    for name, backend in BACKENDS.items()
}

if None in REASONS.values():
    from gpu_cases import *  # noqa: F403
    from gpu_feature_cases import *  # noqa: F403
    from learned_cases import *  # noqa: F403


@pytest.fixture(params=BACKENDS)
def target(request: pytest.FixtureRequest) -> tuple[Any, str]:
    if REASONS[request.param] is not None:
        pytest.skip(f"{request.param}: {REASONS[request.param]}")
    return BACKENDS[request.param], DEVICE


def test_many_blocks(target: Any) -> None:
    """More elements than the device holds threads, so that every block loops."""
    n = (1 << 24) + 12345
    x0, models = inputs(n, BF16, 3, "weights", seed=1)
    keep = tuple(Keep(tau_of(x, x0, F32, 0.2), "hash", 1 << 31, n // 2) for x in models)
    fields = {"vote": "weighted", "divisor": "agreeing_weights"}
    check_stream(*target, Program((1.0, 0.5, -0.5), keep, seed=SEED, tensor=TENSOR, **fields), x0, models, BF16)
    narrow = tuple(key_interval(x, x0, F32, 0.2, 0.201) for x in models)
    check_sweep(*target, Sweep(narrow, "hash", True, SEED), x0, models)
    wide = tuple(key_interval(x, x0, F32, 0.1, 0.4) for x in models)
    check_sweep(*target, Sweep(wide, "hash", True, SEED), x0, models, capacity=10)


def test_more_segments_than_an_axis_of_a_grid_holds(target: Any) -> None:
    """The dot products of 300,000 rows: 65,535 is the end of every axis of a grid but the first."""
    assert torch.equal(*products_of_rows(*target, 300_000))


def products_of_rows(backend: Any, device: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dot products by row of two models in a narrow matrix, and what the fixed order of additions gives."""
    rng = torch.Generator().manual_seed(5)
    models = [torch.randn(rows, 3, generator=rng) for _ in range(2)]
    sums = _cpu.BlockSums(3, rows, 3)
    views = [view_of(x.to(device)) for x in models]
    request = Gram(Segments("rows", rows, 3), False)
    backend.gram(request, sums, Piece(0, rows, 3, 3), None, views, compute=F32, threads=1)
    found = torch.stack([torch.frombuffer(bytearray(sums.fold(slot)), dtype=torch.float64) for slot in range(3)])
    x, y = (m.double() for m in models)
    products = torch.stack([x * x, x * y, y * y])
    # Each element is a lane: stride 2 is added before stride 1.
    return found, (products[..., 0] + products[..., 2]) + products[..., 1]


def test_repeated_calls_give_the_same_bits(target: Any) -> None:
    x0, models = inputs(1 << 20, BF16, 3, "weights", seed=2)
    keep = tuple(Keep(tau_of(x, x0, F32, 0.3), "hash", 1 << 30, 5) for x in models)
    program = Program((1.0, 1.0, 1.0), keep, seed=1, tensor=1, vote="weighted", divisor="agreeing_count")
    first = check_stream(*target, program, x0, models, BF16)
    for _ in range(3):
        assert torch.equal(check_stream(*target, program, x0, models, BF16), first)


def test_placed_backend_serves_tensors_in_host_memory(target: Any) -> None:
    """As the engine uses it: tiles in host memory, the result back in host memory."""
    backend, device = target
    placed = place(backend, device)
    assert placed.why_not("stream", [TensorView(0, (0,), (1,), BF16)]) is None
    n = 4096 + 7
    x0, models = inputs(n, BF16, 2, "weights", seed=3)
    assert x0 is not None
    program = Program((0.5, 0.5), (None, None))
    results = []
    for run in (reference, placed):
        out = torch.empty_like(x0)
        stats = _cpu.StreamStats(2, 2)
        views = [view_of(x) for x in (x0, *models)]
        run.stream(program, Piece.flat(0, n), views[0], views[1:], view_of(out), compute=F32, stats=stats, threads=1)
        results.append((out.view(torch.int16), stats.sum_squares(0), stats.sum_squares(1), stats.kept(0)))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


def test_a_launch_that_fails_raises_the_reason() -> None:
    """The native module imports without a driver; only a launch says what is missing."""
    native = pytest.importorskip("mergekernels._cuda", reason="the native module _cuda is not built")
    count, why = native.devices()
    if count:
        pytest.skip("a GPU is there")
    assert why
    program = ([1.0], [None], False, 0, 1, 0, 1.0, 1.0, False, 0, 0)
    with pytest.raises(RuntimeError, match="failed on CUDA device 0: "):
        native.stream(program, (0, 1, 8, 8), 0, [64], 128, 2, 2, 2, False, 0, 1, 0, 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_why_not_without_a_gpu(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    backend = BACKENDS[name]
    if name == "cuda" and importlib.util.find_spec("mergekernels._cuda") is None:
        assert "_cuda is not built" in str(backend.why_not("stream", []))
        return
    assert "no GPU" in str(backend.why_not("stream", []))
    assert "no GPU" in str(place(backend, "cuda").why_not("stream", [TensorView(0, (0,), (1,), BF16)]))
    assert "GPU" in str(backend.why_not("stream", [TensorView(0, (0,), (1,), BF16)]))
