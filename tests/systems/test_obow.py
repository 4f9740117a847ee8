"""OBoW: the authors' numbers, the codes against their formula, the vocabulary, the head, training, resuming, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.core import codes
from counterpoint.core.codes import pooled_codes
from counterpoint.core.memory import Queue
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.images import obow
from counterpoint.systems.images.obow import WordGenerator
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "obow.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def case(number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arrays of a case, floating ones in this type."""
    prefix = f"case{number}/"
    found = {
        k.removeprefix(prefix): torch.from_numpy(np.asarray(PARITY[k])) for k in PARITY.files if k.startswith(prefix)
    }
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def of(at: dict[str, Tensor], name: str) -> list[Tensor]:
    """Return the arrays of all levels or groups."""
    return [at[key] for n in range(9) if (key := f"{name}_{n}") in at]


def generator(at: dict[str, Tensor], level: int) -> WordGenerator:
    weight = {k: at[f"weight/{k}_{level}"] for k in ("fc1_weight", "bn_weight", "bn_bias", "fc2_weight", "fc2_bias")}
    module = WordGenerator(weight["fc1_weight"].shape[1], len(weight["fc2_weight"])).to(weight["fc1_weight"].dtype)
    named = {k.replace("_", "."): v for k, v in weight.items()}
    module.load_state_dict(named, strict=False)
    return module


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=rtol * max(1e-3, float(theirs.abs().max())))


@TYPES
@pytest.mark.parametrize("number", range(3))
def test_targets_loss_and_gradients_equal_the_authors(number, dtype, rtol):
    at = case(number, dtype)
    beta, train = float(at["param/inv_delta"]), bool(at["param/train"])
    bows = []
    for n, (feature_map, words) in enumerate(zip(of(at, "in/teacher_map"), of(at, "in/dictionary"), strict=True)):
        pool = "max" if at["param/pool_max"] else "average"
        found = fn.bow_targets(feature_map, words, at[f"in/min_dist_mean_{n}"], beta, pool, train)
        close(found.bow, at[f"out/bow_{n}"], rtol)
        mean = at[f"out/min_dist_mean_after_{n}"] if train else at[f"in/min_dist_mean_{n}"]
        close(found.min_dist_mean, mean, rtol)
        used = fn.perplexity(found.bow)
        close(used.batch, at["out/perplexity_batch"][n], rtol)
        close(used.image, at["out/perplexity_image"][n], rtol)
        bows.append(found.bow)
        if train:
            queue = Queue(*words.shape, normalize=False).to(dtype)
            queue.rows.copy_(words)
            queue.pointer.fill_(int(at[f"in/ptr_{n}"]))
            queue.write(fn.local_words(feature_map, torch.rand(len(feature_map))))
            close(queue.read(), at[f"out/dictionary_after_{n}"], rtol)
            assert int(queue.pointer) == int(at[f"out/ptr_after_{n}"])
    feats = [x.clone().requires_grad_() for x in of(at, "in/student_feat")]
    heads = [generator(at, n) for n in range(len(bows))]
    loss, groups = fn.obow_loss(feats, of(at, "in/dictionary"), bows, heads, float(at["param/kappa"]))
    loss.backward()
    close(loss.detach(), at["out/loss"], rtol)
    for n, (ours, x) in enumerate(zip(groups, feats, strict=True)):
        close(ours.detach(), at[f"out/loss_{n}"], rtol)
        close(x.grad, at[f"grad/student_feat_{n}"], rtol)
        for level, head in enumerate(heads):
            logits = float(at["param/kappa"]) * x.detach() @ head(at[f"in/dictionary_{level}"]).detach().T
            close(logits, at[f"out/logits_{n}_{level}"], 3 * rtol)
    close(heads[0].fc1.weight.grad, at["grad/fc1_weight_0"], rtol)


# ------------------------------------------------------------------------------------------------------------- equations


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_codes(feature_map: Tensor, words: Tensor, sharpness: float) -> Tensor:
    """Compute the codes [n, locations, words] by the formula, with the matrix of distances."""
    places = feature_map[:, :, 1:-1, 1:-1].flatten(2).transpose(1, 2)
    return (-sharpness * (places[:, :, None] - words).square().sum(3)).softmax(2)


