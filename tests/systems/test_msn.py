"""MSN's loss against its formula, its edges, and the crops that its networks see."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from counterpoint import catalog
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.classics import msn as room
from counterpoint.systems.classics.msn import MSN, MSNConfig, msn

SMALL: dict[str, Any] = {"encoder": "mlp-s", "recipe": "dino-cifar", "batch_size": 20, "epochs": 1, "evaluate_every": 1,
                         "hidden": 16, "projection": 8, "prototypes": 6, "local_crops": 0}  # fmt: skip


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("by_view", [False, True])
def test_loss_and_gradients_equal_the_formula(by_view: bool) -> None:
    anchors, target, prototypes = rows(0, 3, 5, 4).requires_grad_(), rows(1, 5, 4), rows(2, 6, 4).requires_grad_()
    out = msn(anchors, target, prototypes, 0.2, 0.5, 0.7, by_view=by_view)
    unit, centres = F.normalize(anchors, dim=2), F.normalize(prototypes, dim=1)
    p = (unit @ centres.T / 0.2).softmax(2)
    wanted = ((F.normalize(target, dim=1) @ centres.T.detach() / 0.2).softmax(1)) ** 2
    wanted = wanted / wanted.sum(1, keepdim=True)
    cross = -(wanted * p.log()).sum(2).mean()
    means = p.mean(1) if by_view else p.mean((0, 1))[None]
    entropy = -(means * means.log()).sum(1).mean()
    plain = cross + 0.7 * (math.log(6) - entropy)
    torch.testing.assert_close(out, (plain, cross, entropy), rtol=1e-12, atol=1e-12)
    for found, expected in zip(
        torch.autograd.grad(out.loss, (anchors, prototypes), retain_graph=True),
        torch.autograd.grad(plain, (anchors, prototypes)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_two_means_differ_where_views_take_prototypes_of_their_own() -> None:
    anchors = torch.stack([torch.eye(2)[:1].expand(4, 2), torch.eye(2)[1:].expand(4, 2)])
    all_views, each = (msn(anchors, anchors[0], torch.eye(2), 0.05, by_view=by_view) for by_view in (False, True))
    assert float(all_views.mean_entropy) == pytest.approx(math.log(2), abs=1e-6)
    assert float(each.mean_entropy) == pytest.approx(0, abs=1e-4)


def test_sinkhorn_spreads_the_targets() -> None:
    anchors, target = rows(0, 1, 4, 2), torch.ones(4, 2, dtype=torch.float64)
    plain, spread = (msn(anchors, target, rows(1, 2, 2), weight=0.0, iterations=n).loss for n in (0, 3))
    p = (F.normalize(anchors[0], dim=1) @ F.normalize(rows(1, 2, 2), dim=1).T / 0.1).log_softmax(1)
    torch.testing.assert_close(spread, -p.mean(1).mean())
    assert plain != spread


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"anchors": torch.ones(3, 4)}, "anchors"),
        ({"anchors": torch.ones(0, 3, 4)}, "anchors"),
        ({"prototypes": torch.ones(5, 3)}, "prototypes"),
        ({"prototypes": torch.ones(0, 4)}, "prototypes"),
        ({"target": torch.ones(2, 4)}, "target"),
        ({"temperature": 0.0}, "temperature"),
        ({"sharpening": 0.0}, "sharpening"),
        ({"weight": -1.0}, "weight"),
        ({"iterations": -1}, "iterations"),
    ],
)
def test_a_bad_argument_is_named(change: dict[str, Any], word: str) -> None:
    good = {"anchors": torch.ones(2, 3, 4), "target": torch.ones(3, 4), "prototypes": torch.ones(5, 4)}
    with pytest.raises(ValueError, match=word):
        msn(**(good | change))


def test_bad_settings_are_refused() -> None:
    for settings, word in (
        ({"mask": 1.0}, "mask"),
        ({"momentum_teacher": 2.0}, "momentum_teacher"),
        ({"sharpening": 0.0}, "sharpening"),
        ({"entropy_weight": -1.0}, "entropy_weight"),
        ({"iterations": -1}, "iterations"),
        ({"prototypes": 0}, "prototypes"),
    ):
        with pytest.raises(CounterpointError, match=word):
            MSNConfig(**settings)


@pytest.mark.parametrize("encoder", ["mlp-s", "vit-s"])
def test_the_masked_crop_loses_the_patches_of_the_highest_noise(encoder: str) -> None:
    config = MSNConfig(**SMALL | {"encoder": encoder, "mask": 0.25})
    learner = MSN(config, SimpleNamespace(size=8, channels=3, classes=2), 0).eval()
    images = torch.rand(3, 3, 8, 8)
    noise = torch.rand(3, (8 // learner.patch) ** 2)
    lost = noise.argsort(1)[:, round(0.75 * noise.shape[1]) :]
    hidden = torch.zeros_like(noise).scatter_(1, lost, 1.0).view(3, 1, 8 // learner.patch, -1)
    hidden = hidden.repeat_interleave(learner.patch, 2).repeat_interleave(learner.patch, 3).bool()
    same, other = torch.where(hidden, 9.0, images), torch.where(hidden, images, images + 0.5)
    found = learner.masked(images, noise)
    torch.testing.assert_close(learner.masked(same, noise), found)
    assert not torch.allclose(learner.masked(other, noise), found)


def test_the_function_that_passes_is_the_function_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return msn(*args)

    monkeypatch.setattr(room, "msn", counted)
    rows = Experiment.resolve(
        "msn", "digits?size=8&train=60&held_out=0.05&valid=0.05", overrides=SMALL | {"local_crops": 1, "local_size": 8}
    ).run(0)
    assert len(calls) == 3
    anchors, target, prototypes, *_, by_view = calls[0]
    assert (anchors.shape, target.shape, prototypes.shape, by_view) == ((2, 20, 8), (20, 8), (6, 8), False)
    assert anchors.requires_grad
    assert not target.requires_grad
    assert math.isfinite(rows[-1]["train/loss"])
    assert catalog.load_system("msn").compares is catalog.load_system("swav").compares
