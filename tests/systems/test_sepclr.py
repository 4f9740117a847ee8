"""SepCLR: the authors' numbers, identities, edges, training, resuming, the probe matrix, own folders."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core import gaussian

PARITY = np.load(Path(__file__).parents[1] / "parity" / "sepclr.npz")
HEADS = ("common1", "common2", "salient1", "salient2")
WEIGHTS = ("salient_weight", "background_weight", "jem_weight", "bandwidth")
TYPES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
sepclr = fn.of("sepclr")


def of(number: int, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(PARITY[f"case{number}/{name}"]))


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    theirs = theirs.to(ours.dtype)
    torch.testing.assert_close(ours.detach(), theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


@pytest.mark.parametrize(("dtype", "rtol"), TYPES)
@pytest.mark.parametrize("number", [0, 1])
def test_loss_terms_and_gradients_equal_the_authors(number, dtype, rtol):
    heads = [of(number, f"in/{name}").to(dtype).requires_grad_() for name in HEADS]
    weights = {name: float(of(number, f"param/{name}")) for name in WEIGHTS}
    found = sepclr.sepclr_loss(*heads, of(number, "in/is_target"), **weights)
    for name, value in found.items():
        close(value, of(number, f"out/{name}"), rtol)
    for slope, name in zip(torch.autograd.grad(found["loss"], heads), HEADS, strict=True):
        close(slope, of(number, f"grad/{name}"), rtol)


@pytest.mark.parametrize(("dtype", "rtol"), TYPES)
def test_single_terms_equal_the_authors(dtype, rtol):
    x, y, s, latent, attribute, discrete = (
        of(2, f"in/{name}").to(dtype) for name in ("x", "y", "s", "latent", "attribute", "attribute_discrete")
    )
    bandwidth = float(of(2, "param/bandwidth"))
    x.requires_grad_()
    s.requires_grad_()
    close(sepclr.align(x, y, bandwidth), of(2, "out/align"), rtol)
    close(sepclr.uniform(x, bandwidth), of(2, "out/uniform"), rtol)
    close(sepclr.sup_align(latent, attribute, float(of(2, "param/attribute_bandwidth"))), of(2, "out/sup_align"), rtol)
    close(sepclr.discrete_sup_align(latent, discrete), of(2, "out/discrete_sup_align"), rtol)
    jem = sepclr.joint_entropy(x, s, bandwidth)
    close(jem, of(2, "out/jem"), rtol)
    for slope, name in zip(torch.autograd.grad(jem, (x, s)), ("x", "s"), strict=True):
        close(slope, of(2, f"grad/jem_{name}"), rtol)


# ------------------------------------------------------------------------------------------------------------- identities


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_joint_entropy_with_a_constant_space_is_that_of_the_other_space():
    c = draw(0, 9, 4)
    kernel = (-torch.cdist(c, c).square()).exp()
    torch.testing.assert_close(sepclr.joint_entropy(c, torch.zeros(9, 2).double()), kernel.mean(1).log().mean())


def test_joint_entropy_of_far_rows_is_minus_the_log_of_their_number():
    c = draw(0, 9, 4)
    far = 1e3 * torch.arange(9.0).double()[:, None]
    assert float(sepclr.joint_entropy(c, far)) == pytest.approx(-math.log(9), rel=1e-12)
    assert float(sepclr.joint_entropy(far, c)) == pytest.approx(-math.log(9), rel=1e-12)


def test_uniformity_of_orthonormal_rows_is_minus_two():
    assert float(sepclr.uniform(torch.eye(5))) == pytest.approx(-2, rel=1e-6)


@pytest.mark.parametrize("n", [40, 300])
def test_kernels_in_tiles_equal_the_matrix_in_value_and_gradient(n):
    x = draw(1, n, 3).requires_grad_()
    matrix = (-(x[:, None] - x).square().sum(2) / (2 * 0.7)).exp()
    off = ~torch.eye(n, dtype=torch.bool)
    plain = torch.stack([matrix[off].mean().log(), matrix.mean(1).log().mean()])
    ours = torch.stack([gaussian.log_mean_kernel(x, 0.7), gaussian.mean_log_density(x, 0.7)])
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=0)
    for number in (0, 1):
        one, other = (torch.autograd.grad(f[number], x, retain_graph=True)[0] for f in (ours, plain))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_supervised_alignment_in_chunks_equals_all_pairs_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(gaussian, "CHUNK", 50)
    z, y = draw(0, 20).requires_grad_(), draw(1, 20)
    i, j = torch.triu_indices(20, 20, 1)
    plain = ((-(y[i] - y[j]).square() / (2 * 0.3)).exp() * (z[i] - z[j]).square()).mean()
    ours = sepclr.sup_align(z, y, 0.3)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(f, z)[0] for f in (ours, plain)))
    (slope,) = torch.autograd.grad(sepclr.sup_align(z, y), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(slope.sum(), z)


# ------------------------------------------------------------------------------------------------------------------ edges


def heads(n: int = 6) -> list[Tensor]:
    return [draw(seed, n, width).requires_grad_() for seed, width in enumerate((4, 4, 3, 3))]


def test_batch_without_targets_has_no_salient_alignment_and_finite_gradients():
    given = heads()
    found = sepclr.sepclr_loss(*given, torch.zeros(6, dtype=torch.long))
    assert found["salient_align"].item() == 0 < found["background"].item()
    assert abs(found["salient_uniform"].item()) < 1e-12
    for slope in torch.autograd.grad(found["loss"], given):
        assert bool(slope.isfinite().all())


def test_batch_without_backgrounds_has_no_background_term():
    given = heads()
    found = sepclr.sepclr_loss(*given, torch.ones(6, dtype=torch.bool))
    assert found["background"].item() == 0
    torch.testing.assert_close(found["salient_align"], sepclr.align(given[2], given[3]))
    for slope in torch.autograd.grad(found["loss"], given):
        assert bool(slope.isfinite().all())


def test_one_picture_has_no_pairs():
    found = sepclr.sepclr_loss(*heads(1), torch.ones(1, dtype=torch.long))
    assert all(found[name].item() == 0 for name in ("common_uniform", "salient_uniform", "jem"))


def test_equal_rows_have_the_largest_terms_and_no_gradient():
    x = torch.ones(5, 3, requires_grad=True)
    total = sepclr.uniform(x) + sepclr.joint_entropy(x, x)
    assert total.item() == pytest.approx(0, abs=1e-6)
    assert float(torch.autograd.grad(total, x)[0].abs().max()) < 1e-6


def test_far_salient_rows_do_not_underflow():
    x = torch.tensor([[0.0], [100.0]], requires_grad=True)
    assert sepclr.uniform(x).item() == pytest.approx(-1e4, rel=1e-6)
    assert float(torch.autograd.grad(sepclr.uniform(x), x)[0][1, 0]) == pytest.approx(-200, rel=1e-3)


def test_backgrounds_get_no_gradient_from_uniformity_and_joint_entropy():
    given, target = heads(), torch.tensor([0, 1, 1, 0, 1, 0])
    found = sepclr.sepclr_loss(*given, target, background_weight=0.0)
    for slope in torch.autograd.grad(found["loss"], given[2:]):
        assert bool((slope[target == 0] == 0).all())
        assert bool((slope[target == 1] != 0).any())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"is_target": torch.tensor([0, 1, 2, 0, 1, 0])}, "is_target"),
        ({"is_target": torch.zeros(6)}, "is_target"),
        ({"is_target": torch.zeros(5, dtype=torch.long)}, "is_target"),
        ({"common2": draw(0, 6, 5)}, "common2"),
        ({"salient2": draw(0, 5, 3)}, "salient2"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"jem_weight": -1.0}, "jem_weight"),
        ({"uniform_weight": -1.0}, "uniform_weight"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    given = dict(zip(HEADS, heads(), strict=True)) | {"is_target": torch.tensor([0, 1, 1, 0, 1, 0])}
    with pytest.raises(ValueError, match=named):
        sepclr.sepclr_loss(**given | change)