@pytest.mark.parametrize("keep", [0, 3000, None])
@pytest.mark.parametrize("pool", ["max", "average"])
def test_codes_in_blocks_equal_the_formula(keep, pool, monkeypatch):
    monkeypatch.setattr(codes, "BLOCK", 250)  # two pictures in a block, one in the last
    feature_map, words = draw(0, 5, 4, 5, 5), draw(1, 11, 4)
    found = pooled_codes(
        feature_map[:, :, 1:-1, 1:-1].flatten(2).transpose(1, 2), words, lambda least: 0.8, pool, keep=keep
    )
    wanted = plain_codes(feature_map, words, 0.8)
    torch.testing.assert_close(found, wanted.amax(1) if pool == "max" else wanted.mean(1))


@pytest.mark.parametrize("pool", ["max", "average"])
def test_hard_codes_are_the_limit_of_soft_ones(pool):
    feature_map, words = draw(0, 5, 4, 5, 5), draw(1, 11, 4)
    for hard in (None, -1):
        found = fn.bow_targets(feature_map, words, 0.5, hard, pool).bow
        torch.testing.assert_close(found, fn.bow_targets(feature_map, words, 0.5, 1e6, pool).bow)
    assert set(fn.bow_targets(feature_map, words, 0.5, None).bow[0].count_nonzero().view(1).tolist()) <= set(
        range(1, 10)
    )


def test_training_moves_the_mean_distance_before_the_codes_use_it():
    feature_map, words = draw(0, 5, 4, 5, 5), draw(1, 11, 4)
    least = (feature_map[:, :, 1:-1, 1:-1].flatten(2).transpose(1, 2)[:, :, None] - words).square().sum(3).amin(2)
    found = fn.bow_targets(feature_map, words, 0.5, train=True)
    moved = 0.99 * 0.5 + 0.01 * float(least.mean())
    assert float(found.min_dist_mean) == pytest.approx(moved, rel=1e-12)
    wanted = plain_codes(feature_map, words, 15 / moved).amax(1)
    torch.testing.assert_close(found.bow, wanted / wanted.sum(1, keepdim=True))
    assert float(fn.bow_targets(feature_map, words, 0.5).min_dist_mean) == 0.5


def test_features_that_all_equal_a_word_give_one_word_and_a_finite_loss():
    words = draw(1, 6, 4)
    feature_map = words[2].view(1, 4, 1, 1).expand(3, 4, 5, 5)
    found = fn.bow_targets(feature_map, words, 0.0, train=True)
    torch.testing.assert_close(found.bow, F.one_hot(torch.tensor([2] * 3), 6).double())
    assert float(fn.perplexity(found.bow).batch) == pytest.approx(1, abs=1e-4)
    loss = fn.obow_loss([draw(2, 3, 5)], [words], [found.bow], [WordGenerator(4, 5).double()]).loss
    assert bool(loss.isfinite())


def test_one_picture_is_a_batch():
    bow = fn.bow_targets(draw(0, 1, 4, 5, 5), draw(1, 11, 4), 0.5, train=True).bow
    assert bow.shape == (1, 11)
    loss = fn.obow_loss([draw(2, 2, 5)], [draw(1, 11, 4)], [bow], [WordGenerator(4, 5).double()]).loss
    assert float(loss.detach()) > 0


def test_new_words_are_local_means_single_locations_or_the_mean():
    feature_map = draw(0, 3, 4, 6, 7)
    part = feature_map[:, :, 1:-1, 1:-1]
    random = torch.tensor([0.0, 0.999, 0.5])
    found = fn.local_words(feature_map, random)  # 2 x 3 windows
    torch.testing.assert_close(found[0], part[0, :, :3, :3].mean((1, 2)))
    torch.testing.assert_close(found[1], part[1, :, 1:, 2:].mean((1, 2)))
    torch.testing.assert_close(fn.local_words(feature_map, random, "no_averaging")[1], part[1, :, -1, -1])
    torch.testing.assert_close(fn.local_words(feature_map, random, "global_average"), part.mean((2, 3)))


