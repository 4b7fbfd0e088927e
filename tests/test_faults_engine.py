"""Every file operation of a merge fails once: OUT is absent or complete, the error is ours, and the rerun gives the
same bytes.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import engine_cases as cases
from engine_cases import EINTR, EIO, ENOSPC, FaultyIo
from mergekernels.errors import InputError, MergeError, OutputError

SMALL = {"model.a.weight": (100, 50), "model.b.weight": (70, 90), "model.c.weight": (9,)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a base of three tensors, so that a sweep over all calls stays short."""
    path = tmp_path_factory.mktemp("faults") / "family"
    generator = torch.Generator().manual_seed(1)
    for name in ("base", "tuned1", "tuned2"):
        cases.save(path / name, {n: torch.randn(s, generator=generator).bfloat16() for n, s in SMALL.items()})
    cases.recipe(path, "ties", name="ties.yml", parameters={"weight": 1.0, "density": 0.4})
    cases.recipe(path, "ties", name="model.yml", parameters={"weight": 1.0, "density": 0.4, "scope": "model"})
    return path


OPTIONS = {"threads": 2, "tile": 4096, "shard_size": 20_000}


def expected(root: Path, tmp_path: Path, name: str = "ties") -> dict[str, str]:
    cases.run_of(root / f"{name}.yml", tmp_path / "expected", **OPTIONS)
    return cases.published(tmp_path / "expected")


def sweep(root: Path, tmp_path: Path, error: int | str, names: tuple[str, ...] = (), step: int = 1) -> tuple[int, int]:
    """Fails the n-th call for n = 1, 1 + step, ... until a run has no n-th call; (runs, runs that raised)."""
    wanted = expected(root, tmp_path)
    raised = 0
    for number in range(10_000):
        io = FaultyIo(1 + number * step, error, names)
        out = tmp_path / f"out{number}"
        plan = cases.plan_of(root / "ties.yml", out, **OPTIONS)
        try:
            cases.execute(plan, overwrite=False, progress=None, io=io, start=0.0)
        except MergeError:
            raised += 1
            if out.exists():
                assert cases.published(out) == wanted
        if not io.fired:
            return number, raised
        if not out.exists() or cases.beside(out):
            cases.run_of(root / "ties.yml", out, **OPTIONS)
        assert cases.published(out) == wanted, number
        assert cases.beside(out) == []
    raise AssertionError("the sweep did not end")


def test_every_call_fails_with_eio(root: Path, tmp_path: Path) -> None:
    runs, raised = sweep(root, tmp_path, EIO)
    assert runs > 60
    assert raised > runs // 3


def test_disk_full_at_every_write(root: Path, tmp_path: Path) -> None:
    runs, raised = sweep(root, tmp_path, ENOSPC, ("pwrite", "fallocate"))
    assert runs == raised > 8


@pytest.mark.parametrize("error", ["short", EINTR, "zero"])
def test_short_and_interrupted_writes_are_completed(root: Path, tmp_path: Path, error: int | str) -> None:
    runs, raised = sweep(root, tmp_path, error, ("pwrite",))
    assert runs > 8
    assert raised == 0


@pytest.mark.parametrize("error", ["short", EINTR, EIO])
def test_short_interrupted_and_failed_reads_are_tried_again(root: Path, tmp_path: Path, error: int | str) -> None:
    runs, raised = sweep(root, tmp_path, error, ("preadv",), step=3)
    assert runs > 8
    assert raised <= (0 if error != EIO else 2)  # small files are not read again


def failing(root: Path, tmp_path: Path, error: int | str, names: tuple[str, ...], at: int = 1) -> MergeError:
    """The error of a run in which these calls fail from the `at`-th on."""
    io = FaultyIo(at, error, names, sticky=True)
    plan = cases.plan_of(root / "ties.yml", tmp_path / "out", **OPTIONS)
    with pytest.raises(MergeError) as caught:
        cases.execute(plan, overwrite=False, progress=None, io=io, start=0.0)
    assert not (tmp_path / "out").exists()
    return caught.value


def test_a_disk_that_cannot_be_read_is_an_error_after_three_tries(root: Path, tmp_path: Path) -> None:
    error = failing(root, tmp_path, EIO, ("preadv",))
    assert isinstance(error, InputError)
    assert "Input/output error" in str(error)


def test_reads_that_end_early_mean_a_truncated_file(root: Path, tmp_path: Path) -> None:
    error = failing(root, tmp_path, "zero", ("preadv",), at=30)
    assert "the file was changed or truncated while it was read; expected " in str(error)


def test_writes_without_progress_end(root: Path, tmp_path: Path) -> None:
    assert "writing makes no progress" in str(failing(root, tmp_path, "zero", ("pwrite",)))


def test_a_full_disk_is_told_before_any_tensor_is_read(root: Path, tmp_path: Path) -> None:
    error = failing(root, tmp_path, ENOSPC, ("fallocate",))
    assert "cannot reserve " in str(error)
    assert "bytes free. Free space and run the same command again: it resumes." in str(error)


