"""The passes of learned coefficients and masks on the C++ CPU backend, bit for bit against the reference."""

from __future__ import annotations

from typing import Any

import pytest

from learned_cases import *  # noqa: F403
from mergekernels._backends import cpu


@pytest.fixture
def target() -> tuple[Any, str]:
    return cpu, "cpu"
