"""Any2Seg: the authors' numbers, the card's identities, relations, training, missing modalities, resuming, errors."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from counterpoint import cli, training
from counterpoint import functional as fn
from counterpoint.catalog import load_system
from counterpoint.data.dense import ArrayScenes, DenseData
from counterpoint.encoders.text import Tokenizer
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, fitted
from counterpoint.systems.dense import any2seg
from counterpoint.systems.dense.any2seg import modality_agnostic_fusion
from counterpoint.views.images import denormalise, normalise
from interrupted import need_equal_ends

PARITY = np.load(Path(__file__).parents[1] / "parity" / "any2seg.npz")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("number", range(4))
def test_fusion_and_gradients_equal_the_authors(number, dtype, rtol):
    def at(name):
        value = torch.from_numpy(np.asarray(PARITY[f"case{number}/{name}"]))
        return value.to(dtype) if value.is_floating_point() else value

    def close(ours, name):
        wanted = at(name)
        torch.testing.assert_close(ours.detach(), wanted, rtol=rtol, atol=rtol * max(1e-3, float(wanted.abs().max())))

    features = at("in/features").requires_grad_()
    previous = at("in/previous").requires_grad_() if f"case{number}/in/previous" in PARITY else None
    fused, correlation, selected = fn.modality_agnostic_fusion(features, previous, int(at("param/candidates")))
    close(fused, "out/fused")
    close(correlation, "out/correlation")
    assert torch.equal(selected, at("out/selected_index"))
    size = at("out/prediction").shape[2:]
    close(torch.nn.functional.interpolate(fused, size, mode="bilinear", align_corners=False), "out/prediction")
    loss, correlation_loss = (fused * at("in/probe")).sum(), (correlation * at("in/correlation_probe")).sum()
    close(loss, "out/loss")
    close(correlation_loss, "out/correlation_loss")
    given = [features] if previous is None else [features, previous]
    (of_features, *of_previous) = torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True)
    close(of_features, "grad/features")
    assert of_previous in ([], [None]) or of_previous[0].abs().sum() == 0
    of_features, *of_previous = torch.autograd.grad(correlation_loss, given)
    close(of_features, "grad/correlation_features")
    for slope in of_previous:
        close(slope, "grad/correlation_previous")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_mean_output_equals_the_authors_two_modality_file(dtype, rtol):
    def at(name):
        return torch.from_numpy(PARITY[f"two_modality_file/case0/{name}"])

    found = fn.modality_agnostic_fusion(at("in/features").to(dtype), at("in/previous").to(dtype), output="mean")
    for ours, name in ((found.fused, "out/mean"), (found.correlation, "out/correlation")):
        torch.testing.assert_close(ours, at(name).to(dtype), rtol=rtol, atol=rtol)
    assert torch.equal(found.selected_index, at("out/selected_index"))


# ---------------------------------------------------------------------------------------------------------------- fusion


@pytest.mark.parametrize("count", [1, 2, 4])
def test_equal_modalities_are_doubled_with_correlation_one(count):
    x = draw(0, 2, 5, 3, 3)
    found = fn.modality_agnostic_fusion(x.expand(count, *x.shape))
    torch.testing.assert_close(found.fused, 2 * x)
    torch.testing.assert_close(found.correlation, torch.ones(count, 2, dtype=torch.float64))
    assert not found.selected_index.any()  # ties select the first


def test_order_of_modalities_does_not_matter_and_scale_passes_through():
    x = draw(0, 4, 2, 5, 3, 3)
    found = fn.modality_agnostic_fusion(x)
    order = torch.tensor([2, 0, 3, 1])
    permuted = fn.modality_agnostic_fusion(x[order])
    torch.testing.assert_close(permuted.fused, found.fused)
    assert torch.equal(order[permuted.selected_index], found.selected_index)
    torch.testing.assert_close(fn.modality_agnostic_fusion(3 * x).fused, 3 * found.fused)


def test_modality_of_zeros_is_never_selected_and_halves_the_mean():
    x = draw(0, 1, 2, 5, 3, 3)
    both = torch.cat([torch.zeros_like(x), x]).requires_grad_()
    found = fn.modality_agnostic_fusion(both)
    torch.testing.assert_close(found.fused, 1.5 * x[0])
    torch.testing.assert_close(found.correlation, torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    assert found.selected_index.all()
    found.correlation.sum().backward()
    assert both.grad.isfinite().all()
    assert both.grad.abs().max() < 1e-12  # a cosine of 0 or 1 in any case


def test_zeros_alone_give_zeros():
    x = torch.zeros(3, 1, 2, 2, 2, requires_grad=True)
    found = fn.modality_agnostic_fusion(x)
    (found.fused.sum() + found.correlation.sum()).backward()
    assert found.fused.abs().sum() == found.correlation.abs().sum() == 0
    assert x.grad.isfinite().all()


def test_negative_correlations_keep_their_sign():
    x = draw(0, 1, 1, 5, 2, 2)
    found = fn.modality_agnostic_fusion(torch.cat([x, x, -x]))
    torch.testing.assert_close(found.correlation[:, 0], torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert (found.selected_index < 2).all()


def test_previous_equal_to_the_mean_changes_nothing():
    x = draw(0, 3, 2, 5, 3, 3)
    ours, plain = fn.modality_agnostic_fusion(x, x.mean(0)), fn.modality_agnostic_fusion(x)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_selection_is_that_of_the_written_steps():
    x = draw(0, 3, 2, 4, 3, 3)
    found = fn.modality_agnostic_fusion(x)
    f = x.mean(0)
    rho = torch.nn.functional.cosine_similarity(x.flatten(2), f.flatten(1)[None], dim=2)
    g = (rho[..., None, None, None] * x).sum(0)
    index = torch.nn.functional.cosine_similarity(x, g[None], dim=2).argmax(0)
    torch.testing.assert_close(found.correlation, rho)
    assert torch.equal(found.selected_index, index)
    torch.testing.assert_close(found.fused, x.gather(0, index[None, :, None].expand(1, *x.shape[1:]))[0] + f)


def test_tokens_have_correlations_and_weights_of_their_own():
    x = draw(0, 3, 2, 4, 3, 3).requires_grad_()
    found = fn.modality_agnostic_fusion(x, tokens=True)
    f = x.mean(0)
    rho = torch.nn.functional.cosine_similarity(x, f[None], dim=2)
    mean = (rho[:, :, None] * x).mean(0)
    index = torch.nn.functional.cosine_similarity(x, mean[None], dim=2).argmax(0)
    torch.testing.assert_close(found.correlation, rho.mean((2, 3)))
    wanted = x.gather(0, index[None, :, None].expand(1, *x.shape[1:]))[0] + mean
    torch.testing.assert_close(found.fused, wanted)
    ours, theirs = (
        torch.autograd.grad((y * draw(1, *y.shape)).sum(), x, retain_graph=True)[0] for y in (found.fused, wanted)
    )
    torch.testing.assert_close(ours, theirs)


def test_absent_modalities_count_nowhere():
    x = draw(0, 3, 2, 4, 3, 3)
    present = torch.tensor([[True, True], [True, False], [False, True]])
    found = fn.modality_agnostic_fusion(x, present=present)
    for sample, at in enumerate(([0, 1], [0, 2])):
        alone = fn.modality_agnostic_fusion(x[at, sample : sample + 1])
        torch.testing.assert_close(found.fused[sample], alone.fused[0])
        torch.testing.assert_close(found.correlation[at, sample], alone.correlation[:, 0])
        assert torch.equal(found.selected_index[sample], torch.tensor(at)[alone.selected_index[0]])
    assert found.correlation[1, 1] == found.correlation[2, 0] == 0
    # A sample without a candidate uses the others.
    late = fn.modality_agnostic_fusion(x, None, 1, torch.tensor([[True, False], [True, True], [True, False]]))
    assert (late.selected_index == torch.tensor([0, 1])[:, None, None]).all()
    torch.testing.assert_close(late.fused, 2 * torch.stack([x[0, 0], x[1, 1]]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": draw(0, 2, 4, 3, 3)}, "features must be"),
        ({"features": draw(0, 2, 0, 4, 3, 3)}, "features must be"),
        ({"previous": draw(0, 1, 4, 3, 3)}, "previous must be like"),
        ({"candidates": 3}, "candidates must lie in 1..2"),
        ({"candidates": 0}, "candidates must lie in 1..2"),
        ({"present": torch.ones(3, 2).bool()}, "present must be"),
        ({"present": torch.tensor([[True, False], [True, False]])}, "present leaves a sample without a modality"),
        ({"output": "sum"}, "output must be"),
    ],
)
def test_bad_arguments_of_the_fusion_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        modality_agnostic_fusion(**({"features": draw(0, 2, 2, 4, 3, 3)} | changed))


# -------------------------------------------------------------------------------------------------------------- relations


def test_inter_modal_loss_equals_the_formula_and_has_no_gradient_of_the_teacher():
    student, teacher = draw(0, 5, 4).requires_grad_(), draw(1, 5, 4).requires_grad_()
    found = fn.inter_modal_loss(student, teacher, 0.3)
    p, q = (teacher / 0.3).softmax(1), (student / 0.3).softmax(1)
    torch.testing.assert_close(found, (p * (p.log() - q.log())).sum(1).mean())
    found.backward()
    assert teacher.grad is None
    error = fn.inter_modal_loss(student, teacher, distance="mse")
    torch.testing.assert_close(error, (student - teacher).square().mean())


def test_inter_modal_loss_is_zero_for_rows_that_differ_by_a_constant_and_for_one_modality():
    rows = draw(0, 3, 4)
    assert fn.inter_modal_loss(rows + 2, rows).abs() < 1e-12
    assert fn.inter_modal_loss(draw(1, 3, 4), rows) > 0
    assert fn.inter_modal_loss(rows[:, :1], rows[:, 1:2]) == 0
    one = fn.inter_modal_loss(draw(1, 4), rows[0])
    torch.testing.assert_close(one, fn.inter_modal_loss(draw(1, 4)[None], rows[:1]))


@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_inter_modal_loss_leaves_out_absent_modalities(distance):
    student, teacher = draw(0, 2, 4).requires_grad_(), draw(1, 2, 4)
    present = torch.tensor([[True, True, False, True], [True, False, False, False]])
    found = fn.inter_modal_loss(student, teacher, 0.5, present, distance)
    parts = [fn.inter_modal_loss(student[n : n + 1, at], teacher[n : n + 1, at], 0.5, distance=distance)
             for n, at in enumerate(present)]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(parts).mean())
    found.backward()
    assert student.grad[~present].abs().sum() == 0
    assert student.grad.isfinite().all()


def test_intra_modal_loss_is_zero_for_turned_and_scaled_class_texts():
    text = draw(0, 5, 6)
    turn = torch.linalg.qr(draw(1, 6, 6)).Q
    every = torch.ones(5, dtype=torch.bool)
    for distance in ("kl", "mse"):
        assert fn.intra_modal_loss(3 * text @ turn, text, every, distance=distance).abs() < 1e-12
        assert fn.intra_modal_loss(draw(2, 5, 6), text, every, distance=distance) > 1e-3


@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_intra_modal_loss_counts_present_classes_of_each_image(distance):
    prototypes, text = draw(0, 3, 5, 4).requires_grad_(), draw(1, 5, 6)
    present = torch.tensor([[True, False, True, True, False], [True] * 5, [False, True, False, False, False]])
    found = fn.intra_modal_loss(prototypes, text, present, 0.4, distance)
    parts = []
    for x, at in zip(prototypes, present, strict=True):
        rows, words = (torch.nn.functional.normalize(y[at], dim=1) for y in (x, text))
        own, target = rows @ rows.T, words @ words.T
        if distance == "mse":
            off = ~torch.eye(len(own), dtype=torch.bool)
            parts.append((own - target)[off].square().mean() if len(own) > 1 else own.sum() * 0)
        else:
            p, q = (target / 0.4).softmax(1), (own / 0.4).softmax(1)
            parts.append((p * (p.log() - q.log())).sum(1).mean())
    torch.testing.assert_close(found, torch.stack(parts).mean())
    found.backward()
    assert prototypes.grad[~present].abs().sum() == 0


def test_one_class_or_none_gives_zero_with_finite_gradients():
    prototypes = torch.zeros(2, 3, 4, requires_grad=True)
    present = torch.tensor([[True, False, False], [False, False, False]])
    for distance in ("kl", "mse"):
        loss = fn.intra_modal_loss(prototypes, torch.randn(3, 6), present, distance=distance)
        loss.backward()
        assert loss == 0
        assert prototypes.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.inter_modal_loss(draw(0, 3, 2), draw(0, 3, 3)), "rows must be"),
        (lambda: fn.inter_modal_loss(draw(0, 0, 2), draw(0, 0, 2)), "empty batch"),
        (lambda: fn.inter_modal_loss(draw(0, 3, 2), draw(0, 3, 2), 0.0), "temperature must be positive"),
        (lambda: fn.inter_modal_loss(draw(0, 3, 2), draw(0, 3, 2), distance="l1"), "distance must be"),
        (lambda: fn.intra_modal_loss(draw(0, 3, 2), draw(0, 4, 2), torch.ones(3).bool()), "class_text must be"),
        (lambda: fn.intra_modal_loss(draw(0, 3, 2), draw(0, 3, 2), torch.ones(4).bool()), "present like it"),
        (lambda: fn.intra_modal_loss(draw(0, 3, 2), draw(0, 3, 2), torch.ones(3).bool(), -1.0), "temperature"),
    ],
)
def test_bad_arguments_of_the_relations_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------------- learner

DATA = "sensors?train=24&test=6&size=16"
SMALL = {
    "encoder": "conv-s", "width": 8, "batch_size": 8, "epochs": 1, "evaluate_every": 1, "warmup_epochs": 0,
    "inter_weight": 0.0, "intra_weight": 0.0,
}  # fmt: skip


def built(data: str = DATA, seed: int = 0, source=None, **overrides):
    """Build a learner with its task."""
    experiment = Experiment.resolve("any2seg", data, overrides=SMALL | overrides)
    task = experiment.task(source)
    return load_system("any2seg").learner(experiment.config, SimpleNamespace(**task.facts), seed), task


def first_batch(learner, task):
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    return learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(0))


# A small CLIP of the four sensors and their sentences.
CLIP = "fit:clip?data=sensors%3Ftrain=24%26test=6%26size=16&image_encoder=conv-s&embedding=8&batch_size=12&epochs=1&vocabulary=300"


def test_a_step_trains_with_the_public_functions(monkeypatch):
    learner, task = built(teacher=CLIP, inter_weight=2.0, intra_weight=3.0, inter_temperature=0.1)
    calls: dict[str, list] = {}
    for name in ("modality_agnostic_fusion", "inter_modal_loss", "intra_modal_loss"):
        function = getattr(any2seg, name)

        def call(*args, function=function, name=name, **named):
            calls.setdefault(name, []).append((args, named))
            return function(*args, **named)

        monkeypatch.setattr(any2seg, name, call)
    batch = first_batch(learner, task)
    found = learner.loss(batch)
    torch.testing.assert_close(found["loss"], found["supervised"] + 2 * found["inter"] + 3 * found["intra"])
    ((args, _),) = calls["modality_agnostic_fusion"]
    assert args[0].shape == (4, 8, 6, 8, 8)
    assert args[0].requires_grad
    ((args, _),) = calls["inter_modal_loss"]
    assert args[0].shape == args[1].shape == (8, 4)
    assert torch.equal(args[1], learner.agreement[batch["index"]])
    assert args[2] == 0.1
    assert (args[1].abs() <= 1 + 1e-5).all()
    ((args, _),) = calls["intra_modal_loss"]
    assert args[0].shape == (8, 6, 8)
    assert args[1].shape == (6, 8)
    assert args[2][:, 0].all()  # every scene has a road
    found["loss"].backward()
    assert all(p.grad is not None for p in learner.parameters())


def test_agreement_is_the_cosine_of_a_modality_and_the_sentence():
    learner, task = built(teacher=CLIP, inter_weight=1.0)
    first_batch(learner, task)
    clip = fitted(CLIP.removeprefix("fit:"))
    split = task.data.train
    rows = np.arange(24)
    tokens = Tokenizer.from_json(clip.facts.tokenizers["text"]).encode(split.captions, clip.config.context)
    inputs = {"text": tokens} | {
        name: normalise(torch.from_numpy(split.modality(name, rows)).permute(0, 3, 1, 2))
        for name in task.data.modalities
    }
    with torch.no_grad():
        found = clip.embed({"inputs": inputs})
    wanted = torch.stack([(found[name] * found["text"]).sum(1) for name in task.data.modalities], 1)
    torch.testing.assert_close(learner.agreement, wanted, rtol=1e-4, atol=1e-5)


def test_class_names_are_embedded_by_the_named_text_encoder(monkeypatch):
    class Text(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            assert name == "minilm"

        def text(self, texts):
            return torch.tensor([[len(text), 3.0] for text in texts])

    monkeypatch.setattr(any2seg, "TextTeacher", Text)
    learner, task = built(intra_weight=1.0, class_text="minilm", teacher="run:none")  # no other teacher is needed
    first_batch(learner, task)
    wanted = torch.tensor([[len(name), 3.0] for name in ("road", "tree", "car", "person", "wall", "ball")])
    torch.testing.assert_close(learner.class_text, torch.nn.functional.normalize(wanted, dim=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"fusion": "mean"},
        {"fusion": "concat"},
        {"fusion": "concat", "level": "features"},
        {"level": "features", "previous": True},
        {"tokens": True, "output": "mean", "hard_pixels": 0.7},
        {"intra_weight": 1.0, "teacher": CLIP, "distance": "mse", "pooling": "batch", "candidates": 2},
    ],
)
def test_options_train(settings):
    learner, task = built("sensors?train=8&test=4&size=16", **settings)
    (row,) = fit(learner, task, bar=False)
    assert np.isfinite(row["train/loss"])
    assert ("train/intra" in row) == ("intra_weight" in settings)
    assert 0 <= row["test/subset_miou"] <= 1


def test_subset_and_corrupted_miou_are_means_over_their_heads():
    learner, task = built()
    (row,) = fit(learner, task, bar=False)
    names = ["".join(at) for size in range(1, 5) for at in itertools.combinations("rdel", size)]
    assert len(names) == 15
    assert row["test/subset_miou"] == pytest.approx(np.mean([row[f"test/{name}_miou"] for name in names]))
    bad = ["night", "noise_r", "noise_d", "noise_e", "noise_l"]
    assert row["test/corrupted_miou"] == pytest.approx(np.mean([row[f"test/{name}_miou"] for name in bad]))
    assert row["test/rdel_miou"] == row["test/miou"]


def test_subsets_are_segmented_as_if_the_others_were_absent():
    learner, task = built()
    learner.eval()
    batch = next(iter(task.evaluation_loader("test")))
    with torch.no_grad():
        found = learner.predict(batch)
        here = torch.zeros(4, 6, dtype=torch.bool)
        here[[1, 3]] = True
        alone = learner.segment(torch.where(here.T[..., None, None, None], batch["modalities"], torch.nan), here)
        dark = batch["modalities"].clone()
        dark[:, 0] = normalise(0.05 * denormalise(dark[:, 0]))
        night = learner.segment(dark)
    torch.testing.assert_close(found["dl_logits"], alone)
    torch.testing.assert_close(found["night_logits"], night)
    assert not torch.equal(found["noise_r_logits"], found["logits"])
    assert not torch.equal(found["noise_r_logits"], found["noise_d_logits"])


def scenes(count: int, present=None, masks=None, seed: int = 0) -> ArrayScenes:
    rng = np.random.default_rng(seed)
    pixels = {name: rng.integers(0, 255, (count, 16, 16, 3), np.uint8) for name in ("rgb", "depth")}
    masks = rng.integers(0, 3, (count, 16, 16), np.uint8) if masks is None else masks
    return ArrayScenes(pixels, masks, present=present)


def source(train: ArrayScenes, modalities=("rgb", "depth")) -> DenseData:
    return DenseData(
        "mine", train, scenes(4), scenes(4), (), 16, regions=("road", "tree", "car"), modalities=modalities
    )


def test_an_absent_modality_of_an_item_or_a_whole_batch_does_not_change_the_loss():
    some = np.array([True, False] * 4)
    for there in (some, np.zeros(8, bool)):
        losses = []
        for noise in (0, 255):
            train = scenes(8, {"depth": there})
            train.by_name["depth"][~there] = noise
            learner, task = built(source=source(train), recipe="none")
            batch = first_batch(learner, task)
            learner.config.inter_weight = 1.0
            learner.agreement = torch.linspace(-1, 1, 16).view(8, 2)
            learner.agreement[~there, 1] = noise
            loss = learner.loss(batch)["loss"]
            loss.backward()
            losses.append(loss.item())
            assert all(p.grad.isfinite().all() for p in learner.parameters())
        assert losses[0] == losses[1]


def test_pixels_of_unknown_class_alone_give_zero_loss_and_gradient():
    unknown = np.full((8, 16, 16), 255, np.uint8)
    learner, task = built(source=source(scenes(8)), intra_weight=1.0, teacher=CLIP, hard_pixels=0.7)
    batch = first_batch(learner, task)
    batch["masks"] = [torch.from_numpy(unknown)]
    found = learner.loss(batch)
    found["loss"].backward()
    assert found["loss"] == found["intra"] == 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in learner.parameters())


def test_pictures_of_one_modality_are_doubled_and_learned():
    data = source(scenes(8), ("image",))
    for split in (data.train, data.valid, data.test):
        split.by_name = {"image": split.by_name["rgb"]}
    learner, task = built(source=data, inter_weight=1.0, teacher="run:none")  # no relations, so no teacher is needed
    (row,) = fit(learner, task, bar=False)
    assert np.isfinite(row["test/miou"])
    assert "test/corrupted_miou" not in row
    learner.eval()
    pictures = torch.randn(2, 1, 3, 16, 16)
    with torch.no_grad():
        maps = learner.encoded(pictures, torch.ones(1, 2, dtype=torch.bool))
        torch.testing.assert_close(learner(pictures).logits, 2 * learner.classifier(maps[0][0]))


def test_each_step_uses_a_random_subset_and_the_same_for_the_same_step():
    learner, task = built(random_subset=True)
    batch = next(iter(task.train_loader(0, learner.position)))
    drawn = [learner.prepare(batch, torch.Generator().manual_seed(n))["use"] for n in range(40)]
    assert all(use.any() for use in drawn)
    assert len({tuple(use.tolist()) for use in drawn}) > 8
    assert torch.equal(drawn[3], learner.prepare(batch, torch.Generator().manual_seed(3))["use"])
    one = learner.prepare(batch, torch.Generator().manual_seed(0)) | {"use": torch.tensor([True, False, False, False])}
    changed = one | {"views": [torch.cat([one["views"][0][:, :1], torch.randn(8, 3, 3, 16, 16)], 1)]}
    assert learner.loss(one)["loss"].item() == learner.loss(changed)["loss"].item()


def test_the_maps_of_the_step_before_enter_the_anchor(monkeypatch):
    learner, task = built(previous=True)
    seen = []
    function = any2seg.modality_agnostic_fusion

    def call(features, previous, *args, **named):
        seen.append(previous.clone())
        return function(features, previous, *args, **named)

    batch = first_batch(learner, task)
    monkeypatch.setattr(any2seg, "modality_agnostic_fusion", call)
    learner.loss(batch)["loss"].backward()
    kept = learner.previous_0.clone()
    learner.loss(batch)
    assert seen[0].abs().sum() == 0
    assert seen[1].abs().sum() > 0
    assert torch.equal(seen[1], kept)


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    settings = SMALL | {"epochs": 2, "previous": True, "random_subset": True, "teacher": CLIP, "inter_weight": 1.0}
    config = Experiment.resolve("any2seg", DATA, overrides=settings).config
    run = need_equal_ends(monkeypatch, any2seg.Any2Seg, "any2seg", config, DATA, 4, tmp_path)  # in the second epoch
    page = (run.path / "report.html").read_text()
    assert "Selected modality" in page
    assert "Subsets of the modalities" in page


def test_trains_from_the_command_line_on_folders_of_modalities_with_a_teacher_of_their_own(tmp_path, undrawn):
    rng = np.random.default_rng(0)
    for name in ("rgb", "thermal", "masks"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    for number in range(30):
        mask = np.zeros((16, 16), np.uint8)
        mask[: 4 + number % 9] = 1 + number % 2
        for name in ("rgb", "thermal"):
            if name == "rgb" or number % 5:  # some items lack thermal
                pixels = rng.integers(0, 80, (16, 16, 3)) + 60 * mask[..., None]
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "mine" / name / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "mine" / "masks" / f"{number}.png")
    (tmp_path / "mine" / "classes.txt").write_text("road\ntree\ncar\n")
    data = f"masks:{tmp_path / 'mine'}?modalities=rgb,thermal&size=16"
    out = ["--out", str(tmp_path)]
    words = ["train", "clip", "--data", data, "--image-encoder", "conv-s", "--embedding", "8", "--epochs", "1"]
    assert cli.main([*words, "--batch-size", "8", "--vocabulary", "300", *out, "--name", "clip"]) == 0
    words = ["train", "any2seg", "--data", data, "--teacher", f"run:{tmp_path / 'clip'}", "--epochs", "1"]
    assert cli.main([*words, "--batch-size", "8", "--width", "8", *out, "--name", "run"]) == 0
    run = Run.open(tmp_path / "run")
    row = run.metrics()[-1]
    assert float(row["train/inter"]) > 0
    assert float(row["train/intra"]) > 0
    assert {"test/r_miou", "test/t_miou", "test/subset_miou", "test/corrupted_miou"} <= set(row)
    learner = training.load_learner(run)
    assert learner.segment(torch.randn(2, 2, 3, 16, 16)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "mlp-s"}, "no feature map"),
        ({"fusion": "sum"}, "fusion"),
        ({"level": "pixels"}, "level"),
        ({"fusion": "mean", "inter_weight": 1.0}, "has no correlations"),
        ({"fusion": "concat", "previous": True}, "has no correlations"),
        ({"candidates": 5}, "--candidates 5: the data have 4 modalities"),
        ({"candidates": -1}, "candidates must be at least 0"),
        ({"inter_temperature": 0.0}, "inter_temperature"),
        ({"hard_pixels": 1.5}, "hard_pixels"),
        ({"inter_weight": 1.0, "teacher": "clip"}, "teacher"),
        ({"intra_weight": 1.0, "class_text": "text-s"}, "no weights to learn from"),
        ({"intra_weight": 1.0, "class_text": "bertha"}, "bertha"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CounterpointError, match=message):
        built(**settings)


def test_a_teacher_without_a_modality_is_named():
    learner, task = built(source=source(scenes(8), ("rgb", "thermal")), inter_weight=1.0, teacher=CLIP)
    task.data.train.by_name = {"rgb": task.data.train.by_name["rgb"], "thermal": task.data.train.by_name["depth"]}
    with pytest.raises(CounterpointError, match="has no encoder of thermal; it has rgb, depth, event, lidar"):
        first_batch(learner, task)
