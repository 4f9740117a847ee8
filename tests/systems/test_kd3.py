"""KD3: the authors' numbers, identities, selection, networks, teachers, training, resuming, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.systems.distillation import kd3

PARITY = np.load(Path(__file__).parents[1] / "parity" / "kd3.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def case(number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arrays of a case, floating ones in this type."""
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=rtol * float(theirs.abs().max()))


@TYPES
def test_the_selection_equals_the_authors(dtype, rtol):
    at = case(0, dtype)
    mask = fn.dynamic_selection(
        at["in/teacher_logits"], at["in/student_logits"], float(at["param/alpha"]), float(at["param/cutoff"])
    )
    assert mask.tolist() == at["out/selected"].bool().tolist()


@TYPES
def test_both_losses_and_their_gradients_equal_the_authors(dtype, rtol):
    at = case(1, dtype)
    feature = at["in/feat_student"].clone().requires_grad_()
    logits = at["in/logit_student"], at["in/logit_teacher"]
    close(fn.disagreement_weights(*logits), at["out/weights"], rtol)
    loss = fn.weighted_feature_loss(feature, at["in/feat_teacher"], *logits)
    loss.backward()
    close(loss.detach(), at["out/weighted_feature_loss"], rtol)
    close(feature.grad, at["grad/feat_student"], rtol)

    embed = kd3.Embed(8, 7).to(dtype)
    embed.load_state_dict({name: at[f"weight/embed.{name}"] for name in ("weight", "bias")})
    pair = [at[name].clone().requires_grad_() for name in ("in/pooled", "in/pooled_mixed")]
    close(embed(pair[0]).detach(), at["out/embed"], rtol)
    loss = fn.of("kd3").nt_xent(embed(pair[0]), embed(pair[1]), float(at["param/temperature"]))
    loss.backward()
    close(loss.detach(), at["out/contrastive"], rtol)
    close(pair[0].grad, at["grad/pooled"], rtol)
    close(pair[1].grad, at["grad/pooled_mixed"], rtol)


@TYPES
def test_mixed_pictures_equal_the_authors(dtype, rtol):
    at = case(2, dtype)
    mixed = fn.mix_distribution(at["in/x"], at["in/lam"], at["in/perm"], float(at["param/eps"]))
    close(mixed, at["out/mixed"], rtol)


def test_the_teacher_s_share_equals_the_authors():
    at = case(3, torch.float64)
    given = int(at["param/max_epoch"]), int(at["param/horizon"])
    found = [fn.combination_weight(int(epoch), *given) for epoch in at["in/epoch"]]
    close(torch.tensor(found, dtype=torch.float64), at["out/alpha"], 1e-9)
