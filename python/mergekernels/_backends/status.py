"""Which backends can run on this machine, found out without importing torch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from ..errors import BackendError

__all__ = ["BackendStatus", "backends"]


@dataclass(frozen=True)
class BackendStatus:
    """One backend. available : it can run here, in this process. detail : how, or why not."""

    name: str
    available: bool
    detail: str


def backends() -> list[BackendStatus]:
    """Every backend, in the order in which it would be chosen, with what it runs on or why it cannot."""
    return [_cuda(), _triton(), _cpu(), _reference()]


def _cpu() -> BackendStatus:
    from .. import _cpu as native
    from .cpu import isa

    try:
        isa()
    except BackendError as error:
        return BackendStatus("cpu", False, str(error))
    return BackendStatus("cpu", True, "C++ on " + ", ".join(native.isas()))


def _reference() -> BackendStatus:
    if importlib.util.find_spec("torch") is None:
        return BackendStatus("reference", False, "torch is not installed")
    return BackendStatus("reference", True, "plain torch, the specification; slow")


def _triton() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", False, "triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return BackendStatus("triton", True, "Triton's interpreter on the CPU, by request only; very slow")
    devices, reason = _num_gpus()
    if not devices:
        return BackendStatus("triton", False, f"{reason}; TRITON_INTERPRET=1 runs it on the CPU")
    return BackendStatus("triton", True, f"{devices} GPU(s)")


def _cuda() -> BackendStatus:
    if importlib.util.find_spec("mergekernels._cuda") is None:
        return BackendStatus("cuda", False, "this build has no CUDA module: nvcc was not found when it was built")
    devices, reason = _num_gpus()
    return BackendStatus("cuda", bool(devices), f"{devices} GPU(s)" if devices else reason)


def _num_gpus() -> tuple[int, str]:
    """(number of NVIDIA GPUs the driver shows, why there is none)."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, "no GPU driver (libcuda.so.1) is installed"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0, "the GPU driver finds no usable device"
    return count.value, "the GPU driver shows no device"
