"""The table of methods over matrices, and how their arguments are bound."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix_table import get_matrix, matrix_names
from mergekernels.errors import ArgumentError


def test_names_have_methods() -> None:
    assert "cat" in matrix_names("adapters")
    for takes in ("models", "adapters"):
        names = matrix_names(takes)
        assert len(set(names)) == len(names)
        for name in names:
            info = get_matrix(name, takes).info
            assert info.name == name
            assert takes in info.takes
            assert info.tier == "T2"
            assert "default" in info.dialects


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ArgumentError, match=r"unknown method for adapters.*Did you mean 'cat'") as caught:
        get_matrix("catt", "adapters")
    assert caught.value.code == "method.unknown"
    with pytest.raises(ArgumentError):
        get_matrix("cat", "models")


def test_bind_fills_defaults_and_refuses() -> None:
    method = get_matrix("cat", "adapters")
    assert bind_matrix(method, {"weights": [1, -2.5]}, 2, "default") == {"weight": (1.0, -2.5), "lambda": 1.0}
    assert bind_matrix(method, {"scale": 0.5}, 3, "peft") == {"weight": (1.0, 1.0, 1.0), "lambda": 0.5}
    for arguments, count, dialect, code in (
        ({"weights": [1.0]}, 2, "default", "parameter.count"),
        ({"weights": float("nan")}, 2, "default", "parameter.value"),
        ({"wieghts": 1.0}, 2, "default", "parameter.unknown"),
        ({}, 2, "pef", "dialect.unknown"),
        ({}, 0, "default", "models.count"),
    ):
        with pytest.raises(ArgumentError) as caught:
            bind_matrix(method, arguments, count, dialect)
        assert caught.value.code == code


def test_descriptions_need_no_torch() -> None:
    code = (
        "import sys; from mergekernels._methods.matrix_table import matrix_names; "
        "assert matrix_names('adapters'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
