"""mergekit's integration on a package of its shape: recognition, the variable, the command. No mergekit."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import mergekernels
import mergekernels.integrations.mergekit as fast
import mergekit_shape
from mergekernels.errors import ToolError
from mergekernels.integrations.mergekit import script
from mergekit_shape import imports, method


@pytest.fixture
def shaped(tmp_path, monkeypatch):
    """Imports a mergekit of the shape asked for."""
    yield from imports(tmp_path, monkeypatch)


PTH = Path(mergekernels.__file__).resolve().parent.parent / "mergekernels_mergekit.pth"


def test_the_older_generation_is_refused(shaped):
    shaped("0.1.4")
    with pytest.raises(ToolError, match=r"mergekit was left untouched: this is the generation of version 0\.1\.4"):
        fast.enable()


@pytest.mark.parametrize(
    ("signatures", "said"),
    [
        ({"sce": "group, topk=1.0"}, r"sce takes \(group, topk\), not \(group, int8_mask, select_topk\)"),
        ({"ram": ""}, "the method ram has no implementation"),
        ({"karcher": "group, max_iter=10, tol=1e-5, robust=False"}, "karcher takes"),
    ],
)
def test_another_shape_is_refused_and_left_untouched(shaped, signatures, said):
    package = shaped(**signatures)
    functions = [m for m in package.registered_methods() if hasattr(m, "implementation")]
    before = [m.implementation for m in functions]
    with pytest.raises(ToolError, match=said):
        fast.enable()
    assert [m.implementation for m in functions] == before
    assert "merge_group" in vars(package.GeneralizedTaskArithmeticMerge)
    assert package.GeneralizedTaskArithmeticMerge.merge_group.__module__ == "mergekit.merge_methods"


@pytest.mark.parametrize("name", ["sce", "slerp", "linear", "karcher", "ties", "della"])
def test_other_rules_under_the_same_names_are_refused(shaped, name):
    package = shaped()
    package.WRONG = name
    before = torch.get_rng_state()
    with pytest.raises(ToolError, match=f"{name} computes something else than it did in version 0.1.5"):
        fast.enable()
    assert not hasattr(method(package, "ram").implementation, "__wrapped__")
    assert not hasattr(package.GeneralizedTaskArithmeticMerge.merge_group, "__wrapped__")
    package.WRONG = ""
    fast.enable()
    assert hasattr(method(package, "ram").implementation, "__wrapped__")
    assert torch.equal(before, torch.get_rng_state())
    assert fast.stats().served == {}


def test_missing_fields_are_refused(shaped):
    package = shaped()
    package.TensorMetadata = int
    with pytest.raises(ToolError, match="TensorMetadata lacks name, vocabulary_axis"):
        fast.enable()


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit", None)
    with pytest.raises(ToolError, match=r"mergekit is not installed\. Install it: pip install mergekit==0\.1\.5"):
        fast.enable()


def test_a_mergekit_that_cannot_be_imported(shaped, tmp_path):
    shaped()
    for broken, said in (("1 / 0", "ZeroDivisionError"), ("import no_such_package_of_mergekit", "no_such_package")):
        (tmp_path / "mergekit" / "merge_methods.py").write_text(broken + "\n")
        mergekit_shape.forget()
        importlib.invalidate_caches()
        with pytest.raises(ToolError, match=f"mergekit cannot be imported: .*{said}"):
            fast.enable()


def run(code, folder, variable=None):
    """A Python process that reads our .pth line as site-packages would."""
    start = f"import site; site.addsitedir({str(folder / 'site')!r})\n"
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / PTH.name).write_text(PTH.read_text())
    environment = {k: v for k, v in os.environ.items() if k != "MERGEKERNELS_MERGEKIT"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(PTH.parent)])
    if variable is not None:
        environment["MERGEKERNELS_MERGEKIT"] = variable
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, env=environment, timeout=120
    )


HEAVY = "print(sorted(m for m in ('torch', 'numpy', 'mergekernels', 'mergekernels.merging') if m in sys.modules))"


STATE = "import mergekit.merge_methods as m; print(hasattr(m.registered_methods()[-1].implementation, '__wrapped__'))"


def test_the_variable(tmp_path):
    mergekit_shape.write(tmp_path)
    done = run(f"import sys; {HEAVY}; {STATE}", tmp_path)
    assert (done.stdout, done.stderr) == ("[]\nFalse\n", "")
    for off in ("", "0"):
        done = run(STATE, tmp_path, off)
        assert (done.stdout, done.stderr) == ("False\n", "")
    done = run(f"import sys; {HEAVY}; print(sys.meta_path[0])", tmp_path, "1")
    assert done.stdout.startswith("['mergekernels']\n<mergekernels.integrations._mergekit_pth._Finder")
    assert done.stderr == ""
    done = run(STATE + "; print(m.__loader__, m.__spec__.loader is m.__loader__)", tmp_path, "report")
    assert done.stdout.startswith("True\n<_frozen_importlib_external.SourceFileLoader")
    assert done.stdout.endswith("True\n")
    assert done.stderr == "mergekernels: mergekit: 0 calls served by mergekernels, 0 by the tool itself\n"
    done = run(STATE, tmp_path, "yes please")
    assert done.stdout == "False\n"
    assert done.stderr.count("\n") == 1
    assert "expected 1, report or 0. Nothing is done." in done.stderr


def test_the_variable_fails_open(tmp_path):
    mergekit_shape.write(tmp_path, "0.1.4")
    done = run("import mergekit.merge_methods; print('runs')", tmp_path, "report")
    assert (done.returncode, done.stdout) == (0, "runs\n")
    assert done.stderr.count("\n") == 1
    assert "mergekit runs without mergekernels: mergekit was left untouched" in done.stderr


def test_the_variable_beside_other_finders(tmp_path):
    """One of the old kind, which Python passes over, and somebody who asks for the spec before the import."""
    mergekit_shape.write(tmp_path)
    old = "import sys; sys.meta_path.insert(1, type('Old', (), {'find_module': lambda *args: None})()); "
    asked = "import importlib.util; importlib.util.find_spec('mergekit.merge_methods'); "
    for before in (old, asked):
        done = run(before + STATE + "; print(type(m.__loader__).__name__)", tmp_path, "1")
        assert (done.stdout, done.stderr) == ("True\nSourceFileLoader\n", ""), before


def test_without_mergekit_nothing_happens(tmp_path):
    done = run("print('runs')", tmp_path, "report")
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs\n", "")


def command(monkeypatch, *arguments):
    """The exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["mergekernels-mergekit", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return ended.value.code


def test_the_command(shaped, monkeypatch, capsys):
    package = shaped()
    assert command(monkeypatch, "recipe.yml", "out", "--cuda") == 0
    said = capsys.readouterr()
    assert said.out == "mergekernels-mergekit recipe.yml out --cuda\n"
    assert said.err == "mergekernels: mergekit: 0 calls served by mergekernels, 0 by the tool itself\n"
    assert hasattr(method(package, "ram").implementation, "__wrapped__")
    assert command(monkeypatch, "recipe.yml", "out", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert command(monkeypatch, "fail") == 3
    assert capsys.readouterr().err == ""


def test_the_command_refuses_what_it_does_not_know(shaped, monkeypatch, capsys):
    shaped("0.1.4")
    assert command(monkeypatch, "recipe.yml", "out") == ToolError.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mergekernels-mergekit: mergekit was left untouched")


def test_no_warning_on_the_usual_way(shaped):
    shaped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.enable()
        fast.enable()
        fast.disable()
