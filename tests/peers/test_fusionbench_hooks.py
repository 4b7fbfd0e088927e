"""FusionBench's classes and functions beside ours: `inside_fusionbench.py`, run by the Python of its environment.

Make it by `bash benchmarks/make_peer_env.sh DIR fusionbench`, and say MERGEKERNELS_FUSIONBENCH_ENV=DIR.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from inside import run_inside

PEER = os.environ.get("MERGEKERNELS_FUSIONBENCH_ENV")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PEER is None, reason="MERGEKERNELS_FUSIONBENCH_ENV names no environment with FusionBench"),
]


def test_ours_beside_theirs(tmp_path: Path) -> None:
    assert PEER is not None
    assert run_inside(PEER, "inside_fusionbench.py", tmp_path) > 100
