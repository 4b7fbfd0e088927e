"""Rounds of sums, of several searches and of joint keys out of core: the values, and the same bits however they are
cut, in either scope.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import engine_cases as cases
import mergekernels as mk
import rounds_cases as rounds
from mergekernels import _methods
from mergekernels.engine.recipe import load_recipe, resolve
from mergekernels.errors import ArgumentError, BackendError, DataError, MergeError

VARIANTS: list[dict[str, Any]] = [
    {"tile": 4096, "threads": 3},
    {"threads": 1, "memory": 16_000_000},
    {"threads": 2, "tile": 8192, "shard_size": 30_000},
    {"threads": 8, "shard_size": 10**9},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounds.family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> rounds.Probe:
    method = rounds.Probe()
    monkeypatch.setitem(_methods._METHODS, "probe", method)
    return method


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return tensors


def models_for(kind: str) -> int:
    return 1 if kind == "divergence" else rounds.MODELS


def in_memory(probe: rounds.Probe, kind: str, scope: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    probe.seen.clear()
    base, *models = rounds.tensors()
    merged = mk.merge_state_dicts(
        models[: models_for(kind)], "probe", base=base, backend="reference", kind=kind, scope=scope
    )
    return dict(probe.seen), merged


@pytest.mark.parametrize(
    ("kind", "scope"),
    [*((k, "tensor") for k in rounds.FEATURES), ("gram", "model"), ("reduce", "model"), ("two-points", "model")],
)
def test_statistics_and_bits_do_not_depend_on_the_cut(
    root: Path, tmp_path: Path, probe: rounds.Probe, kind: str, scope: str
) -> None:
    wanted, merged = in_memory(probe, kind, scope)
    parameters = {"kind": kind, "scope": scope}
    path = rounds.recipe(root, "probe", f"{kind}-{scope}", models=models_for(kind), parameters=parameters)
    digests = set()
    for i, variant in enumerate(VARIANTS):
        probe.seen.clear()
        report = cases.run_of(path, tmp_path / str(i), backend=rounds.backend(rounds.FEATURES[kind]), **variant)
        digests.add(report.checkpoint_sha256)
        assert probe.seen == wanted, variant
        assert report.peak_tensor_memory <= report.memory
    assert len(digests) == 1
    for name, tensor in read(tmp_path / "0").items():
        assert torch.equal(tensor.view(torch.int16), merged[name].view(torch.int16)), name


def test_columns_in_boxes_of_a_part_of_each_row(
    root: Path, tmp_path: Path, probe: rounds.Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekernels.engine import tiling

    wanted, _ = in_memory(probe, "gram-columns", "tensor")
    monkeypatch.setattr(tiling, "_SEGMENT_BYTES", 2)
    probe.seen.clear()
    path = rounds.recipe(root, "probe", "narrow", parameters={"kind": "gram-columns"})
    cases.run_of(path, tmp_path / "out", tile=4096, backend=rounds.backend(rounds.FEATURES["gram-columns"]))
    assert probe.seen == wanted


def test_sums_are_those_of_the_definition(root: Path, tmp_path: Path, probe: rounds.Probe) -> None:
    base, *models = rounds.tensors()
    for kind, dim in (("gram-rows", -1), ("gram-columns", 0)):
        path = rounds.recipe(root, "probe", "definition", parameters={"kind": kind})
        cases.run_of(path, tmp_path / kind, backend=rounds.backend(rounds.FEATURES[kind]))
        for name in ("model.layers.0.wide.weight", "model.layers.0.tall.weight", "model.layers.1.conv.weight"):
            deltas = [(m[name].float() - base[name].float()).double() for m in models]
            slot = 0
            for i in range(len(deltas)):
                for j in range(i, len(deltas)):
                    expected = (deltas[i] * deltas[j]).sum(dim).flatten()
                    found = torch.tensor(probe.seen[name][0][slot], dtype=torch.float64)
                    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-18), (name, i, j)
                    slot += 1


def test_an_interrupted_wave_of_sums_goes_on(
    root: Path, tmp_path: Path, probe: rounds.Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekernels.engine import waves

    name = rounds.backend(rounds.FEATURES["gram"])
    path = rounds.recipe(root, "probe", "wave", parameters={"kind": "gram", "scope": "model"})
    options: dict[str, Any] = {"backend": name, "threads": 2, "tile": 4096, "shard_size": 30_000}
    cases.run_of(path, tmp_path / "whole", **options)
    wanted = dict(probe.seen)
    written: list[str] = []
    original = waves._Wave._write

    def write(self: Any, file: Any, stats: Any) -> None:
        if len(written) == 2:
            raise OSError(5, "Input/output error")
        written.append(file.name)
        original(self, file, stats)

    monkeypatch.setattr(waves._Wave, "_write", write)
    with pytest.raises((OSError, MergeError)):
        cases.run_of(path, tmp_path / "out", **options)
    assert len(written) == 2
    again: list[str] = []

    def count(self: Any, file: Any, stats: Any) -> None:
        again.append(file.name)
        original(self, file, stats)

    monkeypatch.setattr(waves._Wave, "_write", count)
    probe.seen.clear()
    cases.run_of(path, tmp_path / "out", **options)
    assert again and not set(again) & set(written)
    assert probe.seen == wanted
    assert cases.published(tmp_path / "out") == cases.published(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["gram-columns", "reduce", "divergence", "variance", "gram-model"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_value_is_named(tmp_path: Path, probe: rounds.Probe, kind: str, value: float) -> None:
    states = rounds.tensors()
    name = "model.layers.0.tall.weight"
    states[1][name][4100, 3] = value
    for folder, state in zip(("base", "tuned1", "tuned2", "tuned3"), states, strict=True):
        cases.save(tmp_path / folder, state)
    kind, _, scope = kind.partition("-model")
    scope = "model" if scope == "" and kind == "gram" else "tensor"
    path = rounds.recipe(tmp_path, "probe", "bad", models=models_for(kind), parameters={"kind": kind, "scope": scope})
    chosen = rounds.backend(rounds.FEATURES[kind])
    with pytest.raises(DataError) as caught:
        cases.run_of(path, tmp_path / "out", backend=chosen, tile=4096)
    assert caught.value.tensor == name
    assert f"first at flat index {4100 * 7 + 3}" in str(caught.value)
    assert "tuned1" in str(caught.value)
    assert not (tmp_path / "out").exists()
    cases.run_of(
        rounds.recipe(
            tmp_path,
            "probe",
            "bad",
            models=models_for(kind),
            parameters={"kind": kind, "scope": scope},
            nan="propagate",
        ),
        tmp_path / "out",
        backend=chosen,
        overwrite=True,
    )


def test_what_a_backend_lacks_is_refused_by_the_plan(
    root: Path, tmp_path: Path, probe: rounds.Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekernels._backends import cpu

    monkeypatch.setattr(cpu, "FEATURES", frozenset({"gram"}))
    path = rounds.recipe(root, "probe", "lacks", parameters={"kind": "reduce-ranks"})
    with pytest.raises(BackendError, match="it lacks rank, reduce"):
        cases.plan_of(path, tmp_path / "out")


def test_rows_that_no_tile_can_hold_are_refused_with_what_would_do(
    root: Path, tmp_path: Path, probe: rounds.Probe
) -> None:
    chosen = rounds.backend(rounds.FEATURES["reduce-ranks"])
    path = rounds.recipe(root, "probe", "slabs", parameters={"kind": "reduce-ranks"})
    with pytest.raises(ArgumentError, match="cannot hold the smallest tiles") as caught:
        cases.plan_of(path, tmp_path / "out", memory=600_000, threads=2, backend=chosen)
    least = int(str(caught.value).split("(")[1].split(" bytes")[0])
    report = cases.run_of(path, tmp_path / "out", memory=least, threads=2, backend=chosen)
    assert report.peak_tensor_memory <= least


def test_a_spec_knows_shape_and_block(root: Path, probe: rounds.Probe) -> None:
    from mergekernels.engine.specs import Specs

    merge = resolve(load_recipe(rounds.recipe(root, "probe", "spec", parameters={"kind": "gram"})))
    specs = Specs(merge, probe)
    found = {s.name: (s.shape, s.block) for s in map(specs.spec, specs.members)}
    assert found["model.layers.1.conv.weight"] == ((6, 5, 7), (1, 2))
    assert found["model.layers.0.odd.weight"] == ((31, 257), (0, 2))
    assert found["model.scalar"] == ((), None)


def test_tilings_cover_every_element_once() -> None:
    from mergekernels.engine.tiling import flat, gram_tiling
    from mergekernels.ops.sums import Segments

    def elements(tiling: Any) -> list[int]:
        pieces = [tiling.piece(i) for i in range(tiling.count)]
        assert all(p.numel <= tiling.largest for p in pieces)
        return sorted(p.g0 + r * p.ld + c for p in pieces for r in range(p.rows) for c in range(p.cols))

    for n, rows in ((45_000, 5000), (45_000, 3), (45_000, 45_000), (45_000, 1)):
        length = n // rows
        for tile, room in ((4096, 4096), (8192, 50_000), (16_384, 20_000)):
            assert elements(flat(n, tile)) == list(range(n))
            assert elements(flat(n, tile, length)) == list(range(n))
            for segments in (Segments("rows", rows, length), Segments("columns", length, rows)):
                tiling = gram_tiling(segments, n, tile, room)
                assert elements(tiling) == list(range(n))
                assert tiling.largest <= max(tile, room)
                for i in range(tiling.count):
                    piece = tiling.piece(i)
                    row, col = divmod(piece.g0, length)
                    if segments.axis == "columns":
                        assert row % 4096 == 0 and (piece.rows % 4096 == 0 or row + piece.rows == rows)
                    elif piece.rows == 1 and rows > 1:
                        assert col % 4096 == 0 and (piece.cols % 4096 == 0 or col + piece.cols == length)


@pytest.mark.parametrize("kind", ["reduce-ranks", "gram-columns", "gram-rows", "divergence"])
def test_the_published_statistics_and_recomputing(
    root: Path, tmp_path: Path, probe: rounds.Probe, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from mergekernels.engine import fileinputs

    monkeypatch.setattr(fileinputs, "_CHUNK", 5000)  # no multiple of a block or a row
    models = models_for(kind)
    path = rounds.recipe(root, "probe", "again", models=models, parameters={"kind": kind})
    cases.run_of(path, tmp_path / "out", backend=rounds.backend(rounds.FEATURES[kind]))
    manifest = json.loads((tmp_path / "out/merge_manifest.json").read_text())
    for tensor in manifest["tensors"]:
        statistics = tensor["statistics"]
        assert set(statistics) == {"density", "norms", "sign_conflicts"}
        assert all(len(statistics[k]) == models for k in ("density", "norms"))
    report = mk.verify(tmp_path / "out", recompute=len(rounds.SHAPES))
    assert report.ok and len(report.recomputed) == len(rounds.SHAPES)
