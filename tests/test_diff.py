"""`diff`: counts, places, ULPs and errors against torch, over dtypes, tiles, threads and damaged inputs."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file

from mergekernels.engine.diff import diff
from mergekernels.errors import ArgumentError, FormatError, InputError
from mergekernels.report.diff import diff_text

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def save(path, tensors):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, str(path))
    return path


def one(tmp_path, a, b, **options):
    """The report on two files with one tensor each."""
    return diff(save(tmp_path / "a.safetensors", {"x": a}), save(tmp_path / "b.safetensors", {"x": b}), **options)


def ordinals(x):
    """Signed positions on the number line of x's dtype."""
    bits = x.view(INTS[x.element_size()]).to(torch.int64)
    magnitude = bits & (2 ** (8 * x.element_size() - 1) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def nearby(dtype, n, seed=0):
    """Values of every magnitude that `dtype` has, and neighbours of most of them, as float64."""
    g = torch.Generator().manual_seed(seed)
    low, high = (-26, 12) if dtype == torch.float16 else (-148, 126)
    x = torch.randn(n, generator=g, dtype=torch.float64) * torch.exp2(
        torch.randint(low, high, (n,), generator=g).double()
    )
    y = x * (1 + 1e-2 * torch.randn(n, generator=g, dtype=torch.float64))
    return x.to(dtype), torch.where(torch.rand(n, generator=g) < 0.3, x, y).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 255, 4096, 4097, 70001])
def test_floats_against_torch(tmp_path, dtype, n):
    a, b = nearby(dtype, n)
    report = one(tmp_path, a, b)
    unequal = a.view(INTS[a.element_size()]) != b.view(INTS[b.element_size()])
    if not unequal.any():
        assert report.identical
        return
    (found,) = report.tensors
    distance = (ordinals(a) - ordinals(b)).abs()
    assert found.differing == int(unequal.sum())
    assert found.first == int(unequal.nonzero()[0])
    assert found.max_ulp == int(distance.max())
    assert found.max_ulp_index == (int(distance.argmax()),)
    assert found.max_abs == float((a.double() - b.double()).abs().max())
    expected = float((a.double() - b.double()).norm() / a.double().norm())
    assert found.relative_error == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wide", [torch.float16, torch.float32, torch.float64], ids=str)
def test_another_dtype_is_compared_exactly_and_rounded_for_ulps(tmp_path, wide):
    narrow, _ = nearby(torch.float16 if wide == torch.float16 else torch.bfloat16, 5000, seed=1)
    narrow = narrow.to(torch.bfloat16)
    other = narrow.to(wide)
    keep = torch.isfinite(other)
    narrow, other = narrow[keep], other[keep]
    exact = other.double() == narrow.double()
    report = one(tmp_path, narrow, other, rtol=0.0)
    (found,) = report.tensors
    assert found.differing == int((~exact).sum())
    assert found.status == "differs" and not report.identical
    if wide != torch.float16:
        assert found.differing == 0 and found.relative_error == 0.0 and found.within and report.same
        # A quarter of a unit away: every element differs, none after rounding.
        moved = other * (1 + 2.0**-10)
        (found,) = one(tmp_path, narrow, moved).tensors
        nonzero = int((narrow != 0).sum())
        assert 0.9 * nonzero < found.differing <= nonzero
        assert found.max_ulp == int((ordinals(narrow) - ordinals(moved.to(torch.bfloat16))).abs().max())


def test_no_double_rounding_from_float64_to_bfloat16(tmp_path):
    # Just above the middle of 1 and the next bfloat16: float32 in between would round it down to even.
    value = 1 + 2.0**-8 + 2.0**-40
    (found,) = one(tmp_path, torch.tensor([1.0]).bfloat16(), torch.tensor([value], dtype=torch.float64)).tensors
    assert found.max_ulp == 1


def test_places_in_a_matrix(tmp_path):
    a = torch.zeros(7, 11, 13)
    b = a.clone()
    b[2, 5, 7] = 1e-3
    b[6, 10, 12] = 1.0
    (found,) = one(tmp_path, a, b).tensors
    assert (found.differing, found.elements) == (2, 7 * 11 * 13)
    assert found.first == (2 * 11 + 5) * 13 + 7
    assert found.first_index == (2, 5, 7)
    assert found.max_ulp_index == (6, 10, 12)
    assert found.max_ulp == int(torch.tensor(1.0).view(torch.int32))
    assert found.relative_error == math.inf  # the norm of A is zero
    assert "[2, 5, 7]" in diff_text(one(tmp_path, a, b))


def test_special_values(tmp_path):
    nan, inf = math.nan, math.inf
    a = torch.tensor([nan, nan, inf, inf, 0.0, 1.0, nan, 3.0])
    b = torch.tensor([nan, 1.0, inf, -inf, -0.0, 1.0, nan, 4.0])
    b.view(torch.int32)[6] |= 1  # another NaN
    report = one(tmp_path, a, b, rtol=100.0)
    (found,) = report.tensors
    assert found.differing == 5  # 1, 3, 4 (the sign of zero), 6, 7
    assert found.first == 1
    assert found.unbounded == 2
    assert found.relative_error == math.inf and not found.within and not report.same
    assert found.max_abs == 1.0
    assert found.max_ulp == 2 * 0x7F800000  # from infinity to minus infinity
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["tensors"][0]["relative_error"] == "inf"
    zeros = one(tmp_path, torch.tensor([0.0, 2.0]), torch.tensor([-0.0, 2.0]), rtol=0.0)
    assert zeros.same and not zeros.identical and zeros.tensors[0].max_ulp == 0


