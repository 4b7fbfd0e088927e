"""The integration of PEFT where PEFT is not installed: its options, and that nothing is imported unasked."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import mergekernels.integrations.peft as fast
from mergekernels.errors import ArgumentError, ToolError


def test_importing_it_imports_neither_torch_nor_peft() -> None:
    code = "import sys, mergekernels.integrations.peft; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("options", [{"dialect": "PEFT"}, {"dialect": 1}, {"seed": -1}, {"seed": 0.5}])
def test_unusable_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        fast.enable(**options)  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="PEFT is installed here")
def test_without_peft_it_says_so() -> None:
    with pytest.raises(ToolError, match=r"'peft\.tuners\.lora\.model' cannot be imported"):
        fast.enable()
    assert not fast.stats().served
    fast.disable()
