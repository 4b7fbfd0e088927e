"""Which functions of FusionBench are replaced, and how a version that differs is recognised."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._hooks import refuse
from .._integration import Integration
from . import functions

__all__ = ["Options", "integration"]

TOOL = "FusionBench"
_METHOD = "fusion_bench.method."
_SOMETIMES = ("opcm.ties_merging",)
"""What FusionBench cannot import itself beside transformers 5."""

Make = Callable[[Any], Any]


@dataclass(frozen=True)
class Options:
    """There are none."""


@dataclass(frozen=True)
class _Seam:
    """A function, the modules that hold it under its name, its parameters, and what takes its place."""

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    make: Callable[[Integration[Options], str], Make]


def _install(state: Integration[Options]) -> None:
    """Replaces the functions wherever they are imported by name.

    Raises :class:`mergekernels.errors.ToolError` for a FusionBench whose functions look otherwise.
    """
    found = []
    for seam in _SEAMS:
        for module in seam.modules:
            try:
                owner = importlib.import_module(_METHOD + module)
            except ImportError as error:
                if module in _SOMETIMES:
                    continue
                refuse(TOOL, f"{_METHOD}{module} cannot be imported ({error})")
            function = vars(owner).get(seam.name)
            if not inspect.isfunction(function):
                refuse(TOOL, f"{_METHOD}{module} has no function '{seam.name}'")
            if tuple(inspect.signature(function).parameters) != seam.parameters:
                refuse(TOOL, f"'{seam.name}' has other parameters than those that are known")
            found.append((owner, seam))
    for owner, seam in found:
        state.hooks.replace(owner, seam.name, seam.make(state, seam.name))


def _whole(function: Callable[..., Any]) -> Callable[[Integration[Options], str], Make]:
    return lambda state, name: state.served(name, function)


def _by_tensor(function: Callable[..., Any]) -> Callable[[Integration[Options], str], Make]:
    """For a function of a list of task vectors: every tensor is a call, for which the tool's own can be called."""

    def make_for(state: Integration[Options], name: str) -> Make:
        def make(original: Any) -> Any:
            def theirs(vectors: Any, key: str, options: Mapping[str, Any]) -> Any:
                return original([{key: v} for v in vectors], **options)[key]

            one = state.served(name, function, lambda vectors, key, options: key)(theirs)

            @functools.wraps(original)
            def call(task_vectors: Any, *args: Any, **kwargs: Any) -> Any:
                bound = inspect.signature(original).bind(task_vectors, *args, **kwargs)
                bound.apply_defaults()
                options = dict(bound.arguments)
                options.pop("task_vectors")
                if not task_vectors or options.get("return_single_task_models"):
                    state.stats.passed_on(name, "single-task models or no task vectors")
                    return original(task_vectors, *args, **kwargs)
                return {key: one([v[key] for v in task_vectors], key, options) for key in task_vectors[0]}

            return call

        return make

    return make_for


def _regmean(state: Integration[Options], name: str) -> Make:
    """By parameter, too."""

    def make(original: Any) -> Any:
        def theirs(values: Any, grams: Any, key: str, ratio: float, transposed: bool) -> Any:
            return original({key: values}, grams, ratio, transposed)[key]

        one = state.served(name, functions.regmean_tensor, lambda values, grams, key, *rest: key)(theirs)

        @functools.wraps(original)
        def call(
            models_to_merge_param_dict: Any,
            models_to_merge_regmean_weights_list: Any,
            reduce_non_diagonal_ratio: float = 1.0,
            weight_transpose: bool = True,
        ) -> Any:
            grams = models_to_merge_regmean_weights_list
            return {
                key: one(values, grams, key, reduce_non_diagonal_ratio, weight_transpose)
                for key, values in models_to_merge_param_dict.items()
            }

        return call

    return make


_SEAMS = (
    _Seam(
        "compute_and_sum_svd_mem_reduction",
        ("task_singular_vector.utils.TSVM_utils",),
        ("task_vectors", "exclude_keys", "accelerator", "return_single_task_models"),
        _by_tensor(functions.tsv_m_tensor),
    ),
    _Seam(
        "iso_c",
        ("isotropic_merging.iso",),
        ("task_vectors", "accelerator", "exclude_keys"),
        _by_tensor(functions.iso_c_tensor),
    ),
    _Seam(
        "iso_cts",
        ("isotropic_merging.iso",),
        ("task_vectors", "common_space_fraction", "accelerator", "exclude_keys"),
        _by_tensor(functions.iso_cts_tensor),
    ),
    _Seam(
        "ties_merging",
        ("ties_merging.ties_merging", "dare.ties_merging", "opcm.ties_merging"),
        ("flat_task_checks", "reset_thresh", "merge_func"),
        _whole(functions.ties_merging),
    ),
    _Seam(
        "merging_with_regmean_weights",
        ("regmean.regmean",),
        (
            "models_to_merge_param_dict",
            "models_to_merge_regmean_weights_list",
            "reduce_non_diagonal_ratio",
            "weight_transpose",
        ),
        _regmean,
    ),
)

integration: Integration[Options] = Integration(TOOL, _install)
