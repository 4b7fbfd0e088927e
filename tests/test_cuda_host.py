"""The device code of the CUDA backend, compiled for the host with its binding, bit for bit against the reference.

What is left for a GPU to show are the kernels' loops over groups, their warp sums and appends, and the launches.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from cuda_host_module import build
from gpu_cases import *  # noqa: F403
from gpu_feature_cases import *  # noqa: F403
from learned_cases import *  # noqa: F403
from mergekernels._backends import _cuda_launches as launches
from mergekernels._backends import cuda as backend


@pytest.fixture(scope="session")
def host_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory)


@pytest.fixture
def target(host_module: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    monkeypatch.setattr(launches, "native", lambda: host_module)
    monkeypatch.setattr(launches, "queue_of", lambda x: (0, 0))
    return backend, "cpu"


def test_backend_says_why_not() -> None:
    """Replaces the common test: the host build is no backend."""
    import torch

    from mergekernels._native import view_of

    view = view_of(torch.zeros(4))
    assert "no kernel for polar" in str(backend.why_not("polar", [view]))
    if importlib.util.find_spec("mergekernels._cuda") is None:
        assert "_cuda is not built" in str(backend.why_not("stream", [view]))
    else:
        assert "a tensor is on cpu" in str(backend.why_not("stream", [view]))
        assert "int64" in str(backend.why_not("stream", [view_of(torch.zeros(4, dtype=torch.int64))]))
        if not torch.cuda.is_available():
            assert "no GPU" in str(backend.why_not("stream", []))


def test_binding_refuses_what_would_crash(host_module: Any) -> None:
    program = ([1.0], [None], False, 0, 1, 0, 1.0, 1.0, False, 0, 0)
    with pytest.raises(ValueError, match="11 fields"):
        host_module.stream(program[:5], (0, 1, 1, 1), 0, [64], 0, 2, 2, 2, False, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="1 to 64 models"):
        host_module.stream(program, (0, 1, 1, 1), 0, [64] * 65, 0, 2, 2, 2, False, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="no dtype code"):
        host_module.stream(program, (0, 1, 1, 1), 0, [64], 0, 4, 2, 2, False, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="float64 inputs are computed in float64"):
        host_module.stream(program, (0, 1, 1, 1), 0, [64], 0, 3, 2, 2, False, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="left out"):
        host_module.sweep([(1, 1, 2, 0, 0)], True, (0, 1, 1, 1), 0, [0], 2, 2, 0, 0, 0, 1, 0, 0, 1, 64, 64, 64, 0, 0, 0)


def test_binding_refuses_learned_passes_that_do_not_fit(host_module: Any) -> None:
    piece, mask, there, none = (0, 1, 8, 8), (0.5, 1.0, 0, 0), (64, 2), (0, 2)
    end = (64, 0, 0)  # sums, device, queue
    cases: list[tuple[Any, str]] = [
        (lambda: host_module.seg_dot(1, (0, 0), None, piece, 0, [], there, none, 2, 2, *end), "1 to 64 models"),
        (lambda: host_module.seg_dot(1, (0, 0), None, piece, 0, [64], none, none, 2, 2, *end), "need a gradient"),
        (lambda: host_module.seg_dot(257, (0, 0), None, piece, 0, [64], there, none, 2, 2, *end), "256 groups"),
        (lambda: host_module.seg_dot(1, (0, 0), mask, piece, 0, [64], there, none, 2, 2, *end), "needs logits"),
        (lambda: host_module.seg_dot(1, (0, 0), None, (5, 1, 8, 8), 0, [64], there, none, 2, 2, *end), "4096"),
        (lambda: host_module.seg_dot(1, (0, 0), None, (0, 2, 4, 9), 0, [64], there, none, 2, 2, *end), "flat"),
        (lambda: host_module.seg_dot(1, (0, 0), None, piece, 0, [64], (64, 3), none, 2, 2, *end), "float64"),
        (lambda: host_module.seg_dot(1, (0, 0), None, piece, 0, [64], (64, 4), none, 2, 2, *end), "no dtype code"),
        (lambda: host_module.mask_sum(mask, piece, none, 2, *end), "needs logits"),
        (lambda: host_module.mask_sum(mask, piece, there, 2, 0, 0, 0), "need a place"),
        (
            lambda: host_module.mask_merge([1.0, 2.0], None, mask, piece, 0, [64], none, there, there, 2, 2, 0, 0),
            "one weight",
        ),
        (
            lambda: host_module.mask_merge([1.0], 0.5, mask, piece, 0, [64], none, there, there, 2, 2, 0, 0),
            "needs a gradient",
        ),
        (
            lambda: host_module.mask_merge([1.0], None, mask, piece, 0, [64], none, there, none, 2, 2, 0, 0),
            "needs an output",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
