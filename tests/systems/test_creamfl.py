"""CreamFL: the authors' numbers, identities, rounds, messages, failing parties, resuming, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint.systems.federated import creamfl

PARITY = np.load(Path(__file__).parents[1] / "parity" / "creamfl.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def read(case: int, dtype: torch.dtype, *names: str) -> list[Tensor]:
    found = [torch.from_numpy(PARITY[f"case{case}/in/{name}"]) for name in names]
    return [x.to(dtype) if x.is_floating_point() else x for x in found]


def need_equal(case: int, found: dict[str, Tensor], gradients: dict[str, Tensor], rtol: float) -> None:
    for name, value in found.items():
        assert float(value) == pytest.approx(float(PARITY[f"case{case}/out/{name}"]), rel=rtol), name
    for name, value in gradients.items():
        wanted = torch.from_numpy(np.asarray(PARITY[f"case{case}/grad/{name}"])).to(value.dtype)
        torch.testing.assert_close(value, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def test_the_fused_representations_equal_the_authors():
    image, text, of_image, of_text = read(
        0, torch.float32, "global_image", "global_text", "client_image", "client_text"
    )
    for name, client, other in (("image", of_image, text), ("text", of_text, image)):
        wanted = torch.from_numpy(PARITY[f"case0/out/{name}_aggregated"])
        torch.testing.assert_close(creamfl.contrastive_ensemble(client, other), wanted, rtol=1e-5, atol=1e-7)


@TYPES
def test_the_contrast_of_one_modality_equals_the_authors(dtype, rtol):
    emb, *rest = read(1, dtype, "emb_raw", "emb_old", "global_same", "global_cross", "public_index")
    found = creamfl.cream_uni(emb.requires_grad_(), *rest, weight=float(PARITY["case1/param/weight"]))
    found.loss.backward()
    outs = {"loss": found.loss, "loss_intra": found.intra, "loss_inter": found.inter}
    need_equal(1, outs, {"emb_raw": emb.grad}, rtol)


@TYPES
def test_the_contrast_of_two_modalities_equals_the_authors(dtype, rtol):
    names = ("image_emb_raw", "text_emb_raw", "image_emb_old", "text_emb_old", "global_image", "global_text")
    at = read(2, dtype, *names, "public_index")
    leaves = [x.requires_grad_() for x in at[:2]]
    found = creamfl.cream_multi(*at, weight=float(PARITY["case2/param/weight"]))
    found.loss.backward()
    outs = {"loss": found.loss, "loss_intra": found.intra, "loss_inter": found.inter}
    need_equal(2, outs, dict(zip(names, [x.grad for x in leaves], strict=False)), rtol)


@TYPES
def test_the_soft_contrast_equals_the_authors(dtype, rtol):
    names = ("image_emb_raw", "text_emb_raw", "negative_scale", "shift")
    at = read(3, dtype, *names[:2])
    at += [torch.tensor(float(PARITY[f"case3/param/{name}"]), dtype=dtype) for name in names[2:]]
    loss = creamfl.soft_contrastive(*(x.requires_grad_() for x in at))
    loss.backward()
    need_equal(3, {"loss": loss, "i2t_loss": loss / 2}, dict(zip(names, [x.grad for x in at], strict=True)), rtol)


def test_equal_parties_are_fused_to_their_vector_and_shares_sum_to_one():
    rows, other = unit(draw(0, 9, 4)), unit(draw(1, 9, 4))
    torch.testing.assert_close(creamfl.contrastive_ensemble(rows.expand(3, 9, 4), other), rows)
    shares = creamfl.ensemble_weights(unit(draw(2, 5, 9, 4)), other)
    torch.testing.assert_close(shares.sum(0), torch.ones(9, dtype=torch.float64))
    alone = unit(draw(3, 1, 9, 4))
    torch.testing.assert_close(creamfl.contrastive_ensemble(alone, other), alone[0])


def test_an_orthogonal_embedding_has_the_losses_of_chance():
    z, rows = torch.eye(6, dtype=torch.float64)[5:], torch.eye(6, dtype=torch.float64)[:4]
    found = creamfl.cream_uni(z, rows[:1], rows, rows, torch.tensor([2]))
    assert found.inter.item() == pytest.approx(np.log(4))
    assert found.intra.item() == pytest.approx(np.log(2))
    same = unit(draw(0, 4, 6))
    found = creamfl.cream_uni(draw(1, 4, 6), same, same, unit(draw(2, 4, 6)), torch.arange(4))
    assert found.intra.item() == pytest.approx(np.log(2))  # the old model is where the server is


def test_the_scaled_loss_counts_both_terms_alike():
    rows = [unit(draw(seed, 5, 3)) for seed in range(4)]
    found = creamfl.cream_uni(*rows, torch.arange(5), loss_scale=True)
    assert found.loss.item() == pytest.approx(found.intra.item())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: creamfl.cream_uni(x, x[:3], x, x, torch.arange(4)), "emb and emb_old must be"),
        (lambda x: creamfl.cream_uni(x, x, x[:, :2], x[:, :2], torch.arange(4)), "emb must be .n, dim"),
        (lambda x: creamfl.cream_uni(x, x, x, x, torch.arange(1, 5)), "public_index must lie in 0..3"),
        (lambda x: creamfl.cream_uni(x, x, x, x, torch.arange(4), temperature=0.0), "temperature must be positive"),
        (lambda x: creamfl.contrastive_ensemble(x, x), "client must be"),
        (lambda x: creamfl.contrastive_ensemble(x[None][:0], x), "empty batch"),
        (lambda x: creamfl.soft_contrastive(x, x[:2]), "image_emb and text_emb must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(unit(draw(0, 4, 3)))
