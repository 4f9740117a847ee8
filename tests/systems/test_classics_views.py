"""The classics of the task `views` as learners: they train, resume, spread over processes, and do what their papers say."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from counterpoint import cli, data, training
from counterpoint.catalog import load_system
from counterpoint.encoders.images import build_image_encoder, need_size
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, task_class
from counterpoint.systems.classics.mae import patchify
from counterpoint.tasks.images import ImageBatches
from interrupted import need_equal_ends
from launch import command_over_processes

DATA = "digits?size=16&train=320&held_out=0.1&valid=0.1"
# Everything shrunk: seconds on one thread.
SMALL = {"batch_size": 32, "epochs": 3, "evaluate_every": 3, "warmup_epochs": 0, "bank": 600}
OWN = {
    "simclr": {"encoder": "conv-s", "hidden": 64, "projection": 32},
    "moco-v1": {"encoder": "conv-s", "projection": 32, "queue": 256},
    "moco-v2": {"encoder": "conv-s", "hidden": 64, "projection": 32, "queue": 256},
    "byol": {"encoder": "conv-s", "hidden": 64, "projection": 32},
    "simsiam": {"encoder": "conv-s", "hidden": 64, "projection": 64, "bottleneck": 16},
    "barlow-twins": {"encoder": "conv-s", "hidden": 64, "projection": 64},
    "vicreg": {"encoder": "conv-s", "hidden": 64, "projection": 64},
    "swav": {"encoder": "conv-s", "hidden": 64, "projection": 32, "prototypes": 32, "queue": 256, "queue_from": 1},
    "dino": {"encoder": "conv-s", "hidden": 64, "bottleneck": 32, "projection": 128, "local_crops": 2, "local_size": 8},
    "mae": {"encoder": "vit-s", "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(slug, **overrides):
    return replace(training.default_config(slug, DATA), **(SMALL | OWN[slug] | overrides))


def options(settings):
    words = []
    for name, value in settings.items():
        word = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{word}"] if isinstance(value, bool) else [f"--{word}", str(value)]
    return words


def built(slug, seed=0, **overrides):
    """Build a learner with its task and settings."""
    settings = config(slug, **overrides)
    system = load_system(slug)
    task = task_class(system)(Experiment.resolve(system, DATA).source(), settings)
    return system.learner(settings, SimpleNamespace(**task.facts), seed), task, settings


def fitted(slug, watch, **overrides):
    """Fit a learner without a run; `watch(learner)` may wrap its hooks before."""
    learner, task, settings = built(slug, **overrides)
    watch(learner)
    fit(learner, task, evaluate_every=settings.evaluate_every, bar=False)
    return learner


@pytest.mark.parametrize("slug", OWN)
def test_trains_from_the_command_line(slug, tmp_path, request):
    if slug == "mae":  # the figures of all others are SimCLR's, which other tests draw
        request.getfixturevalue("drawn")
    words = options(SMALL | OWN[slug])
    assert cli.main(["train", slug, "--data", DATA, *words, "--out", str(tmp_path), "--name", "run"]) == 0
    run = Run.open(tmp_path / "run")
    rows = run.metrics()
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    # MoCo's negatives are noise at first; DINO's first teacher says the same of every image until the centre takes it away.
    if slug not in ("moco-v1", "moco-v2", "dino"):
        assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert rows[-1]["test/knn_accuracy"] > (0.25 if slug == "mae" else 0.6)  # chance is 0.1
    learner = training.load_learner(run)
    assert not learner.training
    start = dict(built(slug)[0].encoder.named_parameters())
    assert not all(torch.equal(p, start[name]) for name, p in learner.encoder.named_parameters())
    found = learner.predict({"image": torch.randn(4, 3, 16, 16)})["feature"]
    assert found.shape == (4, learner.encoder.dim)
    assert training.evaluate(run.path, say=lambda _: None)["knn_accuracy"] == rows[-1]["test/knn_accuracy"]


@pytest.mark.parametrize("slug", OWN)
def test_defaults_are_the_paper_s_and_the_recipe_fits(slug):
    system = load_system(slug)
    paper, laptop = system.config(), training.default_config(slug, "cifar10")
    assert paper.epochs >= 100
    assert laptop.epochs <= 40
    assert asdict(paper) != asdict(laptop)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("slug", ["moco-v2", "byol", "swav", "dino"])
def test_interrupted_and_resumed_it_ends_the_same(slug, tmp_path, monkeypatch):
    settings = config(slug, epochs=2, batch_size=64)  # of 5 steps
    need_equal_ends(monkeypatch, load_system(slug).learner, slug, settings, DATA, 6, tmp_path)  # in the second epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a few pictures of the user's own, in two classes."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (place / name).mkdir()
        for number in range(24):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(place / name / f"{number}.png")
    return place


# Batch normalisation is over each process's own share, so only networks without it can agree.
@pytest.mark.slow
@pytest.mark.parametrize("slug", ["dino", "mae"])
def test_two_processes_are_as_good_as_one(slug, folder, tmp_path):
    # Plain steps: Adam would blow up the rounding of gradients that are zero but for it.
    settings = SMALL | OWN[slug] | {"encoder": "vit-s", "epochs": 2, "batch_size": 16, "optimizer": "momentum"}
    if slug == "dino":
        settings["head_norm"] = False
    words = ["train", slug, "--data", f"imagefolder:{folder}?size=16", *options(settings), "--out", str(tmp_path)]
    assert cli.main([*words, "--name", "one"]) == 0
    command_over_processes([*words, "--name", "two"], tmp_path)
    one, two = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for row, other in zip(one.metrics(), two.metrics(), strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
    theirs = two.load_weights()
    for name, value in one.load_weights().items():
        np.testing.assert_allclose(value.numpy(), theirs[name].numpy(), rtol=1e-3, atol=2e-5, err_msg=name)


# --------------------------------------------------------------------------------------------------- what the papers say


def test_byol_s_target_is_the_moving_average_and_gets_no_gradient():
    momenta = []

    def watch(learner):
        target, online, end_step = learner.teacher.module, learner.network, learner.end_step

        def checked():
            before = [p.clone() for p in target.parameters()]
            end_step()
            k, total = learner.position.step, 2 * 10
            m = 1 - (1 - 0.9) * (math.cos(math.pi * k / total) + 1) / 2
            momenta.append(m)
            assert all(p.grad is None for p in target.parameters())
            for old, new, p in zip(before, target.parameters(), online.parameters(), strict=True):
                assert p.grad is not None
                torch.testing.assert_close(new, m * old + (1 - m) * p)

        learner.end_step = checked

    fitted("byol", watch, epochs=2, momentum_teacher=0.9)
    assert len(momenta) == 20
    assert momenta[0] == pytest.approx(0.9)
    assert momenta == sorted(momenta)


def test_byol_s_loss_is_the_squared_distance_of_unit_vectors():
    learner, _, _ = built("byol")
    learner.eval()
    views = [torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)]
    unit = nn.functional.normalize
    expected = sum(
        (unit(learner.predictor(learner.network(a))) - unit(learner.teacher(b))).square().sum(1).mean()
        for a, b in (views, views[::-1])
    )
    torch.testing.assert_close(learner.loss({"views": views})["loss"], expected)


def test_simsiam_s_predictor_keeps_its_rate_and_its_projector_ends_in_a_plain_norm():
    learner, _, settings = built("simsiam", layers=3)
    learner.epochs = settings.epochs
    (turn,) = learner.turns()
    (optimizer,), (schedule,) = turn.optimizers, turn.schedules
    for _ in range(2):
        optimizer.step()
        schedule.step()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    full = settings.lr * settings.batch_size / 256
    assert {rates[id(p)] for p in learner.predictor.parameters()} == {full}
    assert [rates[id(p)] for p in learner.encoder.parameters()] == pytest.approx([full * 0.25] * 9)
    norms = [m for m in learner.projector if isinstance(m, nn.BatchNorm1d)]
    assert [m.affine for m in norms] == [True, True, False]
    assert isinstance(learner.predictor[-1], nn.Linear)


def test_swav_s_prototypes_are_unit_vectors_frozen_at_first_and_the_queue_comes_in_when_full():
    seen = []

    def watch(learner):
        start = learner.prototypes.weight.detach().clone()
        end_step, stored = learner.end_step, learner.stored

        def checked():
            end_step()
            weight = learner.prototypes.weight.detach()
            torch.testing.assert_close(weight.norm(dim=1), torch.ones(32))
            # Normalising once more moves no more than the last digit.
            assert torch.allclose(weight, start, atol=1e-6) == (learner.position.epoch == 0)

        def counted():
            found = stored()
            seen.append(None if found is None else tuple(found.shape))
            return found

        learner.end_step, learner.stored = checked, counted

    learner = fitted("swav", watch, epochs=2)
    assert seen == [None] * 10 + [(2, 256, 32)] * 10
    assert int(learner.queues[0].pointer) == 20 * 32 % 256
    assert not torch.equal(learner.queues[0].read(), learner.queues[1].read())
    assert {len(view) for view in learner.prepare(next(batches()), torch.Generator())["views"]} == {8}


def batches():
    yield ImageBatches(data.load(DATA, task="views").train)[list(range(8))]


def test_dino_s_centre_follows_its_recursion_and_its_last_layer_is_frozen_at_first():
    temperatures = []

    def watch(learner):
        start = learner.projector.last.weight.detach().clone()
        outputs = []
        learner.teacher.register_forward_hook(lambda _, __, out: outputs.append(out))
        loss, end_step = learner.loss, learner.end_step

        def checked(batch):
            before = learner.center.clone()
            found = loss(batch)
            (out,) = outputs
            outputs.clear()
            assert out.abs().max() <= 1 + 1e-6  # products of unit vectors
            torch.testing.assert_close(learner.center, 0.8 * before + 0.2 * out.mean(0))
            temperatures.append(learner.teacher_temperature())
            return found

        def stepped():
            end_step()
            assert torch.equal(learner.projector.last.weight, start) == (learner.position.epoch == 0)

        learner.loss, learner.end_step = checked, stepped

    fitted(
        "dino",
        watch,
        epochs=3,
        center_momentum=0.8,
        teacher_warmup=3,
        teacher_temperature=0.06,
        teacher_temperature_start=0.04,
    )
    assert temperatures[::10] == pytest.approx([0.04, 0.05, 0.06])


@pytest.mark.parametrize("encoder", ["conv-s", "resnet-s", "vit-s"])
def test_small_crops_enter_every_encoder(encoder):
    learner, _, _ = built("dino", encoder=encoder, local_size=0)
    batch = learner.prepare(next(batches()), torch.Generator().manual_seed(0))
    size = 8 if encoder == "vit-s" else 7  # 3/7 of 16, in whole patches of 4
    assert [view.shape[-1] for view in batch["views"]] == [16, 16, size, size]
    assert learner.loss(batch)["loss"].isfinite()


def test_an_encoder_of_one_size_is_told_so_before_training():
    class Fixed(nn.Module):
        def forward(self, images):
            return images.view(-1, 3 * 16 * 16)[:1]

    need_size(Fixed(), "fixed", 16)
    with pytest.raises(CounterpointError, match="fixed cannot take pictures of 3 x 7 x 7"):
        need_size(Fixed(), "fixed", 7)
    with pytest.raises(CounterpointError, match="vit-s cannot take pictures of 3 x 6 x 6"):
        built("dino", encoder="vit-s", local_size=6)


def test_a_vit_takes_other_sizes_and_is_the_same_at_its_own():
    torch.manual_seed(0)
    encoder = build_image_encoder("vit-s", 32).eval()
    images = torch.randn(2, 3, 32, 32)
    assert encoder(images[:, :, :16, :16]).shape == (2, encoder.dim)
    keep = torch.arange(64).expand(2, -1)
    torch.testing.assert_close(encoder.tokens(images, keep), encoder.tokens(images))


def test_mae_encodes_what_is_visible_and_is_judged_by_what_is_hidden():
    learner, _, _ = built("mae")
    batch = learner.prepare(next(batches()), torch.Generator().manual_seed(0))
    (images,) = batch["views"]
    images.requires_grad_()
    predictions = []

    def keep(_, __, out):
        out.retain_grad()
        predictions.append(out)

    learner.projector.register_forward_hook(keep)
    learner.loss(batch)["loss"].backward()
    hidden = batch["noise"].argsort(1).argsort(1) >= 4  # of 16 patches a quarter stays
    assert torch.equal(predictions[0].grad.abs().sum(2) > 0, hidden)
    assert torch.equal(patchify(images.grad, 4).abs().sum(2) > 0, ~hidden)


def test_mae_draws_noise_for_the_whole_batch_and_keeps_its_positions():
    learner, _, _ = built("mae")
    assert not learner.encoder.model.pos_embed.requires_grad
    assert learner.encoder.model.pos_embed[:, 0].abs().sum() == 0
    batch = next(batches())
    one, two = (learner.prepare(batch, torch.Generator().manual_seed(1))["noise"] for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (8, 16)


@pytest.mark.parametrize(
    ("slug", "wrong", "said"),
    [
        ("mae", {"encoder": "conv-s"}, "vision transformer"),
        ("mae", {"mask_ratio": 1.0}, "mask_ratio"),
        ("mae", {"mask_ratio": 0.99}, "leaves all or none of an image's 16 patches"),
        ("mae", {"decoder_width": 30}, "decoder_width must be a multiple"),
        ("byol", {"momentum_teacher": 1.5}, "momentum_teacher"),
        ("dino", {"teacher_temperature": 0.0}, "teacher_temperature"),
        ("dino", {"local_crops": -1}, "local_crops"),
        ("swav", {"epsilon": 0.0}, "epsilon"),
        ("vicreg", {"variance": -1.0}, "variance"),
        ("barlow-twins", {"redundancy": -1.0}, "redundancy"),
        ("simsiam", {"layers": 0}, "layers"),
    ],
)
def test_settings_that_make_no_sense_are_named(slug, wrong, said):
    with pytest.raises(CounterpointError, match=said):
        built(slug, **wrong)
