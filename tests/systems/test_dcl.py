"""DCL against the reference implementations' numbers, and the identities that tie it to NT-Xent."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import catalog
from counterpoint import functional as fn
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.rules import Diagonal
from counterpoint.errors import CounterpointError

PARITY = np.load(Path(__file__).parents[1] / "parity" / "dcl.npz")


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_reference(case: int, dtype: torch.dtype) -> None:
    at = {k.split("/", 1)[1]: PARITY[k] for k in PARITY.files if k.startswith(f"case{case}/")}
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    options = {
        "temperature": float(at["param/temperature"]),
        "weight_sigma": float(at["param/sigma"]) if at["param/weighted"] else None,
        "normalize": bool(at["param/normalise_inputs"]),
        "detach_weight": bool(at["param/detach_weight"]),
    }
    z1, z2 = (torch.tensor(at[f"in/{n}"], dtype=dtype, requires_grad=True) for n in ("z1", "z2"))
    if "out/loss" in at:
        loss = fn.dcl(z1, z2, **options)
        wanted, gradients = at["out/loss"], (at["grad/z1"], at["grad/z2"])
    else:
        loss = fn.dcl(z1, z2, symmetric=False, **options)
        wanted, gradients = at["out/loss_12"], (at["grad/loss_12_z1"], at["grad/loss_12_z2"])
        other = fn.dcl(z2, z1, symmetric=False, **options)
        np.testing.assert_allclose(other.item(), at["out/loss_21"], rtol=rtol)
    np.testing.assert_allclose(loss.item(), wanted, rtol=rtol)
    for z, gradient in zip((z1, z2), gradients, strict=True):
        (found,) = torch.autograd.grad(loss, z, retain_graph=True)
        np.testing.assert_allclose(found.numpy(), gradient, rtol=rtol, atol=1e-7 if dtype == torch.float32 else 1e-12)


def _pairs(n: int, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    z1, z2 = (F.normalize(torch.randn(n, dim, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    return z1, F.normalize(z1 + 0.5 * z2, dim=1)


def test_nt_xent_is_dcl_minus_log_q() -> None:
    z1, z2 = _pairs(7)
    x = torch.cat([z1, z2]) / 0.3**0.5
    rows = pair_logsumexp(x, exclude=Diagonal((0, 7, -7)), method="plain").rows
    positive = (x * x.roll(7, 0)).sum(1)
    log_q = rows - torch.logaddexp(rows, positive)
    found = fn.of("simclr").nt_xent(z1, z2, 0.3) - fn.dcl(z1, z2, 0.3)
    torch.testing.assert_close(found, -log_q.mean())
    assert found > 0


def test_gradient_of_nt_xent_is_q_times_that_of_dcl() -> None:
    # Per anchor, with respect to its similarities: s holds the positive first.
    s = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (plain,) = torch.autograd.grad(s.logsumexp(0) - s[0], s)
    (decoupled,) = torch.autograd.grad(s[1:].logsumexp(0) - s[0], s)
    q = 1 - s.softmax(0)[0]
    torch.testing.assert_close(plain, q * decoupled)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
def test_equal_embeddings_give_log_of_the_negatives(temperature: float) -> None:
    z = torch.ones(6, 3, dtype=torch.float64)
    assert fn.dcl(z, z, temperature).item() == pytest.approx(math.log(10), rel=1e-9)


def test_weights_have_mean_one_and_may_be_negative() -> None:
    cosine = torch.tensor([1.0, -1.0, -1.0, -1.0, -1.0])
    weight = fn.dclw_weight(cosine, 0.1)
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert weight[0] < 0


def test_the_excluded_do_not_come_back_at_small_temperatures() -> None:
    z1, z2 = _pairs(4)
    assert fn.dcl(z1, z2, 0.005).isfinite()
    assert fn.dcl(z1, z2, 0.005) < fn.of("simclr").nt_xent(z1, z2, 0.005)


def test_one_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 2 pairs"):
        fn.dcl(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="z1"):
        fn.dcl(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="sigma"):
        fn.dclw_weight(torch.ones(2), 0.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_positive(temperature: float, symmetric: bool) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        fn.dcl(torch.eye(3), torch.eye(3), temperature, symmetric=symmetric)


def test_a_setting_that_is_no_number_is_refused() -> None:
    config = catalog.load_system("dcl").config
    for setting, said in (
        ({"dcl.weight_sigma": float("nan")}, "weight_sigma"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"workers": -1}, "workers"),
    ):
        with pytest.raises(CounterpointError, match=said):
            config(**setting)
    for weight, said in ((float("nan"), "weight must be finite"), (-1.0, r"hallucinator\.weight")):
        with pytest.raises(CounterpointError, match=said):
            catalog.load_system("hallucinator").config(**{"hallucinator.weight": weight})
