"""The small decompositions of the CUDA module: compiled for the host here, and on a GPU where there is one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cuda_host_module import build
from jacobi_cases import *  # noqa: F403
from mergekernels import ops
from mergekernels._backends import _cuda_launches as launches
from mergekernels._backends import cuda_small
from mergekernels.errors import DataError
from mergekernels.ops.spectral import small

DEVICE = torch.device("cuda:0")
REASON = cuda_small.why_not(DEVICE)


@pytest.fixture(scope="session")
def host_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory)


@pytest.fixture(params=["host", "cuda"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    cuda_small._limit.cache_clear()
    if request.param == "cuda":
        if REASON is not None:
            pytest.skip(f"cuda: {REASON}")
        yield str(DEVICE)
        return
    module = request.getfixturevalue("host_module")
    monkeypatch.setattr(launches, "native", lambda: module)
    monkeypatch.setattr(launches, "queue_of", lambda x: (0, 0))
    yield "cpu"
    cuda_small._limit.cache_clear()


def test_host_and_device_have_the_same_bits(host_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps are the same, and so is every operation in them."""
    if REASON is not None:
        pytest.skip(f"cuda: {REASON}")
    inputs = [matrix(p, s, "flat", p) for p, s in ((5, 5), (40, 30), (100, 60))]  # noqa: F405
    on_device = cuda_small.small_svd_batch([m.to(DEVICE) for m in inputs])
    values = cuda_small.small_eigh_batch([(m.t() @ m).to(DEVICE) for m in inputs])
    monkeypatch.setattr(launches, "native", lambda: host_module)
    monkeypatch.setattr(launches, "queue_of", lambda x: (0, 0))
    for (u, s, vh, info), (u1, s1, vh1, info1) in zip(on_device, cuda_small.small_svd_batch(inputs), strict=True):
        assert u is not None and vh is not None and u1 is not None and vh1 is not None
        assert torch.equal(u.cpu(), u1) and torch.equal(s.cpu(), s1) and torch.equal(vh.cpu(), vh1) and info == info1
    for (v, w, _), (v1, w1, _) in zip(values, cuda_small.small_eigh_batch([m.t() @ m for m in inputs]), strict=True):
        assert torch.equal(v.cpu(), v1) and torch.equal(w.cpu(), w1)


def test_barriers_suffice(target: str) -> None:
    """The threads of the host build run forwards in one launch, backwards in the next: steps must not notice."""
    for p, s in ((9, 7), (60, 40), (100, 90)):
        m = matrix(p, s, "gaps", p).to(target)  # noqa: F405
        g = symmetric(s, "head", p).to(target)  # noqa: F405
        svds = [cuda_small.small_svd_batch([m])[0] for _ in range(2)]
        eighs = [cuda_small.small_eigh_batch([g])[0] for _ in range(2)]
        for first, second in (*zip(*svds, strict=True), *zip(*eighs, strict=True)):
            assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_many_matrices_at_once(target: str) -> None:
    """More blocks than a device runs side by side, of shapes that share launches."""
    count = 2000 if target != "cpu" else 60
    shapes = list(itertools.islice(itertools.cycle([(16, 16), (24, 8), (8, 24), (40, 40)]), count))
    inputs = [matrix(p, s, "gaps", i) for i, (p, s) in enumerate(shapes)]  # noqa: F405
    for m, (u, s, vh, info) in zip(inputs, cuda_small.small_svd_batch([m.to(target) for m in inputs]), strict=True):
        assert u is not None and vh is not None and info.sweeps > 0
        check_svd(m, (u, s, vh), 1e-13)  # noqa: F405


@pytest.fixture
def on_chip(target: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The target, with the ops taking it for a GPU."""
    if target == "cpu":
        monkeypatch.setattr(small, "_fits_on_chip", lambda m, eigh: cuda_small.fits(*m.shape, 0, eigh=eigh))
    return target


def test_ops_decompose_on_the_chip_what_fits(on_chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists with matrices that are too large or empty, and single ones; signs and ranks as on the CPU."""
    taken: list[tuple[int, ...]] = []
    run = cuda_small.small_svd_batch
    monkeypatch.setattr(
        cuda_small, "small_svd_batch", lambda m, **k: taken.extend(tuple(x.shape) for x in m) or run(m, **k)
    )
    shapes = [(20, 12), (150, 10), (7, 30), (0, 4), (5, 5)]
    inputs = [torch.zeros(p, s) if p == 0 else matrix(p, s, "gaps", p) for p, s in shapes]  # noqa: F405
    found = ops.small_svd([m.to(on_chip) for m in inputs])
    assert taken == [(20, 12), (7, 30), (5, 5)]
    for m, svd in zip(inputs, found, strict=True):
        assert svd.s.dtype == torch.float64 and svd.s.device.type == torch.device(on_chip).type
        if not m.numel():
            assert svd.rank == 0
            continue
        check_svd(m, (svd.u, svd.s, svd.vh), 1e-13)  # noqa: F405
        u = svd.u.cpu()
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
        # The default cut is 1e-5 at most, the spectrum 1, 1, 1, 0.1, ...
        cut = ops.rank_cut(*m.shape)
        assert svd.rank == sum(10.0 ** -(i // 3) > cut * (1 + 1e-6) for i in range(min(m.shape)))
    alone = ops.small_svd(inputs[0].float().to(on_chip), want="values")
    assert alone.u is None and torch.allclose(alone.s.cpu(), found[0].s.cpu(), rtol=1e-5, atol=1e-7)
    g = symmetric(30, "gaps")  # noqa: F405
    check_eigh(g, (lambda e: (e.vectors, e.values))(ops.small_eigh(g.to(on_chip))), 1e-13)  # noqa: F405


def test_ops_name_what_did_not_converge(on_chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cuda_small.small_svd_batch
    failed = cuda_small.Convergence(0, 0.25)
    monkeypatch.setattr(
        cuda_small,
        "small_svd_batch",
        lambda m, **k: [(*f[:3], failed if i == 1 else f[3]) for i, f in enumerate(run(m))],
    )
    inputs = [torch.eye(3, device=on_chip)] * 2
    with pytest.raises(DataError, match=r"M\[1\]: Jacobi's sweeps did not converge") as caught:
        ops.small_svd(inputs)
    assert "2.5e-01 after 30 sweeps" in str(caught.value.got)
    with pytest.raises(DataError, match=r"M\[1\] holds NaN"):
        ops.small_svd([inputs[0], inputs[0] * float("nan")])


def test_binding_refuses_what_would_crash(host_module: Any) -> None:
    good = (64, 1, 1, 0, 0, 0, 0, 0, 0, 64, 0, 64, 3, 2)
    assert len(host_module.jacobi_table([good, good], 3)) == 2 * len(host_module.jacobi_table([good], 3))
    for place, value in ((0, 0), (9, 0), (11, 0), (12, 1), (12, 129), (13, 0)):
        with pytest.raises(ValueError):
            host_module.jacobi_table([(*good[:place], value, *good[place + 1 :])], 3)
    for call in (
        (False, 0, 1, 3, 32, 64),
        (False, 64, 0, 3, 32, 64),
        (False, 64, 1, 3, 64, 64),
        (False, 64, 1, 3, 32, 0),
    ):
        with pytest.raises(ValueError):
            host_module.jacobi(*call, 0, 0)
    with pytest.raises(ValueError, match="128 >= p >= s >= 1"):
        host_module.jacobi_room(True, 4, 3, False, 3)