def test_a_vocabulary_keeps_lengths_starts_rectified_and_wraps():
    queue = Queue(5, 3, normalize=False)
    assert float(queue.rows.min()) == 0
    assert float(queue.rows.max()) > 0
    first, second = 7 * torch.ones(3, 3), 9 * torch.ones(3, 3)
    queue.write(first)
    queue.write(second)
    assert queue.read()[:, 0].tolist() == [9, 7, 7, 9, 9]
    assert int(queue.pointer) == 1


def test_the_loss_is_the_divergence_of_every_crop_from_its_picture_s_bag():
    words, heads = (
        [draw(1, 7, 4).requires_grad_(), draw(2, 9, 3)],
        [WordGenerator(4, 5).double(), WordGenerator(3, 5).double()],
    )
    bows = [draw(3, 2, 7).softmax(1), draw(4, 2, 9).softmax(1)]
    feats = [draw(5, 4, 5).requires_grad_(), draw(6, 6, 5).requires_grad_()]
    kappas = [2.0, 3.0]
    found = fn.obow_loss(feats, words, bows, heads, kappas)
    wanted = []
    for group in feats:
        levels = []
        for v, head, t, kappa in zip(words, heads, bows, kappas, strict=True):
            logits = kappa * group @ head(v).T
            target = t.repeat_interleave(len(group) // 2, 0)
            levels.append(F.kl_div(logits.log_softmax(1), target, reduction="batchmean"))
        wanted.append(torch.stack(levels).mean())
    torch.testing.assert_close(found.loss, sum(wanted))
    torch.testing.assert_close(found.per_group_losses, wanted)
    inputs = [*feats, heads[0].fc1.weight, heads[1].fc2.bias]
    ours, theirs = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (found.loss, sum(wanted)))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert torch.autograd.grad(found.loss, words[0], allow_unused=True) == (None,)


