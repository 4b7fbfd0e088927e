"""The Triton kernels under Triton's interpreter, bit for bit against the reference.

Triton decides when kernels are imported, so this runs in a process of its own:

    TRITON_INTERPRET=1 pytest tests/interpreter
"""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is asked for before start: TRITON_INTERPRET=1", allow_module_level=True)


from gpu_cases import *  # noqa: F403
from mergekernels._backends import triton as backend


@pytest.fixture
def target() -> tuple[Any, str]:
    return backend, "cpu"
