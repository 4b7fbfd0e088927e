"""Tests that need a tool and this package in one process; `make conformance` runs them (see within.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

pytest.register_assert_rewrite("mergekit_cases")


@pytest.fixture(scope="module", autouse=True)
def always(one_thread: None) -> None:
    """Tensors are small in all tests here."""