def test_nan_in_two_dtypes_is_equal(tmp_path):
    a = torch.tensor([math.nan, math.inf, -0.0])
    (found,) = one(tmp_path, a, a.bfloat16()).tensors
    assert found.differing == 0 and found.dtype_b == "BF16"


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64],
    ids=str,
)
def test_integers(tmp_path, dtype):
    info = torch.iinfo(dtype)
    a = torch.tensor([info.min, 5, info.max], dtype=dtype)
    b = torch.tensor([info.max, 5, info.max], dtype=dtype)
    (found,) = one(tmp_path, a, b).tensors
    assert (found.differing, found.first, found.max_ulp) == (1, 0, info.max - info.min)


def test_types_without_values_are_compared_as_bytes(tmp_path):
    a = torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn)
    b = torch.tensor([1.0, 2.0, 4.0]).to(torch.float8_e4m3fn)
    (found,) = one(tmp_path, a, b, rtol=10.0).tensors
    assert (found.differing, found.first, found.max_ulp, found.relative_error) == (1, 2, None, None)
    assert not found.within
    c = torch.tensor([1 + 1j, 2 - 2j], dtype=torch.complex64)
    (found,) = one(tmp_path, c, c.conj().resolve_conj()).tensors
    assert (found.differing, found.first) == (2, 0)
    flags = torch.tensor([True, False])
    (found,) = one(tmp_path, flags, ~flags).tensors
    assert (found.differing, found.max_ulp) == (2, 1)
    assert one(tmp_path, a, a).identical and one(tmp_path, c, c).identical


def test_names_shapes_and_kinds(tmp_path):
    shared = torch.arange(4.0)
    a = {
        "same": shared,
        "left": shared,
        "shape": shared,
        "kind": shared,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
    }
    b = {
        "same": shared,
        "right": shared,
        "shape": shared.view(2, 2),
        "kind": shared.long(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
    }
    report = diff(save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b), rtol=1.0)
    assert (report.missing, report.extra) == (("left",), ("right",))
    assert [(t.name, t.status) for t in report.tensors] == [
        ("kind", "dtype"),
        ("scalar", "differs"),
        ("shape", "shape"),
    ]
    assert (report.compared, report.equal, report.same) == (5, 2, False)
    assert report.tensors[1].first_index == ()
    text = diff_text(report)
    for part in ("only in A", "left", "only in B", "right", "[2, 2]", "beyond the bound"):
        assert part in text


def test_many_tiles_and_threads_give_one_answer(tmp_path):
    tile = 128 * 4096
    g = torch.Generator().manual_seed(3)
    a = torch.randn(5 * tile + 12345, generator=g)
    b = a.clone()
    b[tile] += 1e-3
    b[3 * tile - 1] = 2.0
    b[-7:] *= 1 + 1e-4
    reports = [one(tmp_path, a, b, threads=t) for t in (1, 2, 5)]
    (found,) = reports[0].tensors
    assert all(r.tensors == reports[0].tensors for r in reports)
    assert (found.differing, found.first) == (9, tile)
    assert found.max_ulp_index == (3 * tile - 1,)
    expected = float((a.double() - b.double()).norm() / a.double().norm())
    assert found.relative_error == pytest.approx(expected, rel=1e-12)


def test_shards_do_not_matter_and_progress_ends_at_the_total(tmp_path):
    tensors = {f"t{i}": torch.randn(1000, 100) for i in range(6)}
    whole = save(tmp_path / "whole.safetensors", tensors)
    folder = tmp_path / "cut"
    folder.mkdir()
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{i + 1:05d}-of-00006.safetensors"
        save(folder / file, {name: tensor})
        weight_map[name] = file
    index = {"metadata": {"total_size": 6 * 400_000}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    seen = []
    report = diff(whole, folder, progress=lambda done, total: seen.append((done, total)), threads=2)
    assert report.identical and report.equal == 6
    assert seen[-1] == (2 * 6 * 400_000,) * 2
    assert report.bytes_read == 2 * 6 * 400_000


def test_data_at_an_odd_offset(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    header += b" " * (1 - len(header) % 2)
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(len(header).to_bytes(8, "little") + header + struct.pack("<3f", 1.0, 2.0, 3.0))
    assert len(header) % 2 == 1
    even = save(tmp_path / "even.safetensors", {"x": torch.tensor([1.0, 2.0, 5.0])})
    (found,) = diff(odd, even).tensors
    assert (found.differing, found.max_abs) == (1, 2.0)


def test_bad_arguments_and_inputs(tmp_path):
    good = save(tmp_path / "good.safetensors", {"x": torch.zeros(3)})
    with pytest.raises(ArgumentError, match=r"rtol is not usable; expected a finite number of at least 0; got -1"):
        diff(good, good, rtol=-1.0)
    with pytest.raises(ArgumentError, match="rtol"):
        diff(good, good, rtol=math.nan)
    with pytest.raises(InputError, match="no such checkpoint"):
        diff(good, tmp_path / "absent")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"cut\.safetensors"):
        diff(good, cut)


def test_a_file_cut_while_it_is_read(tmp_path, monkeypatch):
    import mergekernels.engine.diff as module

    good = save(tmp_path / "good.safetensors", {"x": torch.zeros(300_000)})
    late = save(tmp_path / "late.safetensors", {"x": torch.zeros(300_000)})
    plain = module.for_each

    def cutting(*arguments):
        late.write_bytes(late.read_bytes()[:-4])
        plain(*arguments)

    monkeypatch.setattr(module, "for_each", cutting)
    with pytest.raises(InputError, match=r"late\.safetensors: the file was changed or truncated"):
        diff(good, late)
