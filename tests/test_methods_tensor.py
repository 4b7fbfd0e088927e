"""tc_lora, compress_then_merge, tucker_merge, lora_lego against formulas in dense form, and their invariants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mergekernels import MergeError, merge_adapters
from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix import MatrixSpec, Merged
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters.model import Factors
from mergekernels.ops import cluster, cp_als, tucker
from stacks import Stack, dense, model, planted_stack, random_stack, relative


def merged(method: str, stack: Sequence[tuple[torch.Tensor, torch.Tensor]], **options: Any) -> Merged:
    dialect = options.pop("dialect", "default")
    chosen = get_matrix(method, "adapters")
    params = bind_matrix(chosen, options, len(stack), dialect)
    shape = (stack[0][0].shape[0], stack[0][1].shape[1])
    spec = MatrixSpec("module.weight", shape, len(stack), params, dialect, seed=3)
    return chosen.merge(spec, [Factors(b, a) for b, a in stack])


def delta(method: str, stack: Sequence[tuple[torch.Tensor, torch.Tensor]], **options: Any) -> torch.Tensor:
    found = merged(method, stack, **options).delta
    assert isinstance(found, Factors)
    return found.dense().double()


def empty(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    return stack[0][0][:, :0], stack[0][1][:0]


class TestTcLora:
    def test_is_the_weighted_sum_of_the_reconstruction(self) -> None:
        stack = random_stack((4, 3, 5), 30, 25)
        weights = [0.5, -1.0, 2.0]
        found = merged("tc_lora", stack, weights=weights, cp_rank=6, n_starts=2)
        parts = model(cp_als(stack, 6, n_starts=2, seed=3).factors)
        assert isinstance(found.delta, Factors) and found.delta.rank == 6
        want = sum(w * p for w, p in zip(weights, parts, strict=True))
        assert relative(found.delta.dense(), want) < 1e-9  # type: ignore[arg-type]
        assert found.report["fit"] == pytest.approx(1.0 - relative(parts, dense(stack)), abs=1e-8)
        assert relative(delta("tc_lora", stack, cp_rank=6, n_starts=2), parts.mean(0)) < 1e-9

    def test_exact_stacks_give_the_mean_and_default_rank_is_the_largest(self) -> None:
        stack, _ = planted_stack(5, 30, 25, 4)
        assert relative(delta("tc_lora", stack), dense(stack).mean(0)) < 1e-6
        mixed = random_stack((2, 5, 3), 30, 25)
        found = merged("tc_lora", mixed).delta
        assert isinstance(found, Factors) and found.rank == 5

    def test_copies_return_the_adapter_and_order_does_not_matter(self) -> None:
        one = random_stack((3,), 30, 25)[0]
        assert relative(delta("tc_lora", [one] * 4), one[0] @ one[1]) < 1e-6
        stack, _ = planted_stack(4, 30, 25, 3)
        assert relative(delta("tc_lora", stack[::-1]), delta("tc_lora", stack)) < 1e-6

    def test_shared_min_keeps_terms_of_several_tasks(self) -> None:
        """Three shared terms and one that a single task uses."""
        g = torch.Generator().manual_seed(0)
        c = torch.cat([torch.ones(4, 2), torch.eye(4)[:, :1] * 3.0], 1).double()
        u, v = (torch.linalg.qr(torch.randn(n, 3, generator=g, dtype=torch.float64))[0] for n in (20, 15))
        stack = [(u * c[t], v.T.contiguous()) for t in range(4)]
        found = merged("tc_lora", stack, cp_rank=3, shared_min=0.9)
        assert found.report["terms"] == 2
        want = u[:, :2] @ v[:, :2].T
        assert isinstance(found.delta, Factors) and relative(found.delta.dense(), want) < 1e-5

    def test_factor_form(self) -> None:
        """Dialect code: task means of the fits of the A_t and of the B_t, multiplied."""
        stack = random_stack((4, 4, 4), 20, 15)
        eye = torch.eye(4, dtype=torch.float64)
        a = model(cp_als([(eye, x) for _, x in stack], 2, seed=3).factors).mean(0)
        b = model(cp_als([(x, eye) for x, _ in stack], 2, seed=3).factors).mean(0)
        assert relative(delta("tc_lora", stack, dialect="code", cp_rank=2), b @ a) < 1e-9
        with pytest.raises(MergeError, match="stacks factors of equal rank"):
            delta("tc_lora", random_stack((4, 3), 20, 15), dialect="code")
        with pytest.raises(MergeError, match="shared_min chooses among terms"):
            delta("tc_lora", stack, dialect="code", shared_min=0.5)

    def test_zero_one_and_strict(self) -> None:
        stack = random_stack((4, 3), 20, 15)
        assert delta("tc_lora", [empty(stack)] * 2).abs().max() == 0.0
        one = delta("tc_lora", [stack[0]], cp_rank=2)
        left, s, right = torch.linalg.svd(stack[0][0] @ stack[0][1])
        assert relative(one, (left[:, :2] * s[:2]) @ right[:2]) < 1e-5
        with pytest.raises(MergeError, match="no convergence"):
            delta("tc_lora", stack, max_iter=2, tol=0.0, strict=True)


class TestFrames:
    @pytest.mark.parametrize("norm_share", [0.0, 0.5, 1.0])
    def test_compress_then_merge_is_its_formula(self, norm_share: float) -> None:
        """Tucker of the adjusted updates in dense form; the cores are those of the updates as they are."""
        stack = random_stack((4, 4, 4), 20, 15)
        stack[1] = (stack[1][0] * 5.0, stack[1][1])
        x = dense(stack)
        norms = x.flatten(1).norm(dim=1)
        factor = (norm_share * norms + (1.0 - norm_share) * norms.mean()) / norms
        adjusted = [(b * f, a) for (b, a), f in zip(stack, factor, strict=True)]
        fit = tucker(adjusted, 4, max_iter=1000, tol=1e-6)
        left, right = fit.u @ fit.u.T, fit.v @ fit.v.T
        weights = [0.5, 1.0, -2.0]
        want = sum(w * (left @ d @ right) for w, d in zip(weights, x, strict=True))
        found = merged("compress_then_merge", stack, weights=weights, norm_share=norm_share)
        assert isinstance(found.delta, Factors) and found.delta.rank == 4
        assert relative(found.delta.dense(), want) < 1e-6  # type: ignore[arg-type]

    def test_a_frame_of_full_rank_loses_nothing(self) -> None:
        stack = random_stack((2, 3), 20, 15)
        assert relative(delta("compress_then_merge", stack, frame_rank=5), dense(stack).sum(0)) < 1e-10
        assert relative(delta("tucker_merge", stack, energy_share=0.999999), dense(stack).sum(0)) < 1e-2
        ties = delta("compress_then_merge", [stack[0]] * 3, inner="ties", density=1.0)
        assert relative(ties, dense(stack)[0]) < 1e-10

    @pytest.mark.parametrize("method", ["compress_then_merge", "tucker_merge"])
    def test_matrix_methods_on_the_cores(self, method: str) -> None:
        """A frame that holds everything: iso_c of the cores is the polar factor of the weighted sum, at one strength;
        tsv_m keeps the sum of adapters that have no directions in common."""
        g = torch.Generator().manual_seed(5)
        left, right = (torch.linalg.qr(torch.randn(n, 6, generator=g, dtype=torch.float64))[0] for n in (30, 25))
        s = torch.tensor([3.0, 2.0], dtype=torch.float64)
        stack = [(left[:, i : i + 2] * s, right[:, i : i + 2].T.contiguous()) for i in (0, 2, 4)]
        frame: dict[str, Any] = {"frame_rank": 6} if method == "compress_then_merge" else {"energy_share": 0.999999}
        weights = [1.0, -0.5, 2.0]
        whole = sum(w * d for w, d in zip(weights, dense(stack), strict=True))
        found = delta(method, stack, inner="iso_c", weights=weights, **frame)
        u, sigma, vh = torch.linalg.svd(whole, full_matrices=False)  # type: ignore[arg-type]
        assert relative(found, sigma[:6].mean() * (u[:, :6] @ vh[:6])) < 1e-5
        assert relative(delta(method, stack, inner="tsv_m", weights=weights, **frame), whole) < 1e-5  # type: ignore[arg-type]
        with pytest.raises(MergeError, match="inner method iso_c has no parameter 'density'"):
            delta(method, stack, inner="iso_c", density=0.5, **frame)

    def test_tucker_merge_takes_the_columns_that_hold_the_energy(self) -> None:
        stack = random_stack((4, 3, 5), 20, 15)
        found = merged("tucker_merge", stack, energy_share=0.6)
        fit = tucker(stack, 0.6, max_iter=1000)
        want = fit.u @ fit.cores.sum(0) @ fit.v.T
        assert isinstance(found.delta, Factors) and relative(found.delta.dense(), want) < 1e-6
        assert found.report["frame"] == tuple(fit.cores.shape[1:])

    def test_rotations_pass_through_any_inner_rule(self) -> None:
        stack = random_stack((3, 3, 3), 20, 15)
        q = torch.linalg.qr(random_stack((20,), 20, 5)[0][0])[0]
        options: dict[str, Any] = {"inner": "ties", "density": 0.5, "tol": 0.0, "max_iter": 300}
        want = q @ delta("compress_then_merge", stack, **options)
        turned = delta("compress_then_merge", [(q @ b, a) for b, a in stack], **options)
        # Signs of the basis follow the largest entry and may turn, which an election by sums does not notice.
        assert relative(turned, want) < 1e-4

    def test_zero_adapters_and_bad_input(self) -> None:
        stack = random_stack((3, 3), 20, 15)
        with_empty = delta("compress_then_merge", [stack[0], empty(stack), stack[1]])
        assert relative(with_empty, delta("compress_then_merge", stack)) < 1e-10
        assert delta("tucker_merge", [empty(stack)]).abs().max() == 0.0
        with pytest.raises(MergeError, match="has no parameter 'select_topk'"):
            delta("compress_then_merge", stack, select_topk=0.5)
        with pytest.raises(MergeError, match="energy_share"):
            delta("tucker_merge", stack, energy_share=0.0)


class TestLoraLego:
    def test_copies_in_any_order_sign_and_scale_give_the_adapter(self) -> None:
        b, a = random_stack((4,), 20, 15)[0]
        g = torch.Generator().manual_seed(1)
        stack = []
        for _ in range(5):
            order = torch.randperm(4, generator=g)
            scale = torch.randn(4, generator=g, dtype=torch.float64)
            stack.append(((b * scale)[:, order], (a / scale[:, None])[order]))
        assert relative(delta("lora_lego", stack), b @ a) < 1e-9

    def test_one_cluster_per_unit_is_concatenation(self) -> None:
        stack = random_stack((3, 2), 20, 15)
        whole = delta("lora_lego", stack, k=5, output="none")
        assert relative(whole, dense(stack).sum(0)) < 1e-9
        assert relative(delta("lora_lego", stack, k=5), (2.5 / 5) ** 0.5 * whole) < 1e-9
        assert relative(delta("lora_lego", stack, k=5, output="sqrt_R_k"), whole) < 1e-9

    @pytest.mark.parametrize("features", ["balanced", "raw"])
    @pytest.mark.parametrize("reweight", [True, False])
    def test_is_its_formula(self, features: str, reweight: bool) -> None:
        stack = random_stack((4, 4, 4), 20, 15)
        b = torch.cat([x for x, _ in stack], 1)
        a = torch.cat([x for _, x in stack])
        if features == "balanced":
            ratio = (a.norm(dim=1) / b.norm(dim=0)).sqrt()
            b, a = b * ratio, a / ratio[:, None]
        units = torch.cat([a, b.T], 1)
        units = units * torch.where(a.gather(1, a.abs().argmax(1)[:, None]) < 0, -1.0, 1.0).double()
        found = cluster(units, 6, seed=3)
        want = torch.zeros(20, 15, dtype=torch.float64)
        for c in range(6):
            own = units[found.labels == c]
            mu = own.mean(0)
            if reweight:
                mu = mu * own.abs().amax(1).mean() / mu.abs().max()
            want += torch.outer(mu[15:], mu[:15])
        got = delta("lora_lego", stack, k=6, features=features, reweight=reweight)
        assert relative(got, (4 / 6) ** 0.5 * want) < 1e-9

    def test_zero_units_are_dropped(self) -> None:
        stack = random_stack((3, 3), 20, 15)
        padded = [(torch.cat([b, b.new_zeros(20, 2)], 1), torch.cat([a, a[:2]])) for b, a in stack]
        found = merged("lora_lego", padded, k=3)
        assert found.report["zero_units"] == 4 and found.report["units"] == 6
        same = merged("lora_lego", stack, k=3, output="none").delta
        assert isinstance(found.delta, Factors) and isinstance(same, Factors)
        assert relative(found.delta.dense(), (5 / 3) ** 0.5 * same.dense()) < 1e-9
        assert delta("lora_lego", [empty(stack)] * 2).abs().max() == 0.0

    @pytest.mark.parametrize("features", ["balanced", "unit"])
    @pytest.mark.parametrize("power", [-25, 25])
    def test_units_whose_squares_leave_float32(self, features: str, power: int) -> None:
        stack = [(b.float(), a.float()) for b, a in random_stack((3, 3), 20, 15)]
        want = delta("lora_lego", stack, k=4, features=features)
        found = merged("lora_lego", [(b * 10.0**power, a) for b, a in stack], k=4, features=features)
        assert found.report["zero_units"] == 0 and isinstance(found.delta, Factors)
        assert relative(found.delta.b.double() @ found.delta.a.double() / 10.0**power, want) < 1e-6


@pytest.mark.parametrize("method", ["tc_lora", "compress_then_merge", "tucker_merge", "lora_lego"])
def test_whole_adapters(method: str, tmp_path: Any) -> None:
    """Through merge_adapters: mixed module sets, files, the same result again."""
    g = torch.Generator().manual_seed(0)

    def adapter(modules: Sequence[str], r: int) -> Any:
        tensors = {}
        for name in modules:
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, 15, generator=g)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(20, r, generator=g)
        return tensors, {"r": r, "lora_alpha": 2 * r, "peft_type": "LORA", "target_modules": list(modules)}

    adapters = [adapter(["l.0.q", "l.1.q"], 4), adapter(["l.0.q"], 4), adapter(["l.0.q", "l.1.q"], 4)]
    result = merge_adapters(adapters, method, seed=1, out=tmp_path / "out")
    again = merge_adapters(adapters, method, seed=1)
    for name in ("l.0.q", "l.1.q"):
        assert torch.equal(result.delta(name), again.delta(name))
        assert torch.isfinite(result.delta(name)).all()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert any("l.1.q" in w for w in result.report.warnings)
