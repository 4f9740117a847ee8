"""The CCA layer: the authors' numbers, what the projections must satisfy, gradients, the edges, several processes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.core.cca import CCALayer, _Axes, canonical_projections
from counterpoint.core.world import leave, over

PARITY = np.load(Path(__file__).parents[1] / "parity" / "audio-sheet-retrieval.npz")
COUNTS = [9, 0, 6]


def numbers(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.asarray(PARITY[f"case2/{name}"])).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def draw(m: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw paired rows that share something in every dimension, off centre."""
    g = torch.Generator().manual_seed(seed)
    shared, a, b = torch.randn(3, m, k, generator=g, dtype=torch.float64)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64)
    return shared * torch.linspace(0.3, 3, k, dtype=torch.float64) + a + 2, (shared + b) @ mix - 1


def hinge(x: torch.Tensor, y: torch.Tensor, margin: float = 0.6) -> torch.Tensor:
    """Compute the hinge as the paper writes it, over the matrix."""
    s = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    terms = (margin - (s.diagonal()[:, None] - s)).clamp(min=0)
    return (terms - torch.diag(terms.diagonal())).sum() / (len(s) * (len(s) - 1))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_projections_loss_and_gradients_equal_the_authors(dtype, rtol):
    h1, h2 = (numbers(f"in/h_{side}_train", dtype).requires_grad_() for side in ("sheet", "audio"))
    layer = CCALayer(5, float(PARITY["case2/param/regulariser"])).to(dtype)
    x, y = layer(h1, h2)
    assert x.dtype == dtype
    close(canonical_projections(h1, h2).correlations.detach(), numbers("out/correlations_ascending"), rtol)
    close(x.square().sum(1).detach(), numbers("out/train_sq_norm_sheet"), rtol)
    close((F.normalize(x) @ F.normalize(y).T).detach(), numbers("out/train_cosine"), rtol)
    loss = hinge(x, y)
    loss.backward()
    close(loss.detach(), numbers("out/triplet_loss_margin0.6"), rtol)
    for h, side in ((h1, "sheet"), (h2, "audio")):
        close(h.grad, numbers(f"grad/h_{side}_train"), rtol)
    layer.eval()
    tested = layer(*(numbers(f"in/h_{side}_test", dtype) for side in ("sheet", "audio")))
    close(F.normalize(tested[0]) @ F.normalize(tested[1]).T, numbers("out/test_cosine"), rtol)
    close(layer.refine(h1, h2), numbers("out/refine_correlations"), rtol)


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_projections_whiten_and_pair_the_axes(k, seed):
    h1, h2 = draw(20 + k, k, seed)
    found = canonical_projections(h1, h2, 1e-3)
    c1, c2 = h1 - h1.mean(0), h2 - h2.mean(0)
    m, eye = len(h1), torch.eye(k, dtype=torch.float64)
    for c, projection in ((c1, found.u), (c2, found.v)):
        torch.testing.assert_close(projection.T @ (c.T @ c / (m - 1) + 1e-3 * eye) @ projection, eye)
    across = found.u.T @ (c1.T @ c2 / (m - 1)) @ found.v
    assert bool((across.diagonal() >= 0).all())
    torch.testing.assert_close(across, torch.diag(across.diagonal()))
    assert bool((across.diagonal().diff() >= -1e-12).all())
    torch.testing.assert_close(found.correlations, (across.diagonal().square() + 1e-3).clamp(1e-7, 1).sqrt())


