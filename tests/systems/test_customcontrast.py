"""CustomContrast: the card's identities, frames, injection, arms, resuming, processes, data, generated pictures, errors."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from counterpoint import data as sources
from counterpoint import functional as fn
from counterpoint import training
from counterpoint.cli import main
from counterpoint.data.generation import Condition
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.generation import customcontrast as room
from counterpoint.tasks.measures import generation as measures
from counterpoint.use.generate import generate
from counterpoint.views.subjects import on_white, subject_mask
from interrupted import need_equal_ends
from launch import command_over_processes
from pretend_gpu import pretend_gpu

pytestmark = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs the extra [generation]")
ZEROS = torch.zeros(4, 4, dtype=torch.float64)
DATA = "digit-subjects?train=8&test=5&frames=4"
SMALL = {
    "embedding": 8,
    "width": 8,
    "depth": 1,
    "tokens": 2,
    "sampling": 2,
    "batch_size": 16,
    "pretrain_epochs": 1,
    "epochs": 1,
    "evaluate_every": 5,
    "encoder": "conv-group",
}


@pytest.fixture(autouse=True)
def quick_judges(monkeypatch):
    """Train judges for one pass."""
    monkeypatch.setattr(measures, "PASSES", 1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- equations


def by_definition(anchors: Tensor, positives: Tensor, r: Tensor, tau: float) -> Tensor:
    layers = []
    for a, p in zip(F.normalize(anchors, dim=2), F.normalize(positives, dim=2), strict=True):
        own = ((a * p).sum(1) / tau).exp()
        others = ((1 - r) * (a @ a.T / tau).exp()).fill_diagonal_(0.0).sum(1)
        layers.append(-(own / (own + others)).log())
    return torch.stack(layers).mean()


@pytest.mark.parametrize("few", [0, 2**20])  # by the kernel, and by the whole matrix
@pytest.mark.parametrize("n", [5, 700])
@pytest.mark.parametrize("features", [False, True])
def test_macl_follows_its_definition_in_value_and_gradient(n, features, few, monkeypatch):
    monkeypatch.setattr(room, "FEW_WORDS", few)
    a, p, x = draw(0, 2, n, 4).requires_grad_(), draw(1, 2, n, 4).requires_grad_(), draw(2, n, 3)
    subjects = torch.arange(n) % (n - 2)  # two subjects occur twice
    given = fn.subject_similarity(x, subjects) if features else draw(3, n, n).sigmoid()
    r = given(slice(0, n), slice(0, n)) if features else given
    found, wanted = fn.macl(a, p, given, 0.5), by_definition(a, p, r, 0.5)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found, [a, p]), torch.autograd.grad(wanted, [a, p]), strict=True):
        torch.testing.assert_close(one, other)


def test_without_real_similarity_macl_is_infonce_with_the_other_anchors_as_negatives():
    a, p = draw(0, 1, 6, 4), draw(1, 1, 6, 4)
    x, y = (F.normalize(one[0], dim=1) for one in (a, p))
    logits = torch.where(torch.eye(6).bool(), x @ y.T, x @ x.T) / 0.07
    torch.testing.assert_close(
        fn.macl(a, p, torch.zeros(6, 6, dtype=torch.float64)), F.cross_entropy(logits, torch.arange(6))
    )


@pytest.mark.parametrize("few", [0, 2**20])
def test_subjects_that_look_alike_give_no_loss_and_no_gradient(few, monkeypatch):
    monkeypatch.setattr(room, "FEW_WORDS", few)
    a, p = draw(0, 2, 5, 4).requires_grad_(), draw(1, 2, 5, 4).requires_grad_()
    found = fn.macl(a, p, torch.ones(5, 5, dtype=torch.float64))
    assert found.item() == 0.0
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(found, [a, p]))


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_equal_pseudo_words_give_the_logarithm_of_the_weights(tau):
    x = torch.ones(3, 6, 4, dtype=torch.float64)
    found = fn.macl(x, x.clone(), torch.full((6, 6), 0.3, dtype=torch.float64), tau)
    assert found.item() == pytest.approx(math.log(1 + 5 * 0.7))


def test_layers_with_equal_pseudo_words_give_the_value_of_one():
    a, p, r = draw(0, 1, 6, 4), draw(1, 1, 6, 4), draw(2, 6, 6).sigmoid()
    torch.testing.assert_close(fn.macl(a.repeat(4, 1, 1), p.repeat(4, 1, 1), r), fn.macl(a, p, r))


def test_cscl_of_matched_orthonormal_codes_has_the_cards_value_and_ignores_the_order_of_modalities():
    x = torch.eye(5, dtype=torch.float64)
    assert fn.cscl(x, x, 0.3).item() == pytest.approx(math.log(1 + 4 * math.exp(-1 / 0.3)))
    assert fn.cscl(torch.ones(5, 3), torch.ones(5, 3)).item() == pytest.approx(math.log(5))
    v, u = draw(0, 6, 4), draw(1, 6, 4)
    torch.testing.assert_close(fn.cscl(v, u), fn.cscl(u, v))


def test_one_subject_gives_no_contrast():
    a, p = draw(0, 2, 1, 4).requires_grad_(), draw(1, 2, 1, 4)
    found = fn.macl(a, p, torch.zeros(1, 1, dtype=torch.float64)) + fn.cscl(a[0], p[0])
    assert found.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.grad(found, a)[0].abs().max() < 1e-12


def test_real_similarity_is_clipped_to_0_and_1():
    a, p, r = draw(0, 2, 6, 4), draw(1, 2, 6, 4), 3 * draw(2, 6, 6)
    torch.testing.assert_close(fn.macl(a, p, r), fn.macl(a, p, r.clamp(0, 1)))
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    similarity = fn.subject_similarity(opposite, torch.tensor([0, 1]))(slice(0, 2), slice(0, 2))
    assert similarity.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_frames_of_one_subject_in_a_batch_are_no_negatives():
    x = torch.eye(4)
    similarity = fn.subject_similarity(x, torch.tensor([0, 0, -1, -1]))(slice(0, 4), slice(0, 4))
    assert similarity[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert similarity[2].tolist() == [0.0, 0.0, 1.0, 0.0]  # items without a subject repel each other


def test_rows_without_a_second_frame_are_negatives_only():
    a, p, r = draw(0, 1, 4, 3), draw(1, 1, 4, 3), ZEROS
    alone = torch.tensor([True, True, True, False])
    a.requires_grad_()
    found = fn.macl(a, p, r, 0.5, alone)
    changed = p.clone()
    changed[:, 3] = 7.0
    torch.testing.assert_close(found, fn.macl(a, changed, r, 0.5, alone))
    assert torch.autograd.grad(found, a)[0][0, 3].abs().max() > 0
    assert fn.macl(a, p, r, 0.5, torch.zeros(4, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: fn.cscl(x[0], x[0, :2]), "visual and textual must be"),
        (lambda x: fn.cscl(x[0], x[0], 0.0), "temperature must be positive"),
        (lambda x: fn.macl(x, x, ZEROS), "positives are the anchors; they must come from other frames"),
        (lambda x: fn.macl(x[0], x[1], ZEROS), "anchors and positives must be"),
        (lambda x: fn.macl(x, x.clone(), torch.zeros(4, 3, dtype=torch.float64)), r"similarity must be \[4, 4\]"),
        (lambda x: fn.macl(x, x.clone(), ZEROS, -1.0), "temperature must be positive"),
        (lambda x: fn.macl(x, x.clone(), ZEROS, 1.0, torch.ones(3) > 0), r"paired must be \[4\]"),
        (lambda x: fn.macl(x[:, :0], x[:, :0].clone(), torch.zeros(0, 0, dtype=torch.float64)), "empty batch"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(draw(0, 2, 4, 3))


# ------------------------------------------------------------------------------------------------- subjects on white


def test_a_subject_is_found_before_a_plain_ground_and_stands_in_the_middle_of_white():
    pictures = torch.full((2, 3, 16, 16), 0.6)
    pictures[0, :, 1:5, 2:6] = 0.1  # a square of 4 pixels at the top left; the second picture is plain
    assert subject_mask(pictures)[0].sum() == 16
    assert subject_mask(pictures)[1].all()
    found = on_white(pictures, True)
    marked = (found[0, 1] < 0.55).nonzero()
    assert (marked.float().mean(0) - 7.5).abs().max() < 0.6
    assert 11 <= marked[:, 0].max() - marked[:, 0].min() + 1 <= 14  # 0.8 of 16
    assert found[0, :, 0, 0].tolist() == pytest.approx([1.0, 1.0, 1.0], abs=0.05)


def test_a_random_place_and_scale_keep_the_whole_subject_in_the_picture():
    pictures = torch.zeros(4, 3, 16, 16)
    pictures[:, :, 4:10, 4:10] = 0.8
    drawn = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    found = on_white(pictures, True, drawn)
    inks = (1 - found[:, 0]).sum((1, 2)) / 0.2
    assert inks.tolist() == pytest.approx([64.0, 64.0, 207.4, 207.4], rel=0.1)
    middles = [(one[0] < 0.95).nonzero().float().mean(0).tolist() for one in found]
    assert max(middles[0]) < 6
    assert min(middles[1]) > 9


# ------------------------------------------------------------------------------------------------------------- the learner


def built(spec: str = DATA, seed: int = 0, **settings):
    experiment = Experiment.resolve("customcontrast", spec, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, seed), task


def begun(stage: int = 1, spec: str = DATA, **settings):
    """Return a learner that stands in a stage, and a prepared batch."""
    learner, task = built(spec, **settings)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    learner.position.stage = stage
    learner.train()
    batch = learner.survey.batch("train", range(16))
    return learner, learner.prepare(batch, torch.Generator().manual_seed(0))


def test_both_stages_train_and_the_second_by_the_functions_of_the_identities(monkeypatch):
    seen = []

    def spied(name):
        real = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *given: (seen.append((learner.pretraining, name)), real(*given))[1])

    learner, task = built()
    spied("cscl")
    spied("macl")
    row = fit(learner, task, bar=False)[-1]
    assert seen == [(False, "cscl"), (False, "macl")] * 2
    assert learner.trained == 2
    names = (
        "frechet_distance",
        "class_accuracy",
        "picture_error",
        "identity_purity",
        "nuisance_probe",
        "similarity_rank",
    )
    assert all(math.isfinite(row[f"test/{name}"]) for name in names)


def test_reference_positive_and_target_are_three_frames_of_the_subject():
    learner, batch = begun()
    split = learner.survey.split("train")
    first, second = learner.frames.two_of(batch["index"], torch.rand(16, 2))
    for row, a, b in zip(batch["index"].tolist(), first.tolist(), second.tolist(), strict=True):
        assert len({row, a, b}) == 3
        assert split.subjects[row] == split.subjects[a] == split.subjects[b]
    assert batch["paired"].all()
    assert not (batch["reference"] == batch["positive"]).flatten(1).all(1).any()
    assert not (batch["reference"] == batch["image"]).flatten(1).all(1).any()


def test_self_reconstruction_refers_to_the_target_itself():
    _, batch = begun(frames="self")
    assert torch.equal(batch["reference"], batch["image"])
    assert not (batch["positive"] == batch["image"]).flatten(1).all(1).any()


def test_two_frames_lend_the_target_as_the_positive_and_an_only_frame_is_counted(tmp_path):
    _, batch = begun(spec="digit-subjects?train=8&test=5&frames=2")
    assert torch.equal(batch["positive"], batch["image"])
    assert batch["paired"].all()
    folders(tmp_path / "two", frames=1, subjects=24)
    learner, batch = begun(spec=f"subjects:{tmp_path / 'two'}?size=16", batch_size=4)
    assert not batch["paired"].any()
    assert learner.warnings == ["17 subjects have one picture: it is its own reference, and MACL leaves it out"]
    assert learner.loss(batch)["macl"] == 0


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"frames": "self", "cscl_weight": 0.0, "macl_weight": 0.0}, {"diffusion"}),
        ({"cscl_weight": 0.0, "macl_weight": 0.0}, {"diffusion"}),
        ({"macl_weight": 0.0}, {"diffusion", "cscl"}),
        ({"cscl_weight": 0.0}, {"diffusion", "macl"}),
        (
            {"scaling": False, "references": "whole", "segmentation": "none", "locate": False},
            {"diffusion", "cscl", "macl"},
        ),
    ],
)
def test_arms_have_their_terms(settings, terms):
    learner, batch = begun(**settings)
    found = learner.loss(batch)
    assert found.keys() == terms | {"loss"}
    assert found["loss"].isfinite()


def test_the_loss_is_the_weighted_sum_of_its_terms():
    learner, batch = begun(cscl_weight=2.0, macl_weight=3.0)
    found = learner.loss(batch)
    torch.testing.assert_close(found["loss"], found["diffusion"] + 2 * found["cscl"] + 3 * found["macl"])


def test_guidance_goes_beyond_the_noise_with_a_condition(monkeypatch):
    learner, _ = built(guidance=3.0)
    learner.trained += 1
    seen = []
    step = learner.sampler.step
    monkeypatch.setattr(learner, "denoised", lambda x, *given: torch.full_like(x, 1.0 if len(given) < 5 else 0.25))
    monkeypatch.setattr(learner.sampler, "step", lambda noise, *rest: (seen.append(noise), step(noise, *rest))[1])
    learner.generate([Condition("a small subject", [np.zeros((16, 16, 3), np.uint8)])])
    assert len(seen) == 2
    assert all((noise == 0.25 + 3 * 0.75).all() for noise in seen)


def test_without_scaling_negatives_of_other_subjects_count_fully(monkeypatch):
    given = []
    real = room.subject_similarity
    monkeypatch.setattr(room, "subject_similarity", lambda *x: given.append(real(*x)) or given[-1])
    for scaling in (True, False):
        learner, batch = begun(scaling=scaling)
        learner.loss(batch)
    free, plain = (one(slice(0, 16), slice(0, 16)) for one in given)
    same = batch["subject"][:, None] == batch["subject"]
    assert torch.equal(plain, same.float())
    assert ((free > 0) & (free < 1)).any()
    assert (free[same] == 1).all()


def test_the_second_stage_changes_the_injection_and_leaves_the_fixed_parts():
    learner, task = built(tune=False, epochs=2)
    parts = ("unet.conv_in.weight", "captions.embed.weight", "mfi.visual_queries", "patches.project.weight")
    kept = {}
    run = learner.stages()[1].trains
    trained = {id(p) for module in run() for p in module.parameters()}
    named = dict(learner.named_parameters())
    assert [id(named[name]) in trained for name in parts] == [False, False, True, True]
    kept = {name: named[name].detach().clone() for name in parts}
    frozen = {name: value.clone() for name, value in learner.patches.encoder.state_dict().items()}
    fit(learner, task, bar=False)
    assert all(not torch.equal(kept[name], named[name]) for name in parts)  # the first stage trained the U-Net
    for name, value in learner.patches.encoder.state_dict().items():
        assert torch.equal(value, frozen[name])


def test_the_frozen_encoder_of_the_real_similarity_stays_when_the_encoder_is_tuned():
    learner, task = built(tune=True)
    before = {name: value.clone() for name, value in learner.frozen.state_dict().items()}
    fit(learner, task, bar=False)
    assert all(torch.equal(value, before[name]) for name, value in learner.frozen.state_dict().items())
    assert any(
        not torch.equal(a, b)
        for a, b in zip(learner.frozen.parameters(), learner.patches.encoder.parameters(), strict=True)
    )


def test_every_layer_receives_its_own_pseudo_word_and_the_mask_multiplies_both_branches():
    learner, batch = begun()
    learner.eval()
    with torch.no_grad():
        for processor in learner.injected:
            processor.value.weight.normal_()
    patches = learner.seen(batch["reference"])
    subject = learner.subject(patches, batch["steps"])
    assert len(learner.injected) == len(subject.words) == 4
    given = (torch.randn(16, 3, 16, 16), batch["steps"], batch["ids"], batch["mask"])
    with torch.no_grad():
        usual = learner.denoised(*given, subject)
        for layer in range(4):
            words = subject.words.clone()
            words[layer] += 1
            assert not torch.allclose(learner.denoised(*given, subject._replace(words=words)), usual)
        for processor in learner.injected:
            processor.locate.last.bias.fill_(-100.0)  # a mask of 0 shuts text and subject out
        shut = learner.denoised(*given, subject)
        words, fused = subject.words + 1, subject.fused - 1
        torch.testing.assert_close(learner.denoised(*given, subject._replace(words=words, fused=fused)), shut)


def test_rows_without_condition_depend_on_neither_caption_nor_subject():
    learner, batch = begun()
    learner.eval()
    kept = torch.zeros(16, dtype=torch.bool)
    noisy = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        subject = learner.subject(learner.seen(batch["reference"]), batch["steps"])
        found = learner.denoised(noisy, batch["steps"], batch["ids"], batch["mask"], subject, kept)
        other = learner.subject(learner.seen(batch["image"]), batch["steps"])
        again = learner.denoised(noisy, batch["steps"], batch["ids"].flip(0), batch["mask"].flip(0), other, kept)
    torch.testing.assert_close(found, again)


def test_sampling_begins_where_no_signal_is_left():
    learner, _ = begun()
    learner.sampler.set_timesteps(4)
    assert learner.sampler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, undrawn):
    config = Experiment.resolve("customcontrast", DATA, overrides=SMALL).config
    # In each stage.
    need_equal_ends(monkeypatch, room.CustomContrast, "customcontrast", config, DATA, (1, 3), tmp_path)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    words = ["train", "customcontrast", "--data", DATA, "--out", str(tmp_path)]
    plain = SMALL | {"optimizer": "sgd", "lr": 0.1, "pretrain_lr": 0.1}  # Adam enlarges rounding of gradients near 0
    words += [f"--{name.replace('_', '-')}={value}" for name, value in plain.items()]
    assert main([*words, "--name", "one"]) == 0
    command_over_processes([*words, "--name", "two"], tmp_path)
    one, two = (Run.open(tmp_path / name).load_weights() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------------------------------- data


def folders(place: Path, subjects: int = 6, frames: int = 3, captions: bool = False) -> Path:
    """Write a folder of random pictures for each subject."""
    rng = np.random.default_rng(0)
    for n in range(subjects):
        own = place / f"s{n:02d}"
        own.mkdir(parents=True)
        for k in range(frames):
            Image.fromarray(rng.integers(0, 256, (20, 16, 3)).astype(np.uint8)).save(own / f"{k}.png")
        if captions:
            lines = [json.dumps({"file_name": f"{k}.png", "text": f"a subject in scene {k}"}) for k in range(frames)]
            (own / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return place


def test_frames_of_a_drawn_subject_differ_in_scene_and_splits_share_no_subject():
    data = sources.load(DATA, task="generation")
    assert [len(split) for split in (data.train, data.valid, data.test)] == [32, 20, 20]
    assert [sorted(set(split.subjects)) for split in (data.train, data.test)] == [list(range(8)), list(range(13, 18))]
    for split in (data.train, data.test):
        pictures = split.images(np.arange(len(split)))
        for subject in set(split.subjects):
            own = pictures[split.subjects == subject]
            assert len({one.tobytes() for one in own}) == 4
        for label, text in zip(split.labels, split.captions, strict=True):
            spot, _, ground = data.classes[label].partition(" on ")
            assert {*spot.split(), ground, "subject"} <= set(text.split())
    with pytest.raises(CounterpointError, match="frames 2 to 96"):
        sources.load("digit-subjects?frames=1", task="generation")


def test_a_folder_a_subject_is_read_with_captions_and_trains(tmp_path, capsys):
    place = folders(tmp_path / "mine", captions=True)
    data = sources.load(f"subjects:{place}?size=16", task="generation")
    assert data.subjects == tuple(f"s{n:02d}" for n in range(6))
    assert sum(len(split) for split in (data.train, data.valid, data.test)) == 18
    assert data.train.captions[0] == "a subject in scene 0"
    owners = [set(split.subjects.tolist()) for split in (data.train, data.valid, data.test)]
    assert not owners[0] & owners[1] | owners[0] & owners[2] | owners[1] & owners[2]
    words = ["train", "customcontrast", "--data", f"subjects:{place}?size=16", "--out", str(tmp_path), "--name", "run"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | {"batch_size": 6}).items()]
    assert main(words) == 0
    assert "identity_purity" in capsys.readouterr().out


def test_pictures_that_cannot_be_read_and_pictures_without_a_caption_are_counted(tmp_path):
    place = folders(tmp_path)
    (place / "s00" / "0.png").write_bytes(b"no picture")
    data = sources.load(f"subjects:{place}?size=16", task="generation")
    assert any("1 of 18 pictures" in note for note in data.notes)
    assert any("17 of 17 pictures have no caption" in note for note in data.notes)
    assert set(data.train.captions) == {"subject"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda place: (place / "s00" / "9.png").write_bytes((place / "s00" / "1.png").read_bytes()),
            "1.png are the same",
        ),
        (lambda place: (place / "s01" / "captions.jsonl").write_text("{"), r"captions.jsonl: line 1 is not"),
        (lambda place: said(place, "7.png", "a subject"), "line 1 names the picture 7.png, which is not in the folder"),
        (lambda place: said(place, "1.png", "a dog"), "line 1 does not name the subject; write 'subject'"),
        (lambda place: [path.unlink() for path in place.glob("s0[1-5]/*")], "has 1 subject with a picture"),
    ],
)
def test_folders_that_do_not_fit_are_named(tmp_path, change, said):
    change(folders(tmp_path))
    with pytest.raises(DataError, match=said):
        sources.load(f"subjects:{tmp_path}?size=16", task="generation")


def said(place: Path, name: str, text: str) -> None:
    (place / "s01" / "captions.jsonl").write_text(json.dumps({"file_name": name, "text": text}))


def test_data_without_subjects_or_their_word_are_refused():
    learner, task = built("digit-scenes?train=32&test=24&names=1")
    with pytest.raises(DataError, match="the pictures have no subjects"):
        learner.begin(Survey(task, learner))
    learner, task = built(context=2)
    with pytest.raises(DataError, match="captions do not name the subject within 2 words"):
        learner.begin(Survey(task, learner))


# ---------------------------------------------------------------------------------------------- a run, and its pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = Experiment.resolve("customcontrast", DATA, overrides=SMALL).config
    out = tmp_path_factory.mktemp("runs")
    return training.train("customcontrast", config, data=DATA, out=out, say=lambda _: None).path


@pytest.mark.usefixtures("drawn")
def test_the_page_of_a_run_shows_references_real_and_generated_frames(run):
    figures = json.loads((run / "figures.json").read_text())
    rows = figures["Subjects in other scenes"]["rows"]
    assert len(rows) == 5
    assert [cell["text"] for cell in rows[0]["cells"]][:2] == ["reference", "real"]


PROMPT = "a small subject upright at the top left on navy"


def test_the_command_makes_pictures_of_a_folder_of_references(run, tmp_path, capsys):
    place = folders(tmp_path / "mine", subjects=2)
    outs = []
    for name in ("s00", "s01"):
        out = tmp_path / name
        words = [
            "generate",
            str(run),
            "--subject",
            str(place / name),
            "--prompt",
            PROMPT,
            "--number",
            "2",
            "--out",
            str(out),
        ]
        assert main(words) == 0
        outs.append(np.asarray(Image.open(out / "01-01.png")))
        assert sorted(path.name for path in out.iterdir()) == ["01-01.png", "01-02.png", "index.html"]
    assert outs[0].shape == (16, 16, 3)
    assert not np.array_equal(*outs)  # the same noise, another subject


def test_a_gpu_makes_the_processor_s_pictures(run, tmp_path, monkeypatch):
    given = {"number": 2, "seed": 3, "subject": folders(tmp_path / "mine", subjects=1) / "s00"}
    made = {"cpu": generate(str(run), [PROMPT], tmp_path / "here", **given)}
    with pretend_gpu(monkeypatch):
        made["cuda"] = generate(str(run), [PROMPT], tmp_path / "there", **given, device="cuda")
    for here, there in zip(*(found[0].files for found in made.values()), strict=True):
        assert np.abs(np.asarray(Image.open(here), int) - np.asarray(Image.open(there), int)).max() <= 1


@pytest.mark.parametrize(
    ("prompt", "change", "said"),
    [
        (PROMPT, lambda place: [path.unlink() for path in place.iterdir()], "has no picture"),
        (
            PROMPT,
            lambda place: (place / "1.png").write_bytes(b"no picture"),
            "1.png: .*; mend the picture or take it out",
        ),
        (PROMPT, lambda place: [path.unlink() for path in place.iterdir()] + [place.rmdir()], "no such file or folder"),
        ("a huge subject", lambda place: None, "words that the run does not know: huge"),
        ("a small upright", lambda place: None, "must name the subject once; write 'subject' for it"),
        ("a subject on subject", lambda place: None, "must name the subject once"),
    ],
)
def test_a_subject_or_prompt_that_does_not_fit_is_named_and_leaves_nothing(run, tmp_path, capsys, prompt, change, said):
    place = folders(tmp_path / "mine", subjects=1) / "s00"
    change(place)
    out = tmp_path / "out"
    assert main(["generate", str(run), "--subject", str(place), "--prompt", prompt, "--out", str(out)]) != 0
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(said, printed)
    assert not out.exists()


def test_a_run_with_subjects_needs_one_and_pictures_need_training(run):
    learner, _ = built()
    pictures = [np.zeros((16, 16, 3), np.uint8)]
    with pytest.raises(CounterpointError, match="give its pictures with --subject"):
        learner.generate([Condition("a small subject")])
    with pytest.raises(CounterpointError, match="no trained generator"):
        learner.generate([Condition("a small subject", pictures)])


def test_several_references_are_averaged_and_a_picture_does_not_depend_on_later_ones():
    learner, _ = built()
    learner.trained += 1
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(2))
    with torch.no_grad():
        for processor in learner.injected:
            processor.value.weight.normal_()
    asked = [Condition("a small subject", [one]), Condition("a subject", [one, other])]
    both = learner.generate(asked, 3)
    assert torch.equal(learner.generate(asked[:1], 3)[0], both[0])
    swapped = learner.generate([asked[0], Condition("a subject", [other, one])], 3)
    assert (swapped[1].int() - both[1].int()).abs().max() <= 1
