"""Cases of learned coefficients and masks; a test module imports them and gives `target`.

target : fixture with (backend module, device).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gpu_matrix import DTYPES, SEED, TENSOR, bits, inputs, values
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops import combine, concrete, seg_dot
from mergekernels.ops.learned import MaskMerge, Relaxed, SegDot
from mergekernels.tensors import BF16, F16, F32, F64, DType, Piece, compute_dtype

MASK = Relaxed(0.6, SEED, TENSOR, 0.4375)
TRITON_CASES = ("size 4097", "groups 9 3", "kinds F64 True")


@dataclass
class Case:
    """The inputs of all passes, on the host."""

    base: torch.Tensor | None
    models: list[torch.Tensor]
    gradient: torch.Tensor
    logits: torch.Tensor
    piece: Piece
    out: torch.dtype

    @property
    def compute(self) -> DType:
        tensors = [*self.models, self.gradient, self.logits] + ([] if self.base is None else [self.base])
        return compute_dtype([view_of(x).dtype for x in tensors])


def a_case(
    n: int,
    dtype: DType = BF16,
    num_models: int = 3,
    *,
    sides: tuple[DType, DType] | None = None,
    kind: str = "weights",
    base: bool = True,
    g0: int = 0,
    out: DType | None = None,
) -> Case:
    """sides : dtypes of the gradient and of the logits, `dtype` if None."""
    x0, models = inputs(n, dtype, num_models, kind, seed=n + num_models, base=base)
    of_gradient, of_logits = sides or (dtype, dtype)
    rng = torch.Generator().manual_seed(n)
    logits = torch.randn(n, generator=rng, dtype=torch.float64).mul(2).to(torch_dtype(of_logits))
    return Case(
        x0,
        models,
        values(n, of_gradient, 77, kind),
        logits,
        Piece.flat(g0, n),
        torch_dtype(dtype if out is None else out),
    )


def folded(sums: _cpu.BlockSums) -> list[bytes]:
    """The sum in each slot."""
    numbers = [struct.unpack("d", sums.fold(slot))[0] for slot in range(sums.num_slots)]
    # The sign of a NaN sum is the machine's affair.
    return [struct.pack("d", v if v == v else math.nan) for v in numbers]


def results(backend: Any, device: str, case: Case, groups: int, mask: Relaxed = MASK, shift: float = 1e-3) -> list[Any]:
    """What the passes give: dot products without and with a mask, the sum of the mask, the merge, its gradient."""
    keep = [case.base, *case.models, case.gradient, case.logits]
    moved = [None if x is None else move(x, device) for x in keep]
    views = [None if x is None else view_of(x) for x in moved]
    base, models, gradient, logits = views[0], views[1:-2], views[-2], views[-1]
    options: dict[str, Any] = {"compute": case.compute, "threads": 1}
    found: list[Any] = []
    length = case.piece.g0 + case.piece.numel
    for used in (None, mask):
        sums = _cpu.BlockSums(len(models) * groups, 1, length)
        request = SegDot(groups, SEED, TENSOR, used)
        backend.seg_dot(request, sums, case.piece, base, models, gradient, None if used is None else logits, **options)
        found.append(folded(sums))
    sums = _cpu.BlockSums(1, 1, length)
    backend.mask_sum(mask, sums, case.piece, logits, **options)
    found.append(folded(sums))
    weights = tuple(0.3 - 0.2 * m for m in range(len(models)))
    for wanted in (None, shift):
        dtype = case.out if wanted is None else case.logits.dtype
        out = torch.full((case.piece.numel,), 7.0, dtype=dtype, device=device)
        slope = None if wanted is None else gradient
        request = MaskMerge(weights, mask, wanted)
        backend.mask_merge(request, case.piece, base, models, slope, logits, view_of(out), **options)
        found.append(bits(out.cpu()).tolist())
    return found


def move(x: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on a device, as far from a multiple of 16 bytes as it was."""
    offset = x.storage_offset()
    room = torch.zeros(offset + x.numel(), dtype=x.dtype, device=device)
    room[offset:] = x.reshape(-1).to(device)
    return room[offset:]