def test_gradients_are_those_of_the_eigendecompositions_with_the_means_as_constants():
    h1, h2 = draw(12, 3)
    mean1, mean2 = h1.mean(0), h2.mean(0)

    def written(a, b, *, constant):
        """Compute projections by torch's own eigh, with E and F apart, as the authors write it."""
        c1, c2 = (a - mean1, b - mean2) if constant else (a - a.mean(0), b - b.mean(0))
        eye, m = torch.eye(3, dtype=torch.float64), len(a)
        s11, s22, s12 = (p.T @ q / (m - 1) + r * eye for p, q, r in ((c1, c1, 1e-3), (c2, c2, 1e-3), (c1, c2, 0.0)))
        roots = []
        for s in (s11, s22):
            values, vectors = torch.linalg.eigh(s)
            roots.append(vectors @ torch.diag(values**-0.5) @ vectors.T)
        t = roots[0] @ s12 @ roots[1]
        u = roots[0] @ torch.linalg.eigh(t @ t.T + 1e-3 * eye)[1]
        v = roots[1] @ torch.linalg.eigh(t.T @ t + 1e-3 * eye)[1]
        u = u * (u.T @ s12 @ v).diagonal().sign()
        return hinge(c1 @ u, c2 @ v)

    def gradients(function):
        rows = [h.clone().requires_grad_() for h in (h1, h2)]
        function(*rows).backward()
        return [r.grad for r in rows]

    ours = gradients(lambda a, b: hinge(*CCALayer(3).train()(a, b)))
    torch.testing.assert_close(ours, gradients(lambda a, b: written(a, b, constant=True)), rtol=1e-8, atol=1e-12)
    through = gradients(lambda a, b: written(a, b, constant=False))
    assert (ours[0] - through[0]).abs().max() > 1e-3 * ours[0].abs().max()


def test_equal_correlations_and_equal_variances_have_finite_gradients():
    # Orthogonal columns of one length in both modalities: every variance and every correlation is the same.
    rows = torch.linalg.qr(torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    rows = torch.linalg.qr(rows - rows.mean(0))[0][:, :4]
    h1, h2 = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    x, y = CCALayer(4)(h1, h2)
    (x[:, 0] * y[:, 1] + x[:, 2] ** 3).sum().backward()
    for h in (h1, h2):
        assert bool(h.grad.isfinite().all())
    # What is smooth whatever the basis has the right gradient: the sum of squared outputs does not turn with the axes.
    h1 = rows.clone().requires_grad_()
    CCALayer(4)(h1, rows)[0].square().sum().backward()
    step = 1e-5 * torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = step - step.mean(0)  # the means are constants
    value = [float(CCALayer(4)(rows + sign * step, rows)[0].detach().square().sum()) for sign in (1, -1)]
    assert float((h1.grad * step).sum()) == pytest.approx((value[0] - value[1]) / 2, rel=1e-4)


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6])
def test_close_correlations_have_exact_gradients(apart):
    g = torch.Generator().manual_seed(0)
    e, f = (torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0] for _ in range(2))
    matrix = e @ torch.diag(torch.tensor([0.3, 0.3 + apart, 0.8], dtype=torch.float64)) @ f.T
    weight, other = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)

    def gradient(decompose):
        t = matrix.clone().requires_grad_()
        e, s, f = decompose(t)
        # What does not change with the signs of the axes, which are anybody's.
        (((e * weight[0]) @ f.T * other).sum() + (s * weight[1]).sum()).backward()
        return t.grad

    def torchs(t):
        e, s, f = torch.linalg.svd(t)
        return e.flip(1), s.flip(0), f.T.flip(1)

    torch.testing.assert_close(gradient(_Axes.apply), gradient(torchs), rtol=1e-7, atol=1e-7)


def test_columns_that_are_alike_and_large_are_no_accident():
    # Of a variance so large that rounding takes the ridge away: in some of these an eigenvalue comes out below 0.
    for seed in range(5):
        h1, h2 = draw(50, 3, seed)
        rows = (1e9 * torch.cat([h1, h1[:, :1]], 1)).requires_grad_()
        x, y = CCALayer(4)(rows, 1e9 * torch.cat([h2, h1[:, 1:2]], 1))
        hinge(x, y).backward()
        for found in (x, y, rows.grad):
            assert bool(found.isfinite().all())


