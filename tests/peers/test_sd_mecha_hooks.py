"""sd-mecha with and without these kernels: `inside_sd_mecha.py`, run by the Python of an environment with sd-mecha.

Make it by `bash benchmarks/make_peer_env.sh DIR sd-mecha`, and say MERGEKERNELS_SD_MECHA_ENV=DIR.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from inside import run_inside

PEER = os.environ.get("MERGEKERNELS_SD_MECHA_ENV")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PEER is None, reason="MERGEKERNELS_SD_MECHA_ENV names no environment with sd-mecha"),
]


def test_hooked_beside_unhooked(tmp_path: Path) -> None:
    assert PEER is not None
    assert run_inside(PEER, "inside_sd_mecha.py", tmp_path) > 100
