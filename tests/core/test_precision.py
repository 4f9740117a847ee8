"""Right values where numbers are small, large, zero or in few bits; what each function's own rule says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import counterpoint.functional as fn
from counterpoint.core.precision import fast_bf16, full_precision
from counterpoint.core.transforms import once
from counterpoint.systems.images.hard_contrastive import kept_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tau", [0.003, 0.008, 0.012, 0.05])
def test_isogclr_with_a_queue_stays_finite_at_every_temperature(tau):
    state = {name: torch.full((4,), tau if name == "tau" else 0.0) for name in ("s", "u", "tau")}
    for step in range(6):
        similarity = draw(4, 9, seed=step).tanh()
        similarity[0] = torch.tensor([-1.0, *[1.0] * 8])  # the largest exponent there is: 2 / tau
        loss, state = fn.isogclr_step(state, torch.arange(4), similarity, temperature_min=tau)
        assert loss.isfinite()
        assert all(bool(value.isfinite().all()) for value in state.values())


def test_isogclr_with_a_queue_equals_the_plain_formula_where_that_is_finite():
    state = {name: torch.full((3,), 0.1 if name == "tau" else 0.3, dtype=torch.float64) for name in ("s", "u", "tau")}
    similarity = draw(3, 9).tanh().double()
    loss, after = fn.isogclr_step(state, torch.arange(3), similarity, gamma=0.8)
    h = similarity - similarity[:, :1]
    e = (h / 0.1).exp()
    s = 0.2 * 0.3 + 0.8 * e.mean(1)
    torch.testing.assert_close(after["s"], s, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, ((e / s[:, None]) * h).mean(1).mean(), rtol=1e-12, atol=0)


def test_hardest_triplets_are_found_by_distance_also_among_rows_of_zeros():
    for seed in range(20):
        x = draw(9, 3, seed=seed)
        x[[1, 4]] = 0
        labels = torch.arange(9) % 3
        out = fn.triplet_hard(x, labels)
        distance = torch.cdist(F.normalize(x), F.normalize(x))
        same = (labels[:, None] == labels).fill_diagonal_(False)
        far = distance.masked_fill(~same, -1).amax(1)[out.anchors]
        near = distance.masked_fill(labels[:, None] == labels, 9).amin(1)[out.anchors]
        torch.testing.assert_close(distance[out.anchors, out.positives], far, atol=1e-6, rtol=0)
        torch.testing.assert_close(distance[out.anchors, out.negatives], near, atol=1e-6, rtol=0)


def test_the_gap_s_terms_of_rows_of_zeros_equal_plain_distances():
    x, y = draw(7, 3).double(), draw(7, 3, seed=1).double()
    x[[0, 3]], y[3] = 0, 0
    u, v = F.normalize(x), F.normalize(y)
    apart = ~torch.eye(7, dtype=torch.bool)

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (-2 * torch.cdist(a, b)[apart].square()).exp().mean().log()

    torch.testing.assert_close(fn.uniformity(x), mean(u, u))
    torch.testing.assert_close(fn.cross_uniformity(x, y), mean(u, v))
    terms = fn.contrastive_gap_loss(x, y, 0.1, cross_uniformity=True).terms
    torch.testing.assert_close(terms["uniformity"], (mean(u, u) + mean(v, v)) / 2)
    torch.testing.assert_close(terms["cross_uniformity"], mean(u, v))


def test_a_row_of_zeros_divides_its_gradient_by_1e_12_once():
    x = draw(5, 3).double()
    x[0] = 0
    y = draw(5, 3, seed=1).double()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(fn.contrastive_gap_loss(x, y, 0.1).loss, x)
    unit = F.normalize(x.detach()).requires_grad_()
    (arriving,) = torch.autograd.grad(fn.contrastive_gap_loss(unit, y, 0.1).loss, unit)
    assert 1e9 < float(slope[0].abs().max()) < 1e14
    assert float(arriving[0].abs().max()) == pytest.approx(float(slope[0].abs().max()), rel=1e-9)


def test_second_derivatives_of_a_row_of_zeros_are_numbers():
    x = draw(4, 3).double()
    x[0] = 0
    x.requires_grad_()
    (slope,) = torch.autograd.grad(fn.of("simclr").nt_xent(x, draw(4, 3, seed=1).double()), x, create_graph=True)
    (second,) = torch.autograd.grad(slope[1:].square().sum(), x)
    assert second.isfinite().all()


def test_a_share_of_the_negatives_is_counted_in_decimals():
    for count in (1, 3, 10, 100, 1000):
        for percent in range(1, 101):
            assert kept_of(count, percent / 100) == max(1, count * percent // 100)


def test_scales_may_be_numbers():
    a, b = (F.normalize(draw(5, 4, seed=seed)) for seed in (0, 1))
    torch.testing.assert_close(fn.clip(a, b, 2.6), fn.clip(a, b, torch.tensor(2.6)))
    torch.testing.assert_close(fn.siglip(a, b, 2.3, -10), fn.siglip(a, b, torch.tensor(2.3), torch.tensor(-10.0)))


def test_a_system_s_card_names_its_functions():
    assert fn.of("hard-contrastive").uniformity is fn.uniformity


def test_patches_of_one_value_have_no_variance():
    with pytest.raises(ValueError, match="norm_pix"):
        fn.mae(draw(1, 1, 4, 4), draw(1, 16, 3), draw(1, 16), draw(1, 16, 1), 1)


def test_gradients_come_back_in_the_type_of_the_input():
    x, y = draw(6, 4).bfloat16().requires_grad_(), draw(6, 4, seed=1).bfloat16()
    loss = fn.of("simclr").nt_xent(x, y)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_the_decorator_widens_lists_too_and_names_what_is_mixed():
    @full_precision(keep=("memory",))
    def function(rows, *, memory=None, index=None):
        return rows, memory, index

    half = torch.zeros(2, dtype=torch.float16)
    rows, memory, index = function([half, half], memory=half, index=torch.zeros(2, dtype=torch.int32))
    assert [row.dtype for row in rows] == [torch.float32] * 2
    assert memory.dtype == torch.float16
    assert index.dtype == torch.int64
    with pytest.raises(ValueError, match=r"rows must be of one floating type, got torch\.float32, torch\.float64"):
        function([half, half.double()])


def test_an_operand_used_once_refuses_a_second_derivative():
    x = torch.tensor(2.0, requires_grad=True)
    value = once(x, "this") ** 3
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    assert slope == 12
    with pytest.raises(RuntimeError, match="this has no second derivative"):
        torch.autograd.grad(slope, x)
    with pytest.raises(RuntimeError, match="this has no second derivative"):
        torch.func.grad(torch.func.grad(lambda y: once(y, "this") ** 3))(torch.tensor(2.0))


def test_vmap_over_what_decides_shapes_is_refused_in_one_sentence():
    x, labels = draw(3, 6, 4), torch.arange(6).remainder(2).expand(3, 6)
    for function in (fn.triplet_hard, fn.ntxent_by_index, fn.supcon_single_view):
        with pytest.raises(RuntimeError, match="cannot be mapped over"):
            torch.func.vmap(function)(x, labels)


def test_infinite_and_nan_temperatures_are_refused():
    a, b = draw(4, 3), draw(4, 3, seed=1)
    for bad in (math.inf, math.nan, -1.0, 0.0, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="temperature must be"):
            fn.of("simclr").nt_xent(a, b, bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_read_from_a_file_as_arrays_are_taken_as_numbers(dtype: torch.dtype) -> None:
    u, v = (F.normalize(draw(4, 3, seed=seed).to(dtype)).requires_grad_() for seed in (0, 1))
    expected = fn.affinity_mimicking_loss(u, v, 50.0, u, v, 20.0).loss
    found = fn.affinity_mimicking_loss(u, v, np.array(50.0), u, v, np.array(20.0)).loss
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    one, two = np.array(0.3), np.array("uniform")
    assert torch.equal(
        fn.dynamic_distillation_loss(u, v, 1.0, one, two).loss,
        fn.dynamic_distillation_loss(u, v, 1.0, 0.3, "uniform").loss,
    )


def test_numpy_numbers_of_few_bits_do_not_make_a_loss_of_float64_less_exact() -> None:
    a, b = (F.normalize(draw(6, 3, seed=seed)) for seed in (0, 1))
    narrow = np.float32(0.3)
    expected = fn.of("simclr").nt_xent(a, b, float(narrow))
    assert torch.equal(fn.of("simclr").nt_xent(a, b, narrow), expected)
    assert torch.equal(fn.of("simclr").nt_xent(a, b, temperature=narrow), expected)


def test_a_pytorch_that_does_not_tell_the_cpu_s_abilities_has_no_fast_bf16(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # as up to PyTorch 2.8
    fast_bf16.cache_clear()
    try:
        assert not fast_bf16()
        q = draw(4, 3).bfloat16()
        assert fn.clip(q, q, torch.tensor(1.0)).isfinite()
    finally:
        fast_bf16.cache_clear()
