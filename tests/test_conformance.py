"""The conformance kit: every case on the backends that run here, and the judge itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekernels._methods.spectral.tied import tie
from mergekernels.conformance import judge, open_kit, outputs_of
from mergekernels.conformance.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")

KIT = open_kit()


RUNS = [
    pytest.param(case, backend, id=f"{case.id}-{backend or 'torch'}")
    for case in KIT.cases
    for backend in (("cpu", "reference") if case.norm == "largest" else (None,))
]


@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_agreement(case, backend: str | None) -> None:
    verdict = judge(case, outputs_of(KIT, case, backend), KIT.expected(case)[0])
    assert verdict.agrees, verdict.problem


def test_every_tool_is_there() -> None:
    assert {c.tool: c.version for c in KIT.cases} == {
        "mergekit": "0.1.5",
        "peft": "0.21.2",
        "fusionbench": "0.2.33",
        "formula": "1",
        "tensorly": "0.10.0",
    }
    assert len({c.method for c in KIT.cases if c.tool == "mergekit"}) == 20


def test_methods_over_matrices_are_there() -> None:
    found = {(c.tool, c.method) for c in KIT.cases if c.norm == "frobenius"}
    assert {m for t, m in found if t == "fusionbench"} == {"tsv_m", "iso_c", "iso_cts", "opcm", "knots"}
    assert {m for t, m in found if t == "peft"} == {
        "cat",
        "linear",
        "svd",
        "magnitude_prune",
        "ties",
        "magnitude_prune_svd",
        "ties_svd",
    }
    assert {m for t, m in found if t == "formula"} == {
        "robust_merge",
        "lori",
        "from_norm",
        "core_space",
        "knots",
        "lore",
        "compress_then_merge",
        "tucker_merge",
        "lora_lego",
    }
    assert {m for t, m in found if t == "tensorly"} == {"tc_lora", "compress_then_merge"}
    assert all(c.bound <= 1e-5 for c in KIT.cases if c.norm == "frobenius")


def test_singular_values_of_knots() -> None:
    """FusionBench's singular values of the stacks, in float32 beside ours in float64."""
    case = next(c for c in KIT.cases if c.id == "fusionbench-knots")
    stored = load_file(KIT.folder / "outputs" / f"{case.id}.safetensors")
    values = {k.removeprefix("singular_values/"): v for k, v in stored.items() if k.startswith("singular_values/")}
    assert len(values) == 3
    for name, want in values.items():
        tied = tie([KIT.inputs[m][name] - KIT.inputs["mbase"][name] for m in case.models], 1e-4, True)
        assert tied.s.shape == want.shape
        assert float((tied.s - want).abs().max()) <= 2e-7 * float(want[0])