def check(target: Any, case: Case, groups: int = 1, **more: Any) -> list[Any]:
    backend, device = target
    got = results(backend, device, case, groups, **more)
    assert got == results(reference, "cpu", case, groups, **more)
    return got


def few_for_triton(target: Any, name: str) -> None:
    if target[0].__name__.endswith(".triton") and name not in TRITON_CASES:
        pytest.skip("Triton compiles five kernels for each case: a few of them")


@pytest.mark.parametrize("n", [0, 1, 7, 8, 255, 257, 4095, 4096, 4097, 3 * 4096 + 777])
def test_learned_sizes(target: Any, n: int) -> None:
    few_for_triton(target, f"size {n}")
    found = check(target, a_case(n, num_models=5))
    assert len(found[3]) == n
    assert n < 255 or len(set(found[0])) == 5


@pytest.mark.parametrize(
    ("dtype", "sides", "out"),
    [
        (BF16, (F32, F32), None),
        (F16, (F16, BF16), F32),
        (F32, (BF16, F16), BF16),
        (F64, None, None),
        (BF16, (F32, F64), F16),
        (F64, (BF16, F32), F32),
    ],
    ids=str,
)
def test_learned_dtypes(target: Any, dtype: DType, sides: Any, out: DType | None) -> None:
    few_for_triton(target, f"dtypes {dtype.name} {out}")
    for groups in (1, 3):
        check(target, a_case(4096 + 777, dtype, sides=sides, out=out), groups)


@pytest.mark.parametrize("groups", [2, 3, 5, 8, 9, 64, 256])
@pytest.mark.parametrize("num_models", [1, 3])
def test_learned_groups(target: Any, groups: int, num_models: int) -> None:
    few_for_triton(target, f"groups {groups} {num_models}")
    found = check(target, a_case(2 * 4096 + 300, F32, num_models), groups)
    # Every group has elements, and its own.
    assert len(set(found[0])) == groups * num_models