def test_the_tensors_of_a_generator_serve_as_one():
    at = case(1, torch.float64)
    names = ("fc1_weight", "bn_weight", "bn_bias", "fc2_weight", "fc2_bias")
    tensors = [{name: at[f"weight/{name}_{n}"] for name in names} for n in range(2)]
    loss = fn.obow_loss(of(at, "in/student_feat"), of(at, "in/dictionary"), of(at, "out/bow"), tensors, 5.0).loss
    close(loss, at["out/loss"], 1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.bow_targets(draw(0, 2, 4, 2, 5), draw(1, 6, 4), 1.0), "feature_map must be at least 3 x 3"),
        (lambda: fn.bow_targets(draw(0, 2, 4), draw(1, 6, 4), 1.0), "feature_map must be"),
        (lambda: fn.bow_targets(draw(0, 2, 4, 5, 5), draw(1, 6, 3), 1.0), "dictionary"),
        (lambda: fn.bow_targets(draw(0, 2, 4, 5, 5) * torch.nan, draw(1, 6, 4), 1.0), "feature_map holds NaN"),
        (lambda: fn.bow_targets(draw(0, 2, 4, 5, 5), draw(1, 6, 4) / 0, 1.0), "dictionary holds NaN"),
        (lambda: fn.bow_targets(draw(0, 2, 4, 5, 5), draw(1, 6, 4), -1.0), "min_dist_mean"),
        (lambda: fn.bow_targets(draw(0, 2, 4, 5, 5), draw(1, 6, 4), 1.0, 0.0), "inv_delta"),
        (lambda: fn.bow_targets(draw(0, 2, 4, 5, 5), draw(1, 6, 4), 1.0, pool="sum"), "pool"),
        (lambda: fn.bow_targets(draw(0, 0, 4, 5, 5), draw(1, 6, 4), 1.0), "feature_map is an empty batch"),
        (lambda: fn.local_words(draw(0, 2, 4, 4, 4), torch.rand(2)), "feature_map must be at least 5 x 5"),
        (lambda: fn.local_words(draw(0, 2, 4, 5, 5), torch.rand(3)), "random"),
        (lambda: fn.local_words(draw(0, 2, 4, 5, 5), torch.rand(2), "median"), "update"),
        (lambda: fn.perplexity(draw(0, 4)), "bow"),
        (lambda: loss_of(feats=[draw(0, 5, 5)]), "student_feats"),
        (lambda: loss_of(feats=[]), "student_feats"),
        (lambda: loss_of(bows=[draw(0, 2, 6).softmax(1)]), "bows"),
        (lambda: loss_of(kappa=0.0), "kappa"),
        (lambda: loss_of(kappa=[1.0, 2.0]), "kappa"),
        (lambda: loss_of(heads=[nn.Linear(4, 3).double()]), "generators"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def loss_of(feats=None, bows=None, heads=None, kappa=1.0):
    return fn.obow_loss(
        [draw(0, 4, 5)] if feats is None else feats,
        [draw(1, 7, 4)],
        bows or [draw(2, 2, 7).softmax(1)],
        heads or [WordGenerator(4, 5).double()],
        kappa,
    )


# --------------------------------------------------------------------------------------------------------------- learner

DATA = "digits?size=16&train=60&held_out=0.05&valid=0.05"
SMALL = {
    "encoder": "conv-s", "levels": ["stem", "layer1"], "words": 40, "recipe": "obow-canvases", "large_size": 8,
    "patches": 2, "patch_size": 8, "batch_size": 16, "epochs": 2, "evaluate_every": 2, "warmup_epochs": 0, "bank": 60,
}  # fmt: skip


def built(data: str = DATA, seed: int = 0, **overrides):
    """Build a learner with its task."""
    experiment = Experiment.resolve("obow", data, overrides=SMALL | overrides)
    task = experiment.task()
    return load_system("obow").learner(experiment.config, SimpleNamespace(**task.facts), seed), task


def test_a_step_trains_with_the_public_functions_on_the_words_before_its_update(monkeypatch):
    learner, task = built(epochs=1)
    calls: dict[str, list] = {"bow_targets": [], "obow_loss": []}
    before = [queue.read() for queue in learner.vocabularies]

    def watch(name):
        function = getattr(obow, name)

        def call(*args, **kwargs):
            calls[name].append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(obow, name, call)

    watch("bow_targets")
    watch("obow_loss")
    fit(learner, task, bar=False)
    steps = len(calls["obow_loss"])
    assert steps == 60 // 16
    assert len(calls["bow_targets"]) == 2 * steps
    for args, words in zip(calls["bow_targets"], before, strict=False):
        assert torch.equal(args[1], words)  # the targets of the first step
    for given, words in zip(calls["obow_loss"][0][1], before, strict=True):
        assert torch.equal(given, words)  # its head
    for queue, words in zip(learner.vocabularies, before, strict=True):
        changed = (queue.read() != words).any(1)
        assert int(changed.sum()) == min(40, 16 * steps)


def test_crops_of_a_picture_are_adjacent_and_follow_its_flip():
    learner, task = built()
    batch = next(iter(task.train_loader(0, learner.position)))
    found = learner.prepare(batch, torch.Generator().manual_seed(0))
    again = learner.prepare(batch, torch.Generator().manual_seed(0))
    large, patches = found["crops"]
    assert large.shape == (2 * 16, 3, 8, 8)
    assert patches.shape == (2 * 16, 3, 8, 8)
    assert torch.equal(patches, again["crops"][1])
    # Black pictures but for one: only the crops in its rows are not alike.
    batch["image"] = torch.zeros_like(batch["image"])
    batch["image"][3] = 255
    large, patches = learner.prepare(batch, torch.Generator().manual_seed(0))["crops"]
    for crops in (large, patches):
        brightest = crops.mean((1, 2, 3)).topk(2).indices
        assert sorted(brightest.tolist()) == [6, 7]


def test_the_teacher_follows_on_half_a_cosine_or_at_a_constant_rate(monkeypatch):
    seen: list[float] = []
    for schedule in ("cosine", "constant"):
        learner, task = built(epochs=1, momentum_schedule=schedule, momentum_teacher=0.9)
        monkeypatch.setattr(learner.teacher, "update", lambda student, momentum: seen.append(momentum))
        fit(learner, task, bar=False)
    assert seen[0] == pytest.approx(0.9)
    assert seen[1] == pytest.approx(1 - 0.1 * (1 + np.cos(np.pi / 3)) / 2)
    assert seen[3:] == [0.9] * 3


def test_a_static_teacher_and_vocabulary_stay_as_they_are():
    learner, task = built(momentum_teacher=1.0, update_steps=1)
    teacher = {k: v.clone() for k, v in learner.teacher.named_parameters()}
    before = [queue.read() for queue in learner.vocabularies]
    fit(learner, task, bar=False)
    assert all(torch.equal(v, teacher[k]) for k, v in learner.teacher.named_parameters())
    for queue, words in zip(learner.vocabularies, before, strict=True):
        assert int((queue.read() != words).any(1).sum()) == 16


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "learned", "learn_kappa": True, "monitor": True, "levels": ["layer1"]},
        {"patches": 0, "large_crops": 1, "inv_delta": 0.0, "pool": "average", "update": "no_averaging"},
        {"large_crops": 0, "update": "global_average", "start_distance": 0.5},
    ],
)
def test_options_train(settings):
    learner, task = built(epochs=1, **settings)
    (row,) = fit(learner, task, bar=False)
    assert np.isfinite(row["train/loss"])
    assert row["train/batch_perplexity"] > 1
    if settings.get("learn_kappa"):
        assert float(learner.kappa.detach()) != SMALL.get("kappa", 5.0)
    if settings.get("monitor"):
        assert row["train/monitor"] > 0
    head = learner.eval().frozen_head()
    assert head.weight.shape == (40, 128)
    torch.testing.assert_close(head.weight.norm(dim=1), learner.kappa[-1].detach().expand(40))


