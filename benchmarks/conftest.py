"""Options, data and yardsticks of the op benchmarks.

`pytest bench_select.py bench_stream.py bench_methods.py` in this folder measures at full size (16 and 64 Mi elements, a
few minutes on two cores), `--quick` at 1 Mi elements in seconds, `--results FILE` puts the numbers into the "ops"
section of a JSON file. `bench_spectral.py` does the same for ops over matrices, in the section "spectral".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import versus as matrices
from machine import facts
from yardsticks import Family, Recorder, records

MI = 1 << 20


_MACHINE: pytest.StashKey[dict[str, Any]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MACHINE] = facts()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mergekernels")
    group.addoption("--quick", action="store_true", help="1 Mi elements: shows that it runs, measures little")
    group.addoption("--results", default=None, help="JSON file whose section 'ops' is written")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "numel" in metafunc.fixturenames:
        sizes = [MI] if metafunc.config.getoption("--quick") else [16 * MI, 64 * MI]
        metafunc.parametrize("numel", sizes, ids=[f"{n // MI}Mi" for n in sizes], scope="module")


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def family(request: pytest.FixtureRequest, numel: int) -> Family:
    """Values as in checkpoints.py: base normal with 0.02, fine-tunes base + N * 0.001 * (1 + |N'|)."""
    dtype = getattr(torch, request.param)
    if dtype is torch.float32 and numel > 16 * MI:
        pytest.skip("float32 is measured at 16 Mi elements only, to keep eager torch within 8 GiB")
    draw = torch.Generator().manual_seed(7)
    base = (0.02 * torch.randn(numel, generator=draw)).to(dtype)
    models = []
    for _ in range(3):
        noise = torch.randn(numel, generator=draw).mul_(torch.randn(numel, generator=draw).abs_().add_(1)).mul_(0.001)
        models.append(noise.add_(base).to(dtype))
    return Family(base, models)


@pytest.fixture(scope="session", autouse=True)
def threads() -> Iterator[int]:
    """Every core that this process may use, for torch as well."""
    before = torch.get_num_threads()
    count = len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Recorder:
    return Recorder(benchmark, request.config.getoption("--quick"))


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> matrices.Versus:
    return matrices.Versus(benchmark, request.config.getoption("--quick"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if matrices.rows:
        terminalreporter.section("matrices")
        for row in matrices.rows:
            terminalreporter.write_line(matrices.line(row))
        _write(config, "spectral", matrices.rows)
    if not records:
        return
    terminalreporter.section("ops")
    for e in records:
        terminalreporter.write_line(
            f"{e['op']:26} {e['dtype']:9} {e['elements'] // MI:3d} Mi  {e['ns_per_element']:7.3f} ns/element  "
            f"{e['gb_per_s']:6.2f} GB/s = {e['percent_of_plain_read']:5.1f} % of a plain read  "
            + (f"{e['times_faster_than_eager']:6.1f}x eager torch" if "torch_eager_ms" in e else "")
        )
    streams = {(e["dtype"], e["elements"]): e["median_ms"] for e in records if e["op"] == "stream ties"}
    for e in records:
        key = (e["dtype"], e["elements"])
        if e["op"] == "select" and key in streams:
            e["over_stream"] = round(e["median_ms"] / streams[key], 2)
            terminalreporter.write_line(
                f"select takes {e['over_stream']:.2f} times as long as the ties pass "
                f"({e['dtype']}, {e['elements'] // MI} Mi)"
            )
    _write(config, "ops", records)


def _write(config: pytest.Config, section: str, found: list[dict[str, Any]]) -> None:
    """Puts the rows into a section of the file of `--results`, if that is given."""
    target = config.getoption("--results")
    if target:
        path = Path(target)
        whole = json.loads(path.read_text()) if path.exists() else {}
        machine = config.stash[_MACHINE]
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if section == "spectral":
            # A row is a ratio within its own run: rows of other runs stay, each with its commit and date.
            found = [row | {"commit": machine["commit"], "date": now} for row in found]
            fresh = {matrices.key(row) for row in found}
            before = whole.get(section, {}).get("records", [])
            found = [row for row in before if matrices.key(row) not in fresh] + found
        whole[section] = {"machine": machine, "date": now, "records": found}
        path.write_text(json.dumps(whole, indent=2) + "\n")
