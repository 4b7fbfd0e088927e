"""Makes the helper modules of this folder importable; every test here uses one thread."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="module", autouse=True)
def always(one_thread: None) -> None:
    """Tensors are small in all tests here."""
