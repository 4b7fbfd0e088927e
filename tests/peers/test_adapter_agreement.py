"""Adapter files beside PEFT: what it writes merges to the same weights here, and the other way round.

Needs PEFT in an environment of its own: `bash benchmarks/make_peer_env.sh DIR`, MERGEKERNELS_PEER_ENV=DIR.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekernels.adapters.model import Adapter, Factors, Site
from mergekernels.errors import InputError, PlanError
from mergekernels.formats.adapters import read_adapter, write_peft

PEER = os.environ.get("MERGEKERNELS_PEER_ENV")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PEER is None, reason="MERGEKERNELS_PEER_ENV names no environment with PEFT"),
]

PLAIN = ["plain", "rslora", "patterns", "rslora_patterns", "transposed", "embedding", "conv", "saved", "gaussian"]
ACCEPTED = [*PLAIN, "orthogonal", "dropout", "converted"]
REFUSED = {
    "dora": "use_dora = True",
    "lora_bias": "lora_bias = True",
    "bias_all": "bias = 'all'",
    "bias_lora_only": "bias = 'lora_only'",
    "pissa": "init_lora_weights = 'pissa'",
    "pissa_niter": "init_lora_weights = 'pissa_niter_2'",
    "olora": "init_lora_weights = 'olora'",
    "tokens": "trainable_token_indices = ",
    "parameters": "target_parameters = ",
    "attention": "MultiheadAttention) are refused",
    "grouped": "A convolution with groups cannot be merged",
    "adalora": "peft_type = 'ADALORA'",
    "ia3": "peft_type = 'IA3'",
    "loha": "peft_type = 'LOHA'",
    "lokr": "peft_type = 'LOKR'",
}


def _peer(command: str, folder: Path) -> None:
    assert PEER is not None
    script = Path(__file__).parent / "peer_adapters.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [str(Path(PEER) / "bin" / "python"), str(script), command, str(folder)]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `peer_adapters.py write` leaves."""
    root = tmp_path_factory.mktemp("adapters")
    _peer("write", root)
    assert (root / "version").read_text() == "0.21.2"
    return root


def _applied(adapter: Adapter, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {**base, **{name: load() for name, load in adapter.extras.items()}}
    for module in adapter.modules.values():
        site = module.site
        weights[site.weight] = weights[site.weight] + site.to_weight(module.factors().dense())
    return weights


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("case", ACCEPTED)
def test_what_peft_writes(folder: Path, case: str, with_base: bool) -> None:
    adapter = read_adapter(folder / case, base=folder / "base" if with_base else None)
    base = load_file(folder / "base" / "model.safetensors")
    merged = load_file(folder / f"{case}.merged.safetensors")
    assert any(not torch.equal(base[m.site.weight], merged[m.site.weight]) for m in adapter.modules.values())
    _same(_applied(adapter, base), merged)


@pytest.mark.parametrize("case", ["llama", "tied", "gpt2"])
def test_models_of_transformers(folder: Path, case: str) -> None:
    adapter = read_adapter(folder / case, base=folder / f"{case}.base")
    base = load_file(folder / f"{case}.base" / "model.safetensors")
    merged = load_file(folder / f"{case}.merged" / "model.safetensors")
    kinds = {m.site.kind for m in adapter.modules.values()}
    assert kinds == ({"fan_in_fan_out"} if case == "gpt2" else {"embedding", "linear"})
    assert set(adapter.extras) == ({"lm_head.weight", "model.embed_tokens.weight"} if case == "llama" else set())
    _same(_applied(adapter, base), merged)


@pytest.mark.parametrize("case", REFUSED)
def test_variants_are_refused_by_name(folder: Path, case: str) -> None:
    with pytest.raises((InputError, PlanError)) as caught:
        read_adapter(folder / case)
    assert REFUSED[case] in str(caught.value) and str(folder / case) in str(caught.value)


@pytest.mark.parametrize("name", ["one", "two"])
def test_one_of_two_adapters(folder: Path, name: str) -> None:
    base = load_file(folder / "base" / "model.safetensors")
    merged = load_file(folder / f"named.{name}.merged.safetensors")
    _same(_applied(read_adapter(folder / "named", name=name), base), merged)
    memory = load_file(folder / "named.memory.safetensors")
    _same(_applied(read_adapter(memory, name=name, config={"r": 4, "lora_alpha": 6}), base), merged)
    with pytest.raises(InputError, match="several adapters: one, two"):
        read_adapter(memory, config={"lora_alpha": 6})
    with pytest.raises(InputError, match="sub-folders: one, two"):
        read_adapter(folder / "named")


def test_what_we_write(folder: Path) -> None:
    base = load_file(folder / "base" / "model.safetensors")
    (folder / "ours").mkdir()
    wanted: dict[str, dict[str, torch.Tensor]] = {}
    for case in ACCEPTED:
        adapter = read_adapter(folder / case, base=folder / "base")
        modules = {m.site: m.factors() for m in adapter.modules.values()}
        write_peft(folder / "ours" / case, modules, extras=adapter.extras, config=adapter.config, base=base)
        wanted[case] = _applied(adapter, base)
    # Both orientations, all kinds, and ranks that no pattern of suffixes alone could tell apart.
    sites = [
        Site("q_proj", "linear", (6, 6)),
        Site("layers.0.q_proj", "linear", (8, 6)),
        Site("layers.1.q_proj", "linear", (8, 6)),
        Site("layers.0.c_proj", "fan_in_fan_out", (6, 6)),
        Site("layers.1.c_attn", "fan_in_fan_out", (6, 10)),
        Site("embed_tokens", "embedding", (20, 6)),
        Site("conv", "conv", (8, 4, 3, 3)),
        Site("conv1", "conv", (6, 4, 3)),
    ]
    torch.manual_seed(7)
    ranks = [1, 3, 3, 3, 2, 3, 3, 4]
    mixed = {
        s: Factors(torch.randn(s.shape[0], r), torch.randn(r, s.shape[1])) for s, r in zip(sites, ranks, strict=True)
    }
    write_peft(folder / "ours" / "mixed", mixed, metadata={"method": "test"}, base=base)
    wanted["mixed"] = dict(base)
    for site, factors in mixed.items():
        wanted["mixed"][site.weight] = base[site.weight] + site.to_weight(factors.dense())
    _same(_applied(read_adapter(folder / "ours" / "mixed"), base), wanted["mixed"])
    _peer("read", folder)
    for case, weights in wanted.items():
        _same(weights, load_file(folder / f"ours.{case}.merged.safetensors"))
