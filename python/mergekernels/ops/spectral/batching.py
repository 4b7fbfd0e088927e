"""Lists of matrices: one or many arguments, groups of equal shape, threads over the batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["groups", "in_order", "in_single_threads", "in_threads", "one_or_many"]

A = TypeVar("A")
R = TypeVar("R")


def one_or_many(x: Any, each: Callable[[Any, str], R]) -> Any:
    """each(x, "X") for one matrix, the list of each(x[i], "X[i]") for a list or tuple of them, in threads."""
    if isinstance(x, (list, tuple)):
        named = [(item, f"X[{i}]") for i, item in enumerate(x)]
        return in_threads(named, lambda pair: each(*pair))
    return each(x, "X")


def groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Positions of equal keys, in order of first appearance."""
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def in_order(items: Sequence[A], each: Callable[[A], R]) -> list[R]:
    """The results of all items, one after the other: for work that uses threads itself."""
    return [each(item) for item in items]


def in_threads(items: Sequence[A], each: Callable[[A], R]) -> list[R]:
    """The results of all items, in order; on CPU several items at a time, one thread each.

    Decompositions scale badly with threads inside one matrix and perfectly over matrices. What does not fill all
    threads is done afterwards, one by one with all of them. Errors are those of the first item that fails.
    """
    import torch

    threads = torch.get_num_threads()
    together = len(items) - len(items) % threads if threads > 1 else 0
    if together == 0 or _on_gpu(items):
        return [each(item) for item in items]
    try:
        # The number of threads is the calling thread's own, as far as BLAS and OpenMP are concerned ...
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = list(pool.map(each, items[:together]))
    finally:
        torch.set_num_threads(threads)  # ... but torch hands the last one set to threads that start later.
    return results + [each(item) for item in items[together:]]


def in_single_threads(items: Sequence[A], each: Callable[[A], R]) -> list[R]:
    """As `in_threads` for work made of many small operations: every item, a lone one too, has one thread on CPU.

    Threads inside small operations only wait for each other, on a busy machine a hundred times as long as they compute.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or not items or _on_gpu(items):
        return [each(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(each, items))
    finally:
        torch.set_num_threads(threads)


def _on_gpu(x: Any) -> bool:
    """Whether any tensor in nested lists, factors or shards is not in host memory."""
    import torch

    if isinstance(x, torch.Tensor):
        return x.device.type != "cpu"
    if isinstance(x, (list, tuple)):
        return any(_on_gpu(item) for item in x)
    return any(_on_gpu(getattr(x, name)) for name in ("parts", "b", "a", "x", "of", "matrix") if hasattr(x, name))
