"""Fixtures of several test files; modules that hold checks for several say what differs, as the test files do."""

import signal
from collections.abc import Iterator

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A runner in the background ignores Ctrl-C, and the processes that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite(
    "feature_cases",
    "feature_programs",
    "feature_shared",
    "feature_streams",
    "feature_sums",
    "feature_sweeps",
    "gpu_cases",
    "gpu_feature_cases",
    "learned_cases",
    "gpu_matrix",
)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors: on a busy machine torch's threads wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
