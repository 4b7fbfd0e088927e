"""The recipe language: which keys there are, and what is said about wrong ones. No model is opened here."""

from __future__ import annotations

import random

import pytest
import yaml

from mergekernels.engine.recipe import load_recipe
from mergekernels.errors import InputError, MergeError, PlanError, RecipeError

GOOD = """\
merge_method: ties
base_model: ./base
models:
  - model: ./a
    parameters:
      weight: 1
  - model: org/b@v1
parameters:
  density: 0.2
dtype: float32
"""


def failure(text, **options):
    """The message of the one error of a recipe."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(text, **options)
    return str(caught.value)


def test_everything_at_once():
    recipe = load_recipe(
        """
merge_method: ties
dialect: paper
seed: 18446744073709551615
nan: propagate
layers: model.layers.*
base_model: {model: {path: ./a+b@c, revision: main}}
slices:
  - sources:
      - {model: ./a, layer_range: [0, 4], parameters: {weight: [0, 1e-3]}}
      - {model: {path: org/b}, layer_range: [4, 8]}
    base_model: ./c
    parameters: {density: [{filter: mlp, value: 0.5}, {value: 1}]}
parameters: {lambda: {filter: q_proj, value: 2}}
dtype: bfloat16
out_dtype: float16
tokenizer_source: base
chat_template: "{{ messages }}"
"""
    )
    schema = recipe.schema
    assert (schema.merge_method, schema.dialect, schema.nan, schema.seed) == ("ties", "paper", "propagate", 2**64 - 1)
    assert str(schema.base_model) == "./a+b@c@main"
    assert schema.base_model.exact
    (slice_,) = schema.slices
    assert [s.layer_range for s in slice_.sources] == [(0, 4), (4, 8)]
    assert slice_.sources[0].parameters == {"weight": [0, "1e-3"]}
    assert recipe.data["out_dtype"] == "float16"
    assert recipe.file == ""


def test_sources_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(GOOD)
    data = yaml.safe_load(GOOD)
    for source in (path, str(path), GOOD, data):
        assert load_recipe(source).data == data
    assert load_recipe(path).file == str(path)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(path).data == data
    with pytest.raises(InputError, match=r"absent\.yml: no such recipe file"):
        load_recipe(tmp_path / "absent.yml")
    with pytest.raises(InputError, match="no such recipe file"):
        load_recipe(tmp_path)


def test_mappings_are_checked_and_copied_too(tmp_path):
    data = {"merge_method": "linear", "models": ({"model": tmp_path, "parameters": {"weight": 1}},)}
    assert load_recipe(data).data["models"] == [{"model": str(tmp_path), "parameters": {"weight": 1}}]
    assert failure({**data, "dtyp": "float32"}) == (
        "unknown key 'dtyp'; expected one of merge_method, models, slices, base_model, parameters, dtype, out_dtype, "
        "tokenizer_source, chat_template, dialect, seed, nan, layers, then, output. Did you mean 'dtype'?"
    )


TOP = "merge_method: linear\nmodels: [{model: a}]\n"
ERRORS = {
    "unknown key": (
        TOP + "basemodel: x\n",
        "line 3: unknown key 'basemodel'; expected one of",
        "Did you mean 'base_model'?",
    ),
    "unknown key of a model": (
        "merge_method: linear\nmodels:\n  - model: a\n    paramters: {weight: 1}\n",
        "line 4: unknown key 'paramters' under 'models.0'; "
        "expected one of model, parameters. Did you mean 'parameters'?",
    ),
    "unknown key of a slice": (
        "merge_method: linear\nslices:\n- source: []\n  sources:\n  - {model: a, layer_range: [0, 1]}\n",
        "line 3: unknown key 'source' under 'slices.0'; "
        "expected one of sources, base_model, parameters. Did you mean 'sources'?",
    ),
    "unknown key of a source": (
        "merge_method: linear\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 1]\n    layers: 3\n",
        "line 6: unknown key 'layers' under 'slices.0.sources.0'; expected one of model, layer_range, parameters",
    ),
    "no method": ("models: [{model: a}]\nseed: 1\n", "line 1: required key 'merge_method' is missing"),
    "no model": (
        "merge_method: linear\nmodels:\n- parameters: {}\n",
        "line 3: required key 'model' is missing under 'models.0'",
    ),
    "no layer_range": (
        "merge_method: linear\nslices:\n- sources:\n  - model: a\n",
        "line 4: required key 'layer_range' is missing under",
    ),
    "neither": ("merge_method: linear\n", "line 1: a recipe has either models or slices; got neither"),
    "both": (
        TOP + "slices:\n- sources: [{model: a, layer_range: [0, 1]}]\n",
        "line 3: a recipe has either models or slices; got both",
    ),
    "no models": (
        "merge_method: linear\nmodels: []\n",
        "line 2: 'models' has a wrong value; expected at least one entry; got []",
    ),
    "models not a list": (
        "merge_method: linear\nmodels: {a: 1}\n",
        "line 2: 'models' has a wrong value; expected a list; got a mapping",
    ),
    "model not a mapping": (
        "merge_method: linear\nmodels:\n- a\n",
        "line 3: 'models.0' has a wrong value; expected a mapping; got 'a'",
    ),
    "method a number": (
        "merge_method: 3\nmodels: [{model: a}]\n",
        "line 1: 'merge_method' has a wrong value; expected a string; got 3",
    ),
    "parameters a list": (
        TOP + "parameters: [1]\n",
        "line 3: 'parameters' has a wrong value; expected a mapping; got [1]",
    ),
    "layer_range of three": (
        "merge_method: linear\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 1, 2]\n",
        "line 5: 'slices.0.sources.0.layer_range' has a wrong value; "
        "expected [first, end], two integers with 0 <= first < end",
    ),
    "empty layer_range": (
        "merge_method: linear\nslices:\n- sources:\n  - model: a\n    layer_range: [2, 2]\n",
        "line 5: 'slices.0.sources.0.layer_range' has a wrong value; expected [first, end], "
        "two integers with 0 <= first < end; got [2, 2]",
    ),
    "dtype": (
        TOP + "dtype: bfloat6\n",
        "line 3: 'dtype': not a dtype that a merge can have; "
        "expected one of bfloat16, float16, float32, float64; got 'bfloat6'. "
        "Did you mean 'bfloat16'?",
    ),
    "int64": (TOP + "dtype: int64\n", "line 3: 'dtype': not a dtype", "Integer arithmetic would round every weight"),
    "out_dtype": (TOP + "out_dtype: int64\n", "line 3: 'out_dtype': not a dtype"),
    "fp8": (TOP + "out_dtype: float8_e4m3fn\n", "line 3: 'out_dtype': not a dtype"),
    "seed negative": (
        TOP + "seed: -1\n",
        "line 3: 'seed' has a wrong value; expected an integer from 0 to 18446744073709551615; got -1",
    ),
    "seed too large": (
        TOP + f"seed: {2**64}\n",
        "line 3: 'seed' has a wrong value; expected an integer from 0 to 18446744073709551615; got",
    ),
    "seed not an integer": (TOP + "seed: 1.5\n", "line 3: 'seed' has a wrong value; expected an integer from 0 to"),
    "seed true": (
        TOP + "seed: true\n",
        "line 3: 'seed' has a wrong value; expected an integer from 0 to 18446744073709551615; got True",
    ),
    "nan": (TOP + "nan: ignore\n", "line 3: 'nan' has a wrong value; expected 'error' or 'propagate'; got 'ignore'"),
    "layers": (
        TOP + "layers: model.layers\n",
        "line 3: 'layers': not a pattern of a layer stack; expected dotted names with one *",
    ),
    "layers glued": (TOP + "layers: layer*\n", "line 3: 'layers': not a pattern of a layer stack"),
    "model a number": (
        "merge_method: linear\nmodels:\n- model: 7\n",
        "line 3: 'models.0.model': not a model reference; "
        "expected a path, org/name, org/name@revision, model+adapter or {path: ..., revision: ..., lora: adapter}; "
        "got 7",
    ),
    "model mapping, unknown key": (
        "merge_method: linear\nmodels:\n- model: {path: a, revison: b}\n",
        "line 3: 'models.0.model': unknown key 'revison'",
        "Did you mean 'revision'?",
    ),
    "model mapping, two adapters": (
        "merge_method: linear\nmodels:\n- model: {model: {path: a, lora: b}, lora: c}\n",
        "line 3: 'models.0.model': an adapter on an adapter; expected one model and one adapter",
    ),
    "tokenizer": (TOP + "tokenizer: {source: union}\n", "line 3: 'tokenizer' is not supported: building a vocabulary"),
    "modules": (
        "merge_method: linear\nmodules: {}\nmodels: [{model: a}]\n",
        "line 2: 'modules' is not supported: recipes for models of several",
    ),
    "residual_weight": (
        "merge_method: linear\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n  residual_weight: 0.5\n",
        "line 4: 'residual_weight' is not supported: mergekit reads residual_weight and never uses it",
    ),
    "name": (TOP + "name: first\n", "line 3: 'name' is not supported: named results"),
    "empty": ("# nothing\n", "the recipe is empty"),
    "a list": ("- a\n- b\n", "line 1: a recipe is a mapping of keys; expected merge_method: ...; got a list of 2"),
    "several documents": (TOP + "---\n" + TOP, "line 3: recipes of several documents are not supported yet"),
    "duplicate key": (TOP + "seed: 1\nseed: 2\n", "line 4: duplicate key 'seed'. First given on line 3"),
    "duplicate parameter": (TOP + "parameters:\n  weight: 1\n  weight: 2\n", "line 5: duplicate key 'weight'"),
    "key not a string": (TOP + "1: 2\n", "line 3: keys must be strings; got '1'"),
    "key a list": (TOP + "? [a]\n: 2\n", "line 3: keys must be strings"),
    "tag": (
        TOP + "parameters: !!python/object:os.system {}\n",
        "line 3: tags are not allowed; got 'tag:yaml.org,2002:python/object:os.system'",
    ),
    "scalar tag": (TOP + "dtype: !secret x\n", "line 3: tags are not allowed; got '!secret'"),
    "binary": (TOP + "dtype: !!binary aGVsbG8=\n", "line 3: tags are not allowed"),
    "set": (TOP + "parameters: !!set {a, b}\n", "line 3: tags are not allowed"),
    "syntax": (TOP + "parameters: {weight: [1, 2}\n", "line 3: not valid YAML"),
    "tab": (TOP + "parameters:\n\tweight: 1\n", "line 4: not valid YAML"),
    "unknown alias": (TOP + "parameters: *nowhere\n", "line 3: not valid YAML"),
    "control character": (TOP + "dtype: \x01\n", "not valid YAML"),
    "bad merge key": (TOP + "parameters:\n  <<: 3\n", "line 4: not a valid merge key"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, tmp_path):
    text, start, *parts = ERRORS[case]
    message = failure(text)
    assert message.startswith(start) or (start in message and not start.startswith("line"))
    for part in parts:
        assert part in message
    path = tmp_path / "r.yml"
    path.write_text(text)
    in_file = failure(path)
    assert in_file == f"{path}: {message}" or in_file == f"{path}:{message.removeprefix('line ')}"


def test_all_errors_at_once():
    with pytest.raises(PlanError) as caught:
        load_recipe("merge_method: 1\nmodels:\n- modle: a\nsede: 3\ndtype: x\n")
    lines = [(p.line, p.message) for p in caught.value.problems]
    assert lines == [
        (1, "'merge_method' has a wrong value"),
        (3, "required key 'model' is missing under 'models.0'"),
        (3, "unknown key 'modle' under 'models.0'"),
        (4, "unknown key 'sede'"),
        (5, "'dtype': not a dtype that a merge can have"),
    ]
    assert caught.value.exit_code == 2


def test_lenient_turns_only_unknown_keys_into_warnings():
    text = TOP + "sede: 3\n"
    recipe = load_recipe(text, lenient=True)
    assert len(recipe.warnings) == 1
    assert recipe.warnings[0].startswith("line 3: unknown key 'sede'")
    assert recipe.data["sede"] == 3
    assert "'seed' has a wrong value" in failure(text + "seed: x\n", lenient=True)
    assert "'modules' is not supported" in failure(text + "modules: {}\n", lenient=True)
    assert "neither" in failure("merge_method: linear\nmodles: []\n", lenient=True)


def test_yaml_that_users_write():
    recipe = load_recipe(
        """\
