"""The binding of the CUDA module over the device code compiled for the host."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


_built: list[Any] = []


def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module, compiled once in a session; its launches run on the host."""
    if _built:
        return _built[0]
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    import pybind11

    folder = tmp_path_factory.mktemp("cuda_host")
    sources = [*sorted((ROOT / "csrc").glob("bind_cuda*.cpp")), *sorted((ROOT / "tests").glob("cuda_host*.cpp"))]
    options = [
        *("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"),
    ]

    def compiled(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        subprocess.run([compiler, *options, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    target = folder / "_cuda.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(target)], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(target))
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    _built.append(module)
    return module
