"""TeminAL: the ancestor's numbers, identities of the loss, stages, ladder, composed sounds, resuming, processes, errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn

PARITY = np.load(Path(__file__).parents[1] / "parity" / "teminal.npz")
NAMES = ("audio_fwd", "audio_rev", "text_fwd", "text_rev")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int, *shape: int) -> Tensor:
    return F.normalize(draw(seed, *shape), dim=1)


# ------------------------------------------------------------------------------------------------------------- equations


@TYPES
@pytest.mark.parametrize("number", [0, 1])
def test_the_loss_both_directions_and_gradients_equal_those_of_tact(number, dtype, rtol):
    leaves = [torch.from_numpy(PARITY[f"case{number}/in/{name}"]).to(dtype).requires_grad_() for name in NAMES]
    alphas = [float(PARITY[f"case{number}/param/{name}"]) for name in ("alpha_same", "alpha_cross")]
    found = fn.temporal_nce(*leaves, *alphas)
    found.loss.backward()
    for name, value in (
        ("loss", found.loss),
        ("loss_text_anchor", found.text_anchor),
        ("loss_audio_anchor", found.audio_anchor),
    ):
        assert value.item() == pytest.approx(float(PARITY[f"case{number}/out/{name}"]), rel=rtol)
    for name, leaf in zip(NAMES, leaves, strict=True):
        wanted = torch.from_numpy(PARITY[f"case{number}/grad/{name}"]).to(dtype)
        torch.testing.assert_close(leaf.grad, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def plain(audios, texts, same, cross, scale, factors, meaning=None):
    """Compute the loss by its definition, one anchor after another."""
    n, total = len(audios[0]), torch.zeros((), dtype=torch.float64)
    a, t = torch.cat(audios), torch.cat(texts)
    for query, key in ((t, a), (a, t)):
        for i in range(len(query)):
            found = []
            for j in range(len(key)):
                weight = 1.0 if i // n == j // n else (same if i % n == j % n else cross) + 1e-8
                if meaning is None or i == j or meaning[i // n][i % n] != meaning[j // n][j % n]:
                    found.append(scale * query[i] @ key[j] + math.log(weight))
            log_z = torch.stack(found).logsumexp(0)
            total = total + factors[i // n] * (log_z - scale * query[i] @ key[i]) / (n * sum(factors))
    return total


@pytest.mark.parametrize("n", [1, 5, 40])  # by whole matrices, and by the kernel
@pytest.mark.parametrize("masked", [False, True])
def test_three_blocks_with_weights_and_meanings_follow_the_definition(n, masked):
    audios, texts = [[unit(seed + k, n, 4).requires_grad_() for k in range(3)] for seed in (0, 10)]
    meaning = torch.stack([torch.arange(n) % 3 + 9 * k for k in range(3)]) if masked else None
    found = fn.temporal_nce(
        *(audios[0], audios[1], texts[0], texts[1], 0.5, 2.0, 6.0, audios[2], texts[2]), 0.7, 0.3, meaning
    ).loss
    wanted = plain(audios, texts, 0.5, 2.0, 6.0, (1.0, 0.7, 0.3), meaning)
    torch.testing.assert_close(found, wanted)
    leaves = audios + texts
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_weights_are_twice_clip_of_both_blocks_in_one_batch():
    a, b, x, y = (unit(seed, 6, 5) for seed in range(4))
    torch.testing.assert_close(
        fn.temporal_nce(a, b, x, y, logit_scale=5.0).loss,
        2 * fn.clip(torch.cat([a, b]), torch.cat([x, y]), math.log(5.0)),
        rtol=1e-8,
        atol=0,
    )


def test_without_weights_the_blocks_do_not_meet():
    a, b, x, y = (unit(seed, 6, 5) for seed in range(4))
    found = fn.temporal_nce(a, b, x, y, 0.0, 0.0, 2.0)
    apart = [fn.single_dual_nce(a, x, 2.0), fn.single_dual_nce(b, y, 2.0)]
    for name in ("loss", "text_anchor", "audio_anchor"):
        wanted = sum(getattr(one, name) for one in apart) / 2
        torch.testing.assert_close(getattr(found, name), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        fn.temporal_nce(a, b, x, y, 0.0, 0.0, 2.0, beta=0.0).loss, apart[0].loss, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(apart[0].loss, 2 * fn.clip(a, x, math.log(2.0)))


def test_embeddings_of_zeros_give_the_logarithm_of_the_weighted_number_of_candidates():
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    found = fn.temporal_nce(zeros, zeros, zeros, zeros, 0.5, 2.0)
    assert found.loss.item() == pytest.approx(2 * math.log(5 + 0.5 + 4 * 2), rel=1e-8)
    three = fn.temporal_nce(zeros, zeros, zeros, zeros, 0.5, 2.0, 1.0, zeros, zeros)
    assert three.loss.item() == pytest.approx(2 * math.log(5 + 2 * (0.5 + 4 * 2)), rel=1e-8)


def test_one_pair_is_contrasted_with_its_own_inverted_version():
    a, b, x, y = (unit(seed, 1, 4) for seed in range(4))
    assert fn.temporal_nce(a, b, x, y, 1.0, 0.0).loss.item() > 0
    torch.testing.assert_close(fn.temporal_nce(a, b, x, y, 1.0, 7.0).loss, fn.temporal_nce(a, b, x, y, 1.0, 0.0).loss)
    assert fn.single_dual_nce(a, x, 3.0).loss.item() == pytest.approx(0, abs=1e-12)


def test_a_row_of_the_same_meaning_is_no_negative():
    a, x = unit(0, 4, 3), unit(1, 4, 3)
    a[2], x[2] = a[0], x[0]
    alone = fn.single_dual_nce(a[[0, 1, 3]], x[[0, 1, 3]], 4.0)
    found = fn.single_dual_nce(a, x, 4.0, torch.tensor([5, 6, 5, 7]))
    by_hand = plain([a], [x], 1.0, 1.0, 4.0, (1.0,), torch.tensor([[5, 6, 5, 7]]))
    torch.testing.assert_close(found.loss, by_hand)
    assert found.loss < fn.single_dual_nce(a, x, 4.0).loss
    assert alone.loss > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: fn.temporal_nce(x, x[:3], x, x), "audio_fwd and audio_rev and text_fwd and text_rev must be"),
        (lambda x: fn.temporal_nce(x, x, x, x, audio_over=x), "audio_over and text_over belong together"),
        (lambda x: fn.temporal_nce(x, x, x, x, -1.0), "alpha_same must lie in 0"),
        (lambda x: fn.temporal_nce(x, x, x, x, 1.0, math.nan), "alpha_cross must lie in 0"),
        (lambda x: fn.temporal_nce(x, x, x, x, beta=-1.0), "beta must lie in 0"),
        (lambda x: fn.temporal_nce(x, x, x, x, logit_scale=-1.0), "logit_scale must be at least 0"),
        (lambda x: fn.temporal_nce(x, x, x, x, meaning=torch.arange(4)), r"meaning must be \[2, 4\]"),
        (lambda x: fn.single_dual_nce(x, x, 1.0, torch.arange(3)), r"meaning must be \[4\]"),
        (lambda x: fn.single_dual_nce(x[:0], x[:0]), "empty batch"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(draw(0, 4, 3))
