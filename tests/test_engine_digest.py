"""The digest of tiles that finish in any order, by several threads that reuse their buffers."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading

import pytest

from mergekernels.engine.digesting import OrderedDigest


def tiles(count: int, size: int = 3000) -> list[bytes]:
    return [random.Random(i).randbytes(size) for i in range(count)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order(order: tuple[int, ...]) -> None:
    data = tiles(4)
    digest = OrderedDigest(4)
    for index in order:
        buffer = bytearray(data[index])

        def again(other: int, buffer: bytearray = buffer) -> memoryview:
            buffer[:] = data[other]
            return memoryview(buffer)

        digest.add(index, memoryview(buffer), again)
    assert digest.hexdigest() == hashlib.sha256(b"".join(data)).hexdigest()


class _Interleaving:
    """A lock that lets another thread's call in after it is released for the first time."""

    def __init__(self, between: list[int], data: list[bytes], digest: OrderedDigest) -> None:
        self._lock = threading.Lock()
        self._between = between
        self._data = data
        self._digest = digest

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._between:
            index = self._between.pop()
            self._digest.add(index, memoryview(self._data[index]), lambda other: memoryview(self._data[other]))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_predecessor_that_arrives_in_between_is_not_hashed_for_the_tile_in_hand(first: int) -> None:
    data = tiles(3)
    digest = OrderedDigest(3)
    rest = [i for i in range(3) if i != first]
    digest._lock = _Interleaving([rest[0]], data, digest)  # type: ignore[assignment]
    buffers = {first: bytearray(data[first]), rest[1]: bytearray(data[rest[1]])}
    for index, buffer in buffers.items():

        def again(other: int, buffer: bytearray = buffer) -> memoryview:
            buffer[:] = data[other]
            return memoryview(buffer)

        digest.add(index, memoryview(buffer), again)
    assert digest.hexdigest() == hashlib.sha256(b"".join(data)).hexdigest()


def test_many_threads() -> None:
    data = tiles(200, 5000)
    expected = hashlib.sha256(b"".join(data)).hexdigest()
    for _ in range(10):
        digest = OrderedDigest(len(data))
        counter = itertools.count()

        def work(digest: OrderedDigest = digest, counter: itertools.count[int] = counter) -> None:
            buffer = bytearray(5000)

            def again(other: int) -> memoryview:
                buffer[:] = data[other]
                return memoryview(buffer)

            while (index := next(counter)) < len(data):
                buffer[:] = data[index]
                digest.add(index, memoryview(buffer), again)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert digest.hexdigest() == expected
