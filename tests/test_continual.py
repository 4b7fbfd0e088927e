"""continual_merge: a stream merged model by model is the batch, survives crashes, and refuses what does not fit."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekernels as mk
import spectral_brute as brute
from mergekernels.continual import Continual, state


def stream(count: int):
    def model(t: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(t)
        return {
            "a.weight": brute.with_spectrum(30, 20, brute.spectra(20)["power"], 7 * t, torch.float32),
            "b.experts.w": torch.randn(2, 6, 5, generator=g),
            "embed_tokens.weight": torch.randn(12, 8, generator=g),
            "a.bias": torch.randn(30, generator=g),
            "position": torch.arange(4),
        }

    base = model(99)
    return base, [{k: base[k] + v if v.is_floating_point() else v for k, v in model(t).items()} for t in range(count)]


def test_a_stream_is_the_batch(tmp_path):
    base, models = stream(4)
    for t, m in enumerate(models):
        found = mk.continual_merge(tmp_path / "s", m, base=base, alpha=0.4 if t == 0 else None)
        assert found.step == t + 1
        batch = mk.merge_state_dicts(models[: t + 1], "opcm", base=base, alpha=0.4)
        merged = found.merged(base)
        assert list(merged) == list(base)
        for name, value in batch.items():
            if value.is_floating_point():
                assert brute.error(merged[name] - base[name], value - base[name]) < 1e-6, name
            assert torch.equal(merged["position"], base["position"])
    # One file of one model, whatever the length of the stream.
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["delta-00000004.safetensors", "lock", "state.json"]
    written = load_file(tmp_path / "s" / "delta-00000004.safetensors")
    assert sum(v.numel() for v in written.values()) == sum(v.numel() for v in base.values()) - 4
    total = torch.cat([found.delta(k).flatten() for k in written]).norm()
    assert float(total) == pytest.approx(found.norm, rel=1e-5)


def test_reopened_state_and_files(tmp_path):
    base, models = stream(2)
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "m").mkdir()
    save_file(models[1], tmp_path / "m" / "model.safetensors")
    mk.continual_merge(tmp_path / "s", models[0], base=base)
    found = mk.continual_merge(tmp_path / "s", tmp_path / "m", base=tmp_path / "base.safetensors")
    again = Continual.open(tmp_path / "s")
    assert (again.norms, again.total, again.parameters) == (found.norms, found.total, found.parameters)
    batch = mk.merge_state_dicts(models, "opcm", base=base)
    merged = again.merged(tmp_path / "base.safetensors")
    assert all(brute.error(merged[k], batch[k]) < 1e-6 for k in batch)


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_leaves_the_state_before_or_after(tmp_path, monkeypatch, call, at):
    base, models = stream(2)
    mk.continual_merge(tmp_path, models[0], base=base, label="first")
    real, calls = getattr(os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(state.os, call, failing)
    with pytest.raises(KeyboardInterrupt):
        mk.continual_merge(tmp_path, models[1], base=base, label="second")
    monkeypatch.undo()
    assert Continual.open(tmp_path).labels == ("first",)
    Continual.open(tmp_path).delta("a.weight")
    found = mk.continual_merge(tmp_path, models[1], base=base, label="second")
    batch = mk.merge_state_dicts(models, "opcm", base=base)
    merged = found.merged(base)
    assert all(brute.error(merged[k], batch[k]) < 1e-6 for k in batch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta-00000002.safetensors", "lock", "state.json"]


def test_a_label_is_merged_once(tmp_path):
    base, models = stream(1)
    once = mk.continual_merge(tmp_path, models[0], base=base, label="x")
    twice = mk.continual_merge(tmp_path, models[0], base=base, label="x")
    assert (twice.step, twice.norms) == (1, once.norms)
    assert mk.continual_merge(tmp_path, models[0], base=base).step == 2


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    base, models = stream(2)
    mk.continual_merge(tmp_path, models[0], base=base, alpha=0.5)
    before = (tmp_path / "state.json").read_bytes()

    def refused(words, model=models[1], on=base, **more):
        with pytest.raises(mk.MergeError, match=words):
            mk.continual_merge(tmp_path, model, base=on, **more)
        assert (tmp_path / "state.json").read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["delta-00000001.safetensors", "lock", "state.json"]

    refused("'alpha' differs from what the state was begun with; expected 0.5; got 0.7", alpha=0.7)
    refused("the base differs from the one", on={**base, "a.bias": base["a.bias"] + 1})
    refused("different tensors: a.bias", {k: v for k, v in models[1].items() if k != "a.bias"})
    refused("tensor 'a.bias': shape of the model differs", {**models[1], "a.bias": torch.zeros(3)})
    refused("tensor 'a.weight': model 0 holds NaN or Inf", {**models[1], "a.weight": torch.full((30, 20), torch.nan)})
    refused("the model is no model", 5)
    with state.locked(tmp_path):
        refused("another process is merging into this state")


def test_a_damaged_state_is_named(tmp_path):
    with pytest.raises(mk.MergeError, match="there is no continual merge"):
        Continual.open(tmp_path)
    base, models = stream(1)
    mk.continual_merge(tmp_path, models[0], base=base)
    good = json.loads((tmp_path / "state.json").read_text())
    for bad in ("", "[]", json.dumps({**good, "version": 2}), json.dumps({**good, "file": "../x"})):
        (tmp_path / "state.json").write_text(bad)
        with pytest.raises(mk.MergeError, match="the state of the continual merge is damaged"):
            mk.continual_merge(tmp_path, models[0], base=base)