def test_a_vocabulary_larger_than_the_training_is_reported():
    learner, task = built(epochs=1, words=4000)
    said: list[str] = []
    fit(learner, task, bar=False, say=said.append)
    assert any("of 4000 words are written, others stay random" in line for line in said)


def test_the_monitor_s_gradient_reaches_no_network():
    learner, task = built(monitor=True)
    learner.total_steps = 1
    batch = learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(0))
    found = learner.loss(batch)
    slopes = torch.autograd.grad(found["monitor"], list(learner.encoder.parameters()), allow_unused=True)
    assert all(slope is None for slope in slopes)


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch):
    config = Experiment.resolve("obow", DATA, overrides=SMALL).config
    run = need_equal_ends(monkeypatch, obow.OBoW, "obow", config, DATA, 4, tmp_path)  # in the second epoch
    assert {"vocabularies.0.rows", "vocabularies.1.pointer", "distance"} <= set(run.load_weights())


@pytest.mark.usefixtures("drawn")
def test_trains_from_the_command_line_on_a_folder_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    words = ["train", "obow", "--data", f"imagefolder:{tmp_path / 'pictures'}?size=16", "--levels", "stem", "layer1"]
    for name, value in SMALL.items():
        words += [] if name == "levels" else [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "run"]) == 0
    run = Run.open(tmp_path / "run")
    rows = run.metrics()
    assert {"train/crops_loss", "train/patches_loss", "train/stem_batch_perplexity"} <= set(rows[-1])
    learner = training.load_learner(run)
    assert learner.predict({"image": torch.randn(4, 3, 16, 16)})["feature"].shape == (4, 128)
    assert training.evaluate(run.path, say=lambda _: None)["knn_accuracy"] == rows[-1]["test/knn_accuracy"]
    assert "Visual words" in (run.path / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": ["layer9"]}, "layer9"),
        ({"levels": []}, "levels"),
        ({"levels": ["stem", "stem"]}, "levels"),
        ({"levels": ["layer2"], "border": 1}, "levels: layer2 of conv-s does not fit"),
        ({"encoder": "mlp-s", "levels": ["layer2"]}, "mlp-s cannot take pictures of 3 x 8 x 8"),
        ({"patches": 10}, "patches"),
        ({"patches": 0, "large_crops": 0}, "large_crops"),
        ({"kappa": 0.0}, "kappa"),
        ({"inv_delta": -2.0}, "inv_delta"),
        ({"momentum_teacher": 1.5}, "momentum_teacher"),
        ({"words": 0}, "words"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CounterpointError, match=message):
        built(**settings)


def test_defaults_are_the_paper_s():
    config = load_system("obow").config()
    assert (config.words, config.inv_delta, config.kappa, config.batch_size, config.epochs) == (8192, 15, 8, 256, 200)
    assert replace(config, levels=("layer4",)).levels == ("layer4",)
