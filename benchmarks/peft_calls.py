"""Runs in the environment of PEFT: times calls with and without mergekernels and prints them as JSON.

usage: python peft_calls.py SITE_PACKAGES_WITH_MERGEKERNELS WIDTH LAYERS REPEAT THREADS
"""

import json
import site
import sys
import time
import warnings

site.addsitedir(sys.argv[1])

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import mergekernels.integrations.peft as fast

SLOW = 2.0
"""Seconds above which a call is made twice only."""


class Net(nn.Module):
    """Square layers without a bias."""

    def __init__(self, width, layers):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def config():
    return LoraConfig(r=16, lora_alpha=32, target_modules=r"layers\.\d+", init_lora_weights=False)


class Calls:
    """The calls on one model."""

    def __init__(self, width, layers):
        torch.manual_seed(0)
        self.model = get_peft_model(Net(width, layers), config(), adapter_name="a")
        self.model.add_adapter("b", config())

    def combine(self, kind, **options):
        """(seconds, deltas) of one combination."""
        start = time.perf_counter()
        self.model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", combination_type=kind, **options)
        seconds = time.perf_counter() - start
        layers = self.model.base_model.model.layers
        found = [m.lora_B["new"].weight.data @ m.lora_A["new"].weight.data for m in layers]
        self.model.delete_adapter("new")
        return seconds, found

    def fold(self):
        """(seconds, weights) of merging both adapters into the base."""
        layers = self.model.base_model.model.layers
        before = [m.base_layer.weight.data.clone() for m in layers]
        start = time.perf_counter()
        self.model.merge_adapter(["a", "b"])
        seconds = time.perf_counter() - start
        found = [m.base_layer.weight.data.clone() for m in layers]
        for m, weight in zip(layers, before, strict=True):
            m.base_layer.weight.data = weight
            m.merged_adapters.clear()
        return seconds, found


def turns(call, repeat):
    """(seconds of PEFT, seconds hooked, largest relative difference), the fastest of each."""
    plain, hooked, theirs = [], [], None
    for _ in range(repeat + 1):
        if not plain or len(plain) < 2 or min(plain) < SLOW:
            seconds, theirs = call()
            plain.append(seconds)
        fast.reset_stats()
        with fast.enabled():
            seconds, ours = call()
        calls = fast.stats()
        assert calls.served and not calls.passed_on, str(calls)
        hooked.append(seconds)
    difference = max(float((o - t).norm() / t.norm()) for o, t in zip(ours, theirs, strict=True))
    assert difference < 1e-5, difference
    return min(plain), min(hooked), difference


def main():
    width, layers, repeat, threads = map(int, sys.argv[2:6])
    warnings.simplefilter("ignore")
    if threads:
        torch.set_num_threads(threads)
    calls = Calls(width, layers)
    many = repeat if width > 512 else 5 * repeat
    cases = {"svd": turns(lambda: calls.combine("svd"), many)}
    if width == 1024:
        cases["ties_svd"] = turns(lambda: calls.combine("ties_svd", density=0.2), repeat)
    cases["merge of two adapters"] = turns(calls.fold, many)
    linear = min(calls.combine("linear")[0] for _ in range(5 * repeat))
    print(
        json.dumps({"version": peft.__version__, "threads": torch.get_num_threads(), "cases": cases, "linear": linear})
    )


if __name__ == "__main__":
    main()
