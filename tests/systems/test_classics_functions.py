"""The classics' functions against the numbers of their authors' code, and the identities of the card."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.core.alignment import negative_cosine, off_diagonal_squares, swapped_entropy
from counterpoint.core.assignment import sinkhorn
from counterpoint.core.distil import kd
from counterpoint.core.world import leave, over
from counterpoint.systems.classics.attention_transfer import attention_transfer
from counterpoint.systems.classics.barlow_twins import barlow
from counterpoint.systems.classics.crd import crd
from counterpoint.systems.classics.dino import dino
from counterpoint.systems.classics.fitnets import feature_mse
from counterpoint.systems.classics.mae import mae, patchify, random_masking, reconstruction, unpatchify
from counterpoint.systems.classics.mean_teacher import mean_teacher
from counterpoint.systems.classics.rkd import rkd
from counterpoint.systems.classics.swav import swav
from counterpoint.systems.classics.triplet import triplet_hard
from counterpoint.systems.classics.vicreg import vicreg

PARITY = np.load(Path(__file__).parents[1] / "parity" / "classics.npz")
FUNCTIONS = {
    f.__name__: f
    for f in (
        *(negative_cosine, barlow, vicreg, swav, dino, mae, triplet_hard),
        *(kd, rkd, attention_transfer, crd, mean_teacher),
    )
}
CASES = sorted({tuple(key.split("/")[:2]) for key in PARITY.files if key.split("/")[0] in FUNCTIONS})


def part(name, case, kind):
    prefix = f"{name}/{case}/{kind}/"
    return {
        key.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[key]))
        for key in PARITY.files
        if key.startswith(prefix)
    }


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_values_and_gradients_equal_the_authors(name, case, dtype):
    arrays = {
        key: value.to(dtype).requires_grad_() if value.is_floating_point() else value
        for key, value in part(name, case, "in").items()
    }
    parameters = {{"lambda": "lambda_"}.get(key, key): value.item() for key, value in part(name, case, "param").items()}
    out = FUNCTIONS[name](**arrays, **parameters)
    out = {"loss": out} if isinstance(out, torch.Tensor) else out._asdict()
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    expected = part(name, case, "out")
    assert set(expected) == set(out)
    for key, value in expected.items():
        torch.testing.assert_close(out[key].detach(), value.to(out[key].dtype), **close)
    gradients = part(name, case, "grad")
    if gradients:
        out["loss"].backward()
    for key, value in gradients.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(arrays[key].grad, value.to(dtype), rtol=close["rtol"], atol=close["rtol"] * scale)
    # Arguments without a gradient in the authors' numbers are teachers, targets or memories.
    unnamed = {key for key, value in arrays.items() if value.requires_grad and value.grad is not None} - set(gradients)
    assert unnamed <= {"low"}


def test_every_function_of_the_card_that_is_not_a_contrast_is_here():
    named = {key.split("/")[0] for key in PARITY.files}
    assert named - set(FUNCTIONS) == {"nt_xent", "moco", "clip", "siglip", "supcon", "supcon_single_view"}


# --------------------------------------------------------------------------------------------------- gradients, all dtypes

SCALARS = {
    "negative_cosine": (lambda x: negative_cosine(x, like(x, 5, 4)), (5, 4)),
    "barlow": (lambda x: barlow(x, like(x, 5, 4)), (5, 4)),
    "barlow_wide": (lambda x: barlow(x, like(x, 3, 8)), (3, 8)),
    "vicreg": (lambda x: vicreg(x, like(x, 5, 4)), (5, 4)),
    "vicreg_wide": (lambda x: vicreg(x, like(x, 3, 8)), (3, 8)),
    "swav": (lambda x: swav(x, like(x, 3, 5, 4)).loss, (2, 5, 4)),
    "dino": (lambda x: dino(x, like(x, 2, 3, 4), like(x, 4)).loss, (4, 3, 4)),
    "mae": (lambda x: reconstruction(like(x, 2, 3, 4, 4), x, torch.eye(2, 4), patch=2), (2, 4, 12)),
    "triplet": (lambda x: triplet_hard(x, torch.tensor([0, 0, 1, 1, 2])).loss, (5, 4)),
}


def like(x, *shape):
    return draw(*shape, seed=1).bfloat16().to(x.dtype)


@pytest.mark.parametrize("name", SCALARS)
def test_gradients_are_right(name):
    function, shape = SCALARS[name]
    if name == "swav":  # the codes are constants, so only what predicts can be differenced
        high = draw(2, 5, 4, seed=3)
        assert torch.autograd.gradcheck(lambda low: swav(high, low).loss, draw(3, 5, 4).requires_grad_())
    else:
        assert torch.autograd.gradcheck(function, draw(*shape).requires_grad_())


@pytest.mark.parametrize("name", SCALARS)
def test_half_precision_goes_in_and_its_gradient_comes_out(name):
    function, shape = SCALARS[name]
    x = draw(*shape).bfloat16().requires_grad_()
    loss = function(x)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), function(x.detach().double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCALARS)
def test_nan_is_never_a_number_again(name):
    function, shape = SCALARS[name]
    x = draw(*shape)
    x.view(-1)[0] = math.nan
    assert function(x).isnan()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: negative_cosine(draw(2, 3), draw(2, 4)), "prediction and target"),
        (lambda: negative_cosine(draw(0, 3), draw(0, 3)), "prediction is an empty batch"),
        (lambda: barlow(draw(3), draw(3)), "z1 and z2"),
        (lambda: barlow(draw(3, 2), draw(3, 2), bn_eps=0.0), "bn_eps"),
        (lambda: vicreg(draw(2, 3), draw(3, 3)), "z1 and z2"),
        (lambda: vicreg(draw(1, 3), draw(1, 3)), "two rows"),
        (lambda: swav(draw(1, 3, 2)), "at least two crops"),
        (lambda: swav(draw(2, 3, 2), draw(2, 3, 4)), "high and low"),
        (lambda: swav(draw(2, 3, 2), queue=draw(1, 3, 2)), "queue"),
        (lambda: swav(draw(2, 3, 2), temperature=0.0), "temperature"),
        (lambda: sinkhorn(draw(3, 2), epsilon=0.0), "epsilon"),
        (lambda: sinkhorn(draw(3, 2), iterations=0), "iterations"),
        (lambda: sinkhorn(draw(0, 2)), "scores"),
        (lambda: dino(draw(2, 3, 4), draw(2, 3, 4), draw(5)), "center"),
        (lambda: dino(draw(2, 3, 4), draw(2, 2, 4), draw(4)), "teacher"),
        (lambda: dino(draw(1, 3, 4), draw(1, 3, 4), draw(4)), "another"),
        (lambda: dino(draw(2, 3, 4), draw(3, 3, 4), draw(4)), "views with a target"),
        (lambda: dino(draw(2, 3, 4), draw(2, 3, 4), draw(4), center_momentum=2.0), "center_momentum"),
        (lambda: swapped_entropy(draw(1, 2, 3), draw(2, 3, 3)), "targets"),
        (lambda: patchify(draw(1, 3, 5, 4), 2), "images"),
        (lambda: unpatchify(draw(1, 6, 4), 2), "grid"),
        (lambda: unpatchify(draw(1, 4, 3), 2), "patches"),
        (lambda: random_masking(draw(1, 4, 3), draw(1, 3)), "noise"),
        (lambda: random_masking(draw(1, 4, 3), draw(1, 4), 1.0), "mask_ratio"),
        (lambda: random_masking(draw(1, 4, 3), torch.full((1, 4), math.nan)), "noise holds NaN"),
        (lambda: reconstruction(draw(1, 1, 4, 4), draw(1, 4, 3), torch.ones(1, 4), 2), "prediction"),
        (lambda: reconstruction(draw(1, 1, 4, 4), draw(1, 4, 4), torch.ones(1, 3), 2), "mask"),
        (lambda: reconstruction(draw(1, 1, 4, 4), draw(1, 4, 4), torch.zeros(1, 4), 2), "removes no patch"),
        (lambda: triplet_hard(draw(3, 2), torch.zeros(2)), "labels"),
        (lambda: triplet_hard(draw(0, 2), torch.zeros(0)), "embeddings"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, names):
    with pytest.raises(ValueError, match=names):
        call()


# ------------------------------------------------------------------------------------------------- identities and edges


def test_two_directions_of_the_cosine_are_byols_squared_distance():
    p, z = draw(4, 3), draw(4, 3, seed=1)
    distance = (F.normalize(p) - F.normalize(z)).square().sum(1).mean()
    torch.testing.assert_close(2 + 2 * negative_cosine(p, z), distance)
    assert negative_cosine(torch.zeros(2, 3), torch.ones(2, 3)) == 0


@pytest.mark.parametrize(("n", "dim"), [(1, 1), (3, 8), (6, 8), (6, 1), (4, 8)])
def test_off_diagonal_energy_is_that_of_the_matrix(n, dim):
    a, b = draw(n, dim), draw(n, dim, seed=1)
    c = a.T @ b
    torch.testing.assert_close(off_diagonal_squares(a, b), c.square().sum() - c.diagonal().square().sum())


@pytest.mark.parametrize(("n", "dim"), [(1, 5), (4, 5), (4, 20)])
def test_equal_embeddings_decorrelate_to_nothing(n, dim):
    same = torch.ones(n, dim, requires_grad=True)
    loss = barlow(same, same)
    loss.backward()
    assert loss.item() == pytest.approx(dim)
    assert same.grad.isfinite().all()
    if n > 1:
        assert vicreg(same, same, sim=0, cov=0, std=1).item() == pytest.approx(1 - 0.01)


def test_decorrelated_views_cost_nothing():
    # Columns of a Hadamard matrix without the constant one: centred, of variance 1, orthogonal.
    z = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], dtype=torch.float64)
    assert barlow(z, z, bn_eps=1e-30).item() == pytest.approx(0, abs=1e-20)
    assert vicreg(z, z).item() == pytest.approx(0, abs=1e-20)


def published_sinkhorn(scores, epsilon, iterations):
    q = torch.exp(scores / epsilon).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 6), st.sampled_from([0.02, 0.05, 0.5]))
def test_sinkhorn_is_the_published_loop(n, prototypes, iterations, epsilon):
    scores = torch.tanh(draw(n, prototypes, seed=n * 100 + prototypes))
    codes = sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(codes, published_sinkhorn(scores, epsilon, iterations), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(codes.sum(1), torch.ones(n, dtype=torch.float64))


def test_sinkhorn_on_logarithms_where_the_exponential_ends():
    scores = torch.tanh(draw(6, 4))
    expected = published_sinkhorn(scores, 0.01, 3)
    torch.testing.assert_close(sinkhorn(scores.float(), 0.01).double(), expected, rtol=1e-4, atol=1e-6)
    for size in (1e3, 1e30):
        codes = sinkhorn(size * scores.float(), 0.05)
        assert codes.isfinite().all()
        torch.testing.assert_close(codes.sum(1), torch.ones(6))
    assert sinkhorn(torch.full((2, 2), math.nan)).isnan().all()


def test_sinkhorn_shares_the_samples_evenly_and_crops_do_not_meet():
    scores = torch.tanh(draw(2, 40, 4))
    both = sinkhorn(scores, 0.1, 200)
    torch.testing.assert_close(both.sum(1), torch.full((2, 4), 10.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both[1], sinkhorn(scores[1], 0.1, 200))


def test_swav_uses_a_queue_for_codes_only():
    high, queue = torch.tanh(draw(2, 3, 4)), torch.tanh(draw(2, 9, 4, seed=1))
    assert torch.equal(swav(high[:, :1]).codes_first_crop, torch.full((1, 4), 0.25, dtype=torch.float64))
    expected = sinkhorn(torch.cat([high, queue], 1)[0])[:3]
    torch.testing.assert_close(swav(high, queue=queue).codes_first_crop, expected)


def test_swapped_entropy_is_its_pairs():
    targets, logits = F.softmax(draw(2, 3, 5), -1), draw(4, 3, 5, seed=1)
    pairs = [F.cross_entropy(logits[w], targets[v]) for v in range(2) for w in range(4) if v != w]
    torch.testing.assert_close(swapped_entropy(targets, logits), torch.stack(pairs).mean())
    torch.testing.assert_close(swapped_entropy(targets, logits[:2], logits[2:]), torch.stack(pairs).mean())


def test_dino_centre_moves_towards_the_teachers_mean_and_confident_logits_stay_finite():
    student, teacher, center = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(4, seed=2)
    out = dino(student, teacher, center, center_momentum=0.0)
    torch.testing.assert_close(out.center_after, teacher.mean((0, 1)))
    assert torch.equal(dino(student, teacher, center, center_momentum=1.0).center_after, center)
    assert dino(1e4 * student.float(), 1e4 * teacher.float(), center.float()).loss.isfinite()


def test_patches_are_cut_and_put_back():
    images = draw(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert torch.equal(patches[1, 4].reshape(4, 4, 3), images[1, :, 4:8, 4:8].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)


def test_masking_keeps_the_lowest_noise_in_order():
    tokens, noise = draw(3, 10, 4), torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    out = random_masking(tokens, noise, 0.7)
    kept = noise.argsort(1)[:, : int(10 * (1 - 0.7))]
    assert torch.equal(out.visible, torch.stack([t[k] for t, k in zip(tokens, kept, strict=True)]))
    assert torch.equal(out.mask.gather(1, kept), torch.zeros_like(kept, dtype=out.mask.dtype))
    removed = out.mask.sum(1)
    assert removed.tolist() == [10 - kept.shape[1]] * 3
    # Visible tokens, then fillers, come back to their places.
    filled = torch.cat([out.visible, tokens.new_zeros(3, int(removed[0]), 4)], 1)
    restored = filled.gather(1, out.ids_restore[..., None].expand(-1, -1, 4))
    assert torch.equal(restored, tokens * (1 - out.mask)[..., None])
    assert torch.equal(random_masking(tokens, torch.zeros(3, 10), 0.5).visible, tokens[:, :5])


def test_reconstruction_looks_at_removed_patches_only():
    images, prediction = draw(2, 1, 4, 4), draw(2, 4, 4, seed=1)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.float64)
    error = (prediction - patchify(images, 2)).square().mean(2)
    torch.testing.assert_close(reconstruction(images, prediction, mask, 2, False), error[mask > 0].mean())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.floats(0.0, 1.0))
def test_triplets_are_the_hardest(n, classes, margin):
    x, labels = F.normalize(draw(n, 3, seed=n)), torch.arange(n) * 7 % classes
    distance = (x[:, None] - x).norm(dim=2)
    losses, anchors = [], []
    for i in range(n):
        positive = (labels == labels[i]) & (torch.arange(n) != i)
        negative = labels != labels[i]
        if positive.any() and negative.any():
            anchors.append(i)
            losses.append(torch.relu(distance[i][positive].max() - distance[i][negative].min() + margin))
    violated = [loss for loss in losses if loss > 0]
    out = triplet_hard(3 * x, labels, margin)
    assert out.anchors.tolist() == anchors
    expected = torch.stack(violated).mean() if violated else torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-7)


def test_triplets_of_equal_points_have_a_gradient():
    x = torch.ones(4, 3, requires_grad=True)
    loss = triplet_hard(x, torch.tensor([0, 0, 1, 1]), margin=0.2).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.2)
    assert (x.grad == 0).all()
    alone = triplet_hard(x, torch.zeros(4, dtype=torch.long))
    alone.loss.backward()
    assert alone.loss == 0
    assert len(alone.anchors) == 0


# ------------------------------------------------------------------------------------------------------- over processes

WHOLE = {
    "negative_cosine": (negative_cosine, ((7, 4), (7, 4))),
    "barlow": (barlow, ((7, 4), (7, 4))),
    "vicreg": (vicreg, ((7, 4), (7, 4))),
    "swav": (lambda a, b: swav(a.transpose(0, 1), b.transpose(0, 1)), ((7, 2, 4), (7, 3, 4))),
    "dino": (lambda a, b: dino(a.transpose(0, 1), b.transpose(0, 1), torch.zeros(5).double()), ((7, 4, 5), (7, 2, 5))),
    "mae": (lambda a, b: mae(a, b, (a - 0.1).flatten(1)[:, :4], b, patch=2), ((7, 1, 4, 4), (7, 4, 4))),
    "triplet": (lambda a, b: triplet_hard(a, b[:, 0].gt(0).long()), ((7, 4), (7, 1))),
    "kd": (kd, ((7, 4), (7, 4))),
    "feature_mse": (feature_mse, ((7, 4, 2), (7, 4, 2))),
    "attention": (attention_transfer, ((7, 2, 4, 4), (7, 3, 2, 2))),
    "rkd": (rkd, ((7, 4), (7, 3))),
    "mean_teacher": (mean_teacher, ((7, 4), (7, 4))),
}


def _run(name, rows, share=slice(None)):
    function, shapes = WHOLE[name]
    x, y = (draw(*shape, seed=seed)[:rows][share].requires_grad_() for seed, shape in enumerate(shapes))
    out = function(x, y)
    loss_of(out).backward()
    gradients = [z.grad for z in (x, y) if z.grad is not None]
    return loss_of(out).detach(), gradients, [out.center_after] if name == "dino" else []


def _process(rank, size, folder, rows):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    with over("world"):
        torch.save({name: _run(name, rows, slice(rank, None, size)) for name in WHOLE}, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.parametrize("rows", [7, 2])  # uneven shares, and one process without any
def test_processes_together_have_the_loss_and_the_gradients_of_one(tmp_path, rows):
    size = 3
    mp.start_processes(_process, (size, str(tmp_path), rows), nprocs=size, start_method="forkserver")
    for rank in range(size):
        for name, (loss, gradients, center) in torch.load(tmp_path / f"{rank}.pt").items():
            whole, whole_gradients, whole_center = _run(name, rows)
            found = [loss, *(gradient / size for gradient in gradients), *center]
            expected = [whole, *(gradient[rank::size] for gradient in whole_gradients), *whole_center]
            torch.testing.assert_close(
                found, expected, rtol=1e-9, atol=1e-12, msg=lambda message, name=name: f"{name}: {message}"
            )