@pytest.mark.parametrize("num_models", [1, 2, 4, 5, 8, 64])
def test_learned_numbers_of_models(target: Any, num_models: int) -> None:
    few_for_triton(target, f"models {num_models}")
    for groups in (1, 2):
        check(target, a_case(600, BF16, num_models), groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("base", [True, False])
def test_learned_values_of_every_kind(target: Any, dtype: DType, base: bool) -> None:
    """Infinities, NaN, subnormal numbers and zeros of both signs."""
    few_for_triton(target, f"kinds {dtype.name} {base}")
    for kind in ("nasty", "ties"):
        check(target, a_case(4096 + 55, dtype, kind=kind, base=base), 3)
    case = a_case(300, dtype, kind="weights", base=base)
    case.logits = values(300, dtype, 5, "nasty")
    check(target, case)


@pytest.mark.parametrize("g0", [4096, 2**31 - 4096, 2**32])
def test_learned_pieces(target: Any, g0: int) -> None:
    """The words are those of the flat index, wherever the piece lies."""
    few_for_triton(target, f"piece {g0}")
    here = check(target, a_case(4096 + 64, F32, 1, g0=g0), 4)
    assert here[2] != check(target, a_case(4096 + 64, F32, 1), 4)[2]


def test_learned_merge_at_any_index(target: Any) -> None:
    backend, device = target
    if backend.__name__.endswith(".triton"):
        pytest.skip("Triton takes pieces that begin at a multiple of 4, as dispatch.LearnedBackend says")
    case = a_case(777, F32)
    for g0 in (1, 2**34 + 3):
        found = []
        for run, place in ((reference, "cpu"), (backend, device)):
            out = torch.zeros(777, device=place)
            views = [view_of(x.to(place)) for x in (*case.models, case.logits)]
            request = MaskMerge((1.0, 1.0, 1.0), MASK)
            run.mask_merge(
                request, Piece.flat(g0, 777), None, views[:3], None, views[3], view_of(out), compute=F32, threads=1
            )
            found.append(bits(out.cpu()))
        assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_learned_pointers_aligned_to_the_dtype_only(target: Any, dtype: DType) -> None:
    few_for_triton(target, f"aligned {dtype.name}")
    n = 4096 + 9
    whole = a_case(n + 1, dtype)
    assert whole.base is not None
    for late in range(4):
        tensors = [whole.base, whole.models[0], whole.gradient, whole.logits]
        base, first, gradient, logits = (x[1:] if i == late else x[:-1] for i, x in enumerate(tensors))
        check(target, Case(base, [first], gradient, logits, Piece.flat(0, n), whole.out), 2)


def test_learned_strided_views(target: Any) -> None:
    few_for_triton(target, "strided")
    backend, device = target
    x = torch.randn(6, 50, 40, generator=torch.Generator().manual_seed(1))
    found = []
    for run, place in ((reference, "cpu"), (backend, device)):
        base, first, second, gradient, logits, room = x.to(place).unbind()
        views = [view_of(y.t()) for y in (base, first, second, gradient, logits)]
        sums = _cpu.BlockSums(4, 1, 2000)
        options: dict[str, Any] = {"compute": F32, "threads": 1}
        piece = Piece.flat(0, 2000)
        run.seg_dot(SegDot(2, mask=MASK), sums, piece, views[0], views[1:3], views[3], views[4], **options)
        run.mask_merge(
            MaskMerge((1.0, -1.0), MASK), piece, views[0], views[1:3], None, views[4], view_of(room.t()), **options
        )
        found.append((folded(sums), bits(room.cpu()).tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize(("temperature", "mean"), [(0.6, 0.0), (1e-3, 1e-30), (1e-30, 0.5), (1e6, 1e-45)])
def test_learned_masks_at_the_ends(target: Any, temperature: float, mean: float) -> None:
    """A mean of 0 gives zeros, also where it is 0 as a float32 only; nothing past the end is counted."""
    few_for_triton(target, f"ends {temperature} {mean}")
    for dtype in (F32, F64):
        found = check(target, a_case(4096 + 5, dtype), mask=Relaxed(temperature, SEED, TENSOR, mean))
        if mean == 0:
            assert not any(found[4]) and found[1] == [bytes(8)] * 3


def test_learned_groups_without_elements(target: Any) -> None:
    """Are +0, also where the mean of the mask, and with it everything else, is NaN."""
    few_for_triton(target, "no elements")
    found = check(target, a_case(5, F32, 1), 64, mask=Relaxed(0.6, SEED, TENSOR, math.nan))
    assert found[1].count(bytes(8)) >= 59


def test_learned_ops(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions, forward and backward, ask this backend and get the reference's bits."""
    backend, device = target
    name = backend.__name__.rpartition(".")[2]
    for op in ("seg_dot", "mask_sum", "mask_merge"):
        assert "no kernel" not in str(backend.why_not(op, []))
    if device == "cpu" and name == "cuda":
        # The host build takes tensors in host memory.
        monkeypatch.setattr(backend, "why_not", lambda op, views: None)
    rng = torch.Generator().manual_seed(6)
    base, gradient, *steps = (torch.randn(37, 301, generator=rng) for _ in range(4))
    models = [(base + 0.1 * x).bfloat16() for x in steps]
    base, gradient = base.bfloat16(), gradient.bfloat16()
    found = []
    for asked, place in (("reference", "cpu"), (name, device)):
        c, k, z = (torch.randn(*s, generator=rng.manual_seed(7)).to(place) for s in ((2,), (2, 5), (37, 301)))
        leaves = [x.detach().requires_grad_() for x in (c, k, c, z)]
        experts, options = [m.to(place) for m in models], {"base": base.to(place), "backend": asked}
        outputs = [
            combine(experts, leaves[0], **options),
            combine(experts, leaves[1], seed=5, **options),
            concrete(experts, leaves[2], leaves[3], name="w", seed=2**63, **options),
        ]
        torch.autograd.backward(outputs, [gradient.to(place)] * 3)
        dots = seg_dot(gradient.to(place), experts, groups=7, **options)
        found.append([bits(x.detach().cpu()) for x in (*outputs, *(x.grad for x in leaves), dots)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