def test_a_wrong_matrix_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bounds are norms there: many small differences count as well as a large one."""
    (tmp_path / "outputs").mkdir()
    name = "formula-adapters-knots-ties.safetensors"
    for file in (KIT.folder / "outputs").glob("*knots*"):
        shutil.copy(file, tmp_path / "outputs")
    assert main(["--outputs", str(tmp_path), "--method", "knots"]) == 0
    tensors = load_file(tmp_path / "outputs" / name)
    tensors["embed"] *= 1 + 3e-5
    save_file(tensors, tmp_path / "outputs" / name)
    capsys.readouterr()
    assert main(["--outputs", str(tmp_path), "--method", "knots"]) == 1
    said = capsys.readouterr().out
    assert "FAIL formula-adapters-knots-ties" in said and "tensor 'embed': norm of the difference 3e-05" in said


def test_a_wrong_output_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outputs").mkdir()
    for case in KIT.cases:
        shutil.copy(KIT.folder / "outputs" / f"{case.id}.safetensors", tmp_path / "outputs")
    assert main(["--outputs", str(tmp_path)]) == 0
    assert f"{len(KIT.cases)} of {len(KIT.cases)} cases agree" in capsys.readouterr().out
    file = tmp_path / "outputs" / "mergekit-ties.safetensors"
    tensors = load_file(file)
    tensors["tall"][5, 3] += 1e-6
    save_file(tensors, file)
    assert main(["--outputs", str(tmp_path), "--method", "ties"]) == 1
    said = capsys.readouterr().out
    assert "FAIL mergekit-ties" in said and "tensor 'tall': largest difference" in said and "flat index 28" in said
    del tensors["tall"]
    save_file(tensors, file)
    assert main(["--outputs", str(tmp_path), "--method", "ties"]) == 1
    assert "tensor 'tall' is missing" in capsys.readouterr().out
    tensors["tall"] = torch.full((96, 5), torch.nan)
    save_file(tensors, file)
    assert main(["--outputs", str(tmp_path), "--method", "ties"]) == 1
    tensors["tall"] = torch.zeros(5, 96)
    save_file(tensors, file)
    assert main(["--outputs", str(tmp_path), "--method", "ties"]) == 1
    assert "expected shape (96, 5); got (5, 96)" in capsys.readouterr().out
    file.unlink()
    assert main(["--outputs", str(tmp_path), "--method", "ties"]) == 1
    assert "this output is missing" in capsys.readouterr().out


def test_what_cannot_be_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--method", "tise"]) == 2
    assert "the kit has no cases of this method" in capsys.readouterr().err
    assert main(["--kit", str(tmp_path)]) == 2
    assert "no conformance kit" in capsys.readouterr().err
    (tmp_path / "inputs").mkdir()
    shutil.copy(KIT.folder / "inputs" / "family.safetensors", tmp_path / "inputs")
    (tmp_path / "kit.json").write_text(json.dumps({"layout": 2, "cases": []}))
    assert main(["--kit", str(tmp_path)]) == 2
    assert "expected layout 1; got 2" in capsys.readouterr().err
    for folder in (tmp_path / "nowhere", tmp_path):
        assert main(["--outputs", str(folder), "--method", "ties"]) == 2
        assert "there is no output of these cases" in (said := capsys.readouterr().err)
        assert f"{folder}: " in said and "outputs/" in said
    with pytest.raises(SystemExit) as caught:
        main(["--outputs", str(KIT.folder), "--backend", "reference"])
    assert caught.value.code == 2 and "one of the two" in capsys.readouterr().err


def test_empty_tensors_agree() -> None:
    case = next(c for c in KIT.cases if c.id == "mergekit-ties")
    nothing, one = torch.zeros(0, 3), torch.ones(2)
    assert judge(case, {"a": nothing, "b": one}, {"a": nothing, "b": one}).agrees
    assert not judge(case, {"a": torch.zeros(1, 3), "b": one}, {"a": nothing, "b": one}).agrees


def test_a_kit_that_is_not_usable_judges_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--method", "expo", "--tool", "peft"]) == 2  # cases of both, none of the pair
    assert "the kit has no such case" in capsys.readouterr().err
    assert main(["--method", "expo", "--backend", "cpo"]) == 2
    assert "unknown backend" in capsys.readouterr().err
    shutil.copytree(KIT.folder, tmp_path / "kit")
    kit = tmp_path / "kit"
    file = kit / "outputs" / "mergekit-ties.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    assert main(["--outputs", str(kit), "--method", "ties"]) == 1
    assert "FAIL mergekit-ties (mergekit 0.1.5, ties, default): " in (said := capsys.readouterr().out)
    assert "cannot be read" in said
    assert main(["--kit", str(kit), "--method", "ties"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    case = {"id": "x", "tool": "t", "version": "1", "method": "ties", "models": ["a"], "base": "bse", "bound": 0}
    for text, said in (
        ("[]", "expected layout 1; got None"),
        ('{"layout": 1}', "the kit has no such case"),
        ('{"layout": 1, "cases": [{"id": "x"}]}', "case 0 of the kit is not usable"),
        (json.dumps({"layout": 1, "cases": [case]}), "got 'bse'"),
    ):
        (kit / "kit.json").write_text(text)
        assert main(["--kit", str(kit)]) == 2
        assert said in capsys.readouterr().err
    (kit / "inputs" / "family.safetensors").write_bytes(b"no")
    assert main(["--kit", str(kit)]) == 2
    assert "cannot be read" in capsys.readouterr().err
