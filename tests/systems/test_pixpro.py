"""PixPro: the authors' numbers, the card's identities, contrast of cells, training, resuming, errors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core.cells import near_cells
from counterpoint.core.operands import unit
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.dense import pixpro
from counterpoint.views.images import ViewPipeline, denormalise
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "pixpro.npz")
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("number", range(3))
def test_propagation_loss_and_gradients_equal_the_authors(number, dtype, rtol):
    def at(name):
        return torch.from_numpy(np.asarray(PARITY[f"case{number}/{name}"])).to(dtype)

    def close(ours, name):
        wanted = at(name)
        torch.testing.assert_close(ours.detach(), wanted, rtol=rtol, atol=rtol * max(1e-3, float(wanted.abs().max())))

    projections = [at(f"in/proj_{n}").requires_grad_() for n in (1, 2)]
    keys, coords = ([at(f"in/{name}_{n}") for n in (1, 2)] for name in ("key", "coord"))
    weights: list[Tensor] = []
    value = None
    if int(PARITY[f"case{number}/param/transform_layer"]):
        value = nn.Conv2d(projections[0].shape[1], projections[0].shape[1], 1).to(dtype)
        value.load_state_dict({"weight": at("weight/value_weight"), "bias": at("weight/value_bias")})
        weights = [value.weight, value.bias]
    settings = float(at("param/p")), float(at("param/clamp"))
    for n, x in enumerate(projections, start=1):
        close(fn.pixel_propagation(x, value, *settings), f"out/prop_{n}")
    loss = fn.pixpro_loss(*projections, *keys, *coords, value, *settings, float(at("param/pos_ratio")))
    loss.backward()
    close(loss, "out/loss")
    for n, x in enumerate(projections, start=1):
        close(x.grad, f"grad/proj_{n}")
    if value is not None:
        close(weights[0].grad, "grad/value_weight")
        close(weights[1].grad, "grad/value_bias")
        named = {"value_weight": at("weight/value_weight"), "value_bias": at("weight/value_bias")}
        close(fn.pixel_propagation(projections[0], named, *settings), "out/prop_1")


# ------------------------------------------------------------------------------------------------------------ identities


def test_loss_is_minus_four_where_every_cell_agrees_with_its_own():
    x = draw(0, 1, 6, 3, 3)
    prop = fn.pixel_propagation(x)
    found = fn.pixpro_loss(x, x, prop, 3 * prop, WHOLE, WHOLE, pos_ratio=0.2)
    torch.testing.assert_close(found, torch.tensor(-4.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_loss_with_a_large_reach_is_the_mean_over_all_pairs():
    one, two, key_1, key_2 = (draw(n, 2, 4, 3, 2) for n in range(4))
    coords = WHOLE.expand(2, 4)
    found = fn.pixpro_loss(one, two, key_1, key_2, coords, coords, pos_ratio=50.0)
    wanted = 0.0
    for x, key in ((one, key_2), (two, key_1)):
        rows, keys = (unit(y.flatten(2).mT) for y in (fn.pixel_propagation(x), key))
        wanted = wanted - 2 * (rows @ keys.mT).sum((1, 2)) / (36 + 1e-6)
    torch.testing.assert_close(found, wanted.mean())


def test_pictures_whose_crops_do_not_meet_count_as_zero_without_gradient():
    x = draw(0, 2, 4, 3, 3).requires_grad_()
    apart = torch.tensor([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    both = fn.pixpro_loss(x, x, draw(1, 2, 4, 3, 3), draw(2, 2, 4, 3, 3), WHOLE.float().expand(2, 4), apart)
    both.backward()
    assert torch.isfinite(both)
    assert x.grad[1].abs().sum() == 0
    assert x.grad[0].abs().sum() > 0


def test_a_flipped_crop_matches_the_mirrored_cells():
    x = draw(0, 1, 5, 2, 4)
    flipped = WHOLE[:, [2, 1, 0, 3]]
    plain = fn.pixpro_loss(x, x, x, x, WHOLE, WHOLE)
    torch.testing.assert_close(fn.pixpro_loss(x, x.flip(3), x, x.flip(3), WHOLE, flipped), plain)


def test_propagation_of_one_cell_keeps_its_direction():
    x = draw(0, 2, 4, 1, 1)
    torch.testing.assert_close(fn.pixel_propagation(x), unit(x.flatten(1)).view_as(x))


def test_equal_cells_and_zero_cells_give_finite_losses_and_gradients():
    for x in (torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)):
        x = x.clone().requires_grad_()
        loss = fn.pixpro_loss(x, x, x, x, WHOLE.float(), WHOLE.float(), p=0.5)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()


def test_cells_predicted_elsewhere_have_the_same_loss_as_propagated_ones():
    one, two, key_1, key_2 = (draw(n, 2, 4, 3, 3) for n in range(4))
    coords = torch.tensor([[0.1, 0.0, 0.8, 0.7], [0.9, 0.3, 0.2, 1.0]]), torch.tensor([[0.0, 0.2, 0.6, 0.9]] * 2)
    wanted = fn.pixpro_loss(one, two, key_1, key_2, *coords)
    predicted = fn.pixel_propagation(one), fn.pixel_propagation(two)
    torch.testing.assert_close(fn.pixel_regression(*predicted, key_1, key_2, *coords), wanted)


@pytest.mark.parametrize("few", [2**25, 0], ids=["whole", "kernel"])
def test_contrast_of_cells_equals_the_formula(few, monkeypatch):
    monkeypatch.setattr("counterpoint.core.cells.FEW", few)
    one, two, key_1, key_2 = (draw(n, 3, 4, 3, 3) for n in range(4))
    first = torch.tensor([[0.0, 0.0, 0.6, 0.6], [0.9, 0.3, 0.2, 1.0], [0.0, 0.0, 0.3, 0.3]], dtype=torch.float64)
    second = torch.tensor([[0.1, 0.2, 0.6, 0.9]] * 2 + [[0.6, 0.6, 1.0, 1.0]], dtype=torch.float64)
    one.requires_grad_()
    found = fn.pix_contrast(one, two, key_1, key_2, first, second, temperature=0.2)
    wanted = torch.zeros(3, dtype=torch.float64)
    for x, key, a, b in ((one, key_2, first, second), (two, key_1, second, first)):
        s = unit(x.flatten(2).mT) @ unit(key.flatten(2).mT).mT / 0.2
        pairs = near_cells(a, b, (3, 3), 0.7)
        near = torch.zeros_like(s, dtype=torch.bool)
        near.view(-1, 9)[pairs.first, pairs.second % 9] = True
        for n in range(3):
            terms = [s[n, i].logsumexp(0) - s[n, i, near[n, i]].logsumexp(0) for i in range(9) if near[n, i].any()]
            if terms:
                wanted[n] = wanted[n] + torch.stack(terms).mean() / 2
    assert wanted[2] == 0
    torch.testing.assert_close(found, wanted.mean())
    ours, theirs = (torch.autograd.grad(loss, one, retain_graph=True)[0] for loss in (found, wanted.mean()))
    torch.testing.assert_close(ours, theirs)


def maps(**changed):
    found = {name: draw(n, 2, 4, 3, 3) for n, name in enumerate(("proj_1", "proj_2", "key_1", "key_2"))}
    return found | {"coord_1": WHOLE.expand(2, 4), "coord_2": WHOLE.expand(2, 4)} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key_1": draw(0, 2, 4, 3, 2)}, "maps must be"),
        ({"proj_1": draw(0, 2, 4, 9)}, "maps must be"),
        ({"coord_1": WHOLE}, "coordinates must be"),
        ({"pos_ratio": 0.0}, "pos_ratio must be positive"),
        ({"p": 0.0}, "p must be positive"),
        ({"p": 1.5, "clamp": -0.5}, "clamp must be"),
        ({"clamp": 1.5}, "clamp must be"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        fn.pixpro_loss(**maps(**changed))


def test_an_empty_batch_is_named():
    none = {name: value[:0] for name, value in maps().items()}
    with pytest.raises(ValueError, match="empty batch"):
        fn.pixpro_loss(**none)


# --------------------------------------------------------------------------------------------------------------- learner

DATA = "shapes?train=48&test=16"
SMALL = {
    "encoder": "conv-cells", "hidden": 16, "projection": 8, "batch_size": 16, "epochs": 2, "evaluate_every": 2,
    "warmup_epochs": 0, "bank": 48,
}  # fmt: skip


def built(data: str = DATA, seed: int = 0, **overrides):
    """Build a learner with its task."""
    experiment = Experiment.resolve("pixpro", data, overrides=SMALL | overrides)
    task = experiment.task()
    return load_system("pixpro").learner(experiment.config, SimpleNamespace(**task.facts), seed), task


def test_a_step_trains_with_the_public_loss_and_the_places_of_the_crops(monkeypatch):
    learner, task = built(epochs=1)
    calls = []
    function = pixpro.pixpro_loss

    def call(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(pixpro, "pixpro_loss", call)
    fit(learner, task, bar=False)
    assert len(calls) == 3
    one, two, key_1, _, coord_1, coord_2, value, p, clamp, ratio = calls[0]
    assert one.shape == key_1.shape == (16, 8, 8, 8)
    assert one.requires_grad
    assert not key_1.requires_grad
    assert not torch.equal(coord_1, coord_2)
    assert value is learner.value
    assert (p, clamp, ratio) == (2.0, 0.0, 0.7)
    assert two.shape == one.shape


def test_coordinates_follow_the_crop_and_its_flip():
    learner, task = built()
    batch = next(iter(task.train_loader(0, learner.position)))
    # A picture whose red is its column and whose green is its row.
    at = torch.arange(32, dtype=torch.uint8) * 8
    batch["image"] = torch.stack([at.expand(32, 32), at[:, None].expand(32, 32), torch.zeros(32, 32).byte()]).repeat(
        16, 1, 1, 1
    )
    learner.views = ViewPipeline(32, 2, "mae")
    found = learner.prepare(batch, torch.Generator().manual_seed(0))
    for view, coords in zip(found["views"], found["coords"], strict=True):
        seen = denormalise(view) * 255 / 8 / 31  # shares of the width and height
        torch.testing.assert_close(seen[:, 0, :, 0].mean(1), coords[:, 0].clamp(0, 1), atol=0.03, rtol=0)
        torch.testing.assert_close(seen[:, 0, :, -1].mean(1), coords[:, 2], atol=0.03, rtol=0)
        torch.testing.assert_close(seen[:, 1, 0].mean(1), coords[:, 1], atol=0.03, rtol=0)
        torch.testing.assert_close(seen[:, 1, -1].mean(1), coords[:, 3], atol=0.03, rtol=0)
        flipped = coords[:, 0] > coords[:, 2]
        assert flipped.any()
        assert not flipped.all()


def test_the_teacher_moves_before_its_forward_pass_and_only_by_its_parameters(monkeypatch):
    learner, task = built(epochs=1, momentum_teacher=0.9)
    seen: list[float] = []
    update = learner.teacher.update
    monkeypatch.setattr(learner.teacher, "update", lambda net, momentum: (seen.append(momentum), update(net, momentum)))
    fit(learner, task, bar=False)
    assert seen == pytest.approx([1 - 0.1 * (math.cos(math.pi * k / 3) + 1) / 2 for k in range(3)])
    own, theirs = learner.encoder.stem[1], learner.teacher.module["encoder"].stem[1]
    assert not torch.equal(own.running_mean, theirs.running_mean)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "pixcontrast"},
        {"propagation": "predictor", "value_layers": 0},
        {"propagation": "none"},
        {"value_layers": 2, "gamma": 1.0, "instance_weight": 1.0},
        {"pixel_weight": 0.0, "instance_weight": 1.0},
        {"encoder": "vit-s"},
    ],
)
def test_options_train(settings):
    learner, task = built("shapes?train=32&test=8", epochs=1, **settings)
    (row,) = fit(learner, task, bar=False)
    assert np.isfinite(row["train/loss"])
    assert ("train/pixel" in row) == bool(settings.get("pixel_weight", 1.0))
    assert ("train/instance" in row) == bool(settings.get("instance_weight", 0.0))
    assert 0 <= row["test/correspondence"] <= 1
    assert 0 <= row["test/cell_miou"] <= 1


def test_instance_loss_lies_in_its_range_and_reaches_the_encoder():
    learner, task = built(pixel_weight=0.0, instance_weight=1.0)
    learner.total_steps = 1
    batch = learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(0))
    loss = learner.loss(batch)["loss"]
    assert -4 <= loss.item() <= 4
    loss.backward()
    assert learner.encoder.stem[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in learner.teacher.parameters())


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch):
    settings = SMALL | {"instance_weight": 1.0}
    config = Experiment.resolve("pixpro", DATA, overrides=settings).config
    run = need_equal_ends(monkeypatch, pixpro.PixPro, "pixpro", config, DATA, 4, tmp_path)  # in the second epoch
    assert "Cells found again" in (run.path / "report.html").read_text()


@pytest.mark.usefixtures("drawn")
def test_trains_from_the_command_line_on_a_folder_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    words = ["train", "pixpro", "--data", f"imagefolder:{tmp_path / 'pictures'}?size=32", "--epochs", "1"]
    for name, value in SMALL.items():
        words += [] if name == "epochs" else [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "run"]) == 0
    learner = training.load_learner(Run.open(tmp_path / "run"))
    assert learner.predict({"image": torch.randn(4, 3, 32, 32)})["feature"].shape == (4, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "mlp-s"}, "no feature map"),
        ({"value_layers": 3}, "value_layers"),
        ({"pixel_weight": 0.0}, "both 0: nothing trains"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.5, "clamp": -0.1}, "clamp"),
        ({"momentum_teacher": 1.5}, "momentum_teacher"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CounterpointError, match=message):
        built(**settings)
