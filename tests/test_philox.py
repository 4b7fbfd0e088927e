"""Philox4x32-10: the published known answers, and agreement of the native words with the reference."""

from __future__ import annotations

import pytest
import torch

from mergekernels import _cpu
from mergekernels._backends.reference.common import philox, philox_run, tie_words


def test_known_answer_of_zeros() -> None:
    assert _cpu.philox(0, 0, 0, 0, 4) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_known_answer_of_ones() -> None:
    # Counter and key all ones: group 2^64 - 1, which no tensor reaches, so its elements are reached by wrapping.
    words = philox(2**64 - 1, 2**32 - 1, 2**32 - 1, torch.tensor([-4, -3, -2, -1]))
    assert words.tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(("seed", "tensor", "stream"), [(0, 0, 2), (2**64 - 1, 2**32 - 1, 1010), (12345, 77, 18)])
@pytest.mark.parametrize("first", [0, 1, 7, 2**33 + 3, 2**40 - 2])
def test_words_equal_the_reference(seed: int, tensor: int, stream: int, first: int) -> None:
    g = torch.arange(first, first + 41)
    assert _cpu.philox(seed, tensor, stream, first, 41) == philox(seed, tensor, stream, g).tolist()


def test_the_stream_of_a_model_is_its_number_and_the_purpose() -> None:
    g = torch.arange(100)
    assert _cpu.philox(9, 5, 16 * 3 + 2, 0, 100) == tie_words(9, 5, 3, g).tolist()


def test_no_words() -> None:
    assert _cpu.philox(0, 0, 0, 0, 0) == []


def test_runs_are_the_words_of_consecutive_indices() -> None:
    for count in (0, 1, 4, 11):
        want = philox(2**63 + 5, 0xDEADBEEF, 9, torch.arange(count))
        assert torch.equal(philox_run(2**63 + 5, 0xDEADBEEF, 9, count), want)