def test_evaluation_uses_the_last_batch_until_refined():
    layer, (h1, h2) = CCALayer(3), draw(60, 3)
    layer(h1[:10], h2[:10])
    x, _ = layer(h1[20:40], h2[20:40])
    layer.eval()
    torch.testing.assert_close(layer.first(h1[20:40]), x)
    torch.testing.assert_close(layer(h1, h2)[1], layer.second(h2))
    before = layer.u.clone()
    layer.refine(h1, h2)
    assert not torch.allclose(before, layer.u)
    torch.testing.assert_close(layer.u, canonical_projections(h1, h2).u)
    assert not layer.training
    # What is stored travels with the weights.
    other = CCALayer(3).eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.first(h1), layer.first(h1))


def test_the_input_s_scale_and_turn_do_not_matter():
    h1, h2 = draw(200, 3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    one = canonical_projections(h1, h2, 1e-9).correlations
    torch.testing.assert_close(one, canonical_projections(h1 @ turn * 7, h2 + 100, 1e-9).correlations)


def test_arguments_that_do_not_fit_raise_an_error():
    h1, h2 = draw(8, 3)
    with pytest.raises(ValueError, match="at least two rows"):
        canonical_projections(h1[:1], h2[:1])
    with pytest.raises(ValueError, match=r"h1 and h2 must be \[m, k\] alike, got h1 \[8, 3\] and h2 \[7, 3\]"):
        canonical_projections(h1, h2[:7])
    with pytest.raises(ValueError, match="regulariser must be positive, got 0"):
        canonical_projections(h1, h2, 0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        canonical_projections(h1 * torch.nan, h2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        CCALayer(0)
    with pytest.raises(ValueError, match=r"takes rows \[m, 2\], got \[8, 3\]"):
        CCALayer(2)(h1, h2)
    with pytest.raises(ValueError, match=r"takes rows \[m, 2\], got \[8, 3\]"):
        CCALayer(2).eval().first(h1)
    with pytest.raises(ValueError, match=r"takes rows \[m, 3\], got \[8, 2\]"):
        CCALayer(3)(h1, h2[:, :2])
    # Whole numbers would come back as whole numbers.
    with pytest.raises(ValueError, match=r"takes rows \[m, 3\], got \[8, 3\] torch.int64"):
        CCALayer(3)(h1.long(), h2.long())
    with pytest.warns(UserWarning, match="CCA of 3 rows in 3 dimensions fits noise"):
        found = canonical_projections(h1[:3], h2[:3])
    assert all(bool(part.isfinite().all()) for part in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canonical_projections(h1[:4], h2[:4])
    x, _ = CCALayer(3)(h1.clone().requires_grad_(), h2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        x.sum().backward(create_graph=True)
    # A constant modality has nothing to correlate.
    assert float(canonical_projections(torch.ones(9, 2), h2[:1, :2].expand(9, 2)).correlations.max()) < 0.04


def run(share=slice(None)):
    h1, h2 = (h[share].clone().requires_grad_() for h in draw(sum(COUNTS), 3))
    from counterpoint.core.distributed import gather_rows

    layer = CCALayer(3)
    x, y = layer(h1, h2)
    loss = (gather_rows(x) * gather_rows(y).roll(1, 0)).square().mean()
    loss.backward()
    return loss.detach(), h1.grad, h2.grad, layer.u


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS))
    with over("world"):
        torch.save(run(slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))), f"{folder}/{rank}.pt")
    leave()


def test_processes_together_have_the_axes_and_the_gradients_of_one(tmp_path):
    mp.start_processes(work, (str(tmp_path),), nprocs=len(COUNTS), start_method="forkserver")
    loss, *gradients, u = run()
    for rank in range(len(COUNTS)):
        found, *theirs, axes = torch.load(tmp_path / f"{rank}.pt")
        share = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
        torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(axes, u, rtol=1e-9, atol=1e-12)
        expected = [gradient[share] * len(COUNTS) for gradient in gradients]
        torch.testing.assert_close(theirs, expected, rtol=1e-8, atol=1e-12)