%YAML 1.1
---
defaults: &d {weight: 1}   # refused below: only to have an anchor
merge_method: linear
models:
  - {model: a, parameters: *d}
  - model: b
    parameters:
      <<: *d
      normalize: yes
""",
        lenient=True,
    )
    assert [m.parameters for m in recipe.schema.models] == [{"weight": 1}, {"weight": 1, "normalize": True}]
    assert load_recipe(TOP + "chat_template: 2024-01-01\n").schema.chat_template == "2024-01-01"


def test_hostile_yaml_is_bounded():
    assert "nested too deeply" in failure(TOP + "parameters: " + "[" * 100_000)
    assert "nested too deeply" in failure(TOP + "parameters:\n" + "".join("  " * i + f" a{i}:\n" for i in range(1, 60)))
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    assert "aliases make the recipe too large" in failure(bomb)
    assert "aliases make the recipe too large" in failure("a: &a\n  b: *a\n")
    assert "too large for a recipe" in failure(TOP + "#" * (1 << 20))


def test_large_files(tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(TOP + "#" * (10 << 20))
    assert failure(path) == f"{path}: too large for a recipe; expected at most 1048576 bytes"
    path.write_bytes(b"a: 1\nb: \xff\n")
    assert failure(path) == f"{path}:2: not UTF-8"


def test_damaged_recipes_give_our_errors():
    """Random damage never gives anything but a recipe or one of our errors."""
    rng = random.Random(3)
    tokens = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ": ",
        "- ",
        "\n",
        "  ",
        "&a ",
        "*a",
        "!",
        "!!",
        "|",
        ">",
        "'",
        '"',
        "%",
        "@",
        "`",
        "<<: ",
        "? ",
        "1e3",
        "null",
        "\t",
        "é",
        "---\n",
        "~",
        "0o7",
        "1_0",
        "1:2",
        ".inf",
        ".nan",
        "2001-01-01",
    ]
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        text = list(GOOD)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text))
            if rng.random() < 0.5:
                text[at:at] = rng.choice(tokens)
            else:
                del text[at : at + rng.randrange(1, 9)]
        try:
            load_recipe("".join(text) + "\n", lenient=rng.random() < 0.5)
            outcomes[True] += 1
        except MergeError as error:
            str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 100