def test_a_sync_that_fails_once_is_done_again_in_a_new_file(root: Path, tmp_path: Path) -> None:
    wanted = expected(root, tmp_path)
    io = FaultyIo(5, EIO, ("fsync",))
    seen: list[str] = []
    original = io.call

    def call(name: str, *args: object) -> object:
        if name == "open" and isinstance(args[1], int) and args[1] & os.O_EXCL:
            seen.append(Path(str(args[0])).name.rsplit(".", 1)[0])
        return original(name, *args)

    io.call = call  # type: ignore[method-assign]
    counts = []
    for at in range(3, 8):
        io.count = io.fired = 0
        io.at = at
        seen.clear()
        out = tmp_path / f"out{at}"
        try:
            cases.run_of(root / "ties.yml", out, io=io, **OPTIONS)
        except OutputError:
            continue
        counts.append(max(seen.count(s) for s in set(seen) if s.endswith(".safetensors")))
        assert cases.published(out) == wanted
    assert 2 in counts


def test_a_sync_that_fails_twice_gives_up(root: Path, tmp_path: Path) -> None:
    class Bad(FaultyIo):
        def call(self, name: str, *args: object) -> object:
            if name == "fsync" and isinstance(args[0], int):
                path = os.readlink(f"/proc/self/fd/{args[0]}")
                if "safetensors." in path and not path.endswith(".json") and ".json." not in path:
                    raise OSError(EIO, os.strerror(EIO))
            return super().call(name, *args)

    plan = cases.plan_of(root / "ties.yml", tmp_path / "out", **OPTIONS)
    with pytest.raises(OutputError, match="could not be made durable, twice"):
        cases.execute(plan, overwrite=False, progress=None, io=Bad(-1, EIO), start=0.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_file_systems_without_rename_flags(root: Path, tmp_path: Path, code: int) -> None:
    wanted = expected(root, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "other.safetensors").write_text("")
    (out / "config.json").write_text("{}")
    io = FaultyIo(1, code, ("exchange",), sticky=True)
    cases.run_of(root / "ties.yml", out, io=io, overwrite=True, **OPTIONS)
    assert io.fired
    assert cases.published(out) == wanted
    assert cases.beside(out) == []


def test_an_output_that_appears_meanwhile_is_not_replaced(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Late(FaultyIo):
        def call(self, name: str, *args: object) -> object:
            if name == "rename" and args[1] == out:
                out.mkdir()
                (out / "other").write_text("")
            return super().call(name, *args)

    with pytest.raises(OutputError, match="appeared while the merge ran; nothing was replaced"):
        cases.run_of(root / "ties.yml", out, io=Late(-1, EIO), **OPTIONS)
    assert [p.name for p in out.iterdir()] == ["other"]


def test_an_input_that_changes_after_the_plan(root: Path, tmp_path: Path) -> None:
    family = tmp_path / "family"
    for name in ("base", "tuned1", "tuned2"):
        cases.save(family / name, {n: torch.ones(s).bfloat16() for n, s in SMALL.items()})
    path = cases.recipe(family, "ties", **{"parameters": {"weight": 1.0, "density": 0.4}})
    file = family / "tuned2" / "model.safetensors"
    plan = cases.plan_of(path, tmp_path / "out")
    os.utime(file, ns=(1, 1))
    with pytest.raises(
        InputError, match=r"tuned2/model.safetensors: the input was changed after the merge was planned"
    ):
        cases.execute(plan, overwrite=False, progress=None, io=FaultyIo(-1, EIO), start=0.0)
    plan = cases.plan_of(path, tmp_path / "out")
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(InputError, match=r"expected size .* got size"):
        cases.execute(plan, overwrite=False, progress=None, io=FaultyIo(-1, EIO), start=0.0)
    file.unlink()
    with pytest.raises(InputError, match="the input cannot be opened: No such file"):
        cases.execute(plan, overwrite=False, progress=None, io=FaultyIo(-1, EIO), start=0.0)
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_while_it_is_read(root: Path, tmp_path: Path) -> None:
    family = tmp_path / "family"
    for name in ("base", "tuned1", "tuned2"):
        cases.save(family / name, {n: torch.ones(s).bfloat16() for n, s in SMALL.items()})
    path = cases.recipe(family, "ties", **{"parameters": {"weight": 1.0, "density": 0.4}})
    file = family / "base" / "model.safetensors"

    class Touch(FaultyIo):
        def call(self, name: str, *args: object) -> object:
            result = super().call(name, *args)
            if name == "pwrite":
                os.utime(file, ns=(1, 1))
            return result

    with pytest.raises(InputError, match="the input was changed after the merge was planned"):
        cases.run_of(path, tmp_path / "out", io=Touch(-1, EIO))
    assert not (tmp_path / "out").exists()


_HOLD = """
import sys, time
sys.path.insert(0, sys.argv[3])
import engine_cases as cases
from pathlib import Path
class Slow(cases.FaultyIo):
    def call(self, name, *args):
        if name == "fallocate":
            print("holding", flush=True)
            time.sleep(60)
        return super().call(name, *args)
cases.run_of(Path(sys.argv[1]), Path(sys.argv[2]), io=Slow(-1, 5), threads=1)
"""


def test_a_second_process_is_refused_while_the_first_works(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"threads": 1}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(root / "ties.yml"), str(out), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holding\n"
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="another process is merging into this output"):
                cases.run_of(root / "ties.yml", out, overwrite=overwrite, **options)
        process.kill()
    start = time.monotonic()
    cases.run_of(root / "ties.yml", out, **options)
    assert time.monotonic() - start < 30
    assert cases.beside(out) == []
