"""The task dense: measures against libraries, joint views of pictures and masks, cells, fine-tuning from any run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from counterpoint import cli, data, training
from counterpoint.core.cells import near_cells
from counterpoint.data.dense import IGNORE, ArrayScenes, DenseData
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.classics import finetune_seg
from counterpoint.tasks.cells import cell_classes, right_matches
from counterpoint.tasks.dense import pixel_cross_entropy
from counterpoint.tasks.dense_figures import DenseEvaluator
from counterpoint.tasks.measures.masks import dices, ious, pixel_confusion
from counterpoint.views.images import ViewPipeline
from counterpoint.views.images.masks import cropped_masks
from interrupted import need_equal_ends

# -------------------------------------------------------------------------------------------------------------- measures


def drawn(seed: int, classes: int, *shape: int) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def test_iou_of_all_pixels_equals_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex

    truth, predicted = drawn(0, 4, 5, 9, 9), drawn(1, 4, 5, 9, 9)
    truth[0, :3] = IGNORE
    theirs = MulticlassJaccardIndex(4, ignore_index=IGNORE, average=None)(predicted, truth)
    np.testing.assert_allclose(ious(pixel_confusion(truth, predicted, 4)), theirs.numpy(), rtol=1e-6)


def test_dice_equals_torchmetrics():
    from torchmetrics.classification import MulticlassF1Score

    truth, predicted = drawn(0, 3, 400), drawn(1, 3, 400)
    theirs = MulticlassF1Score(3, average=None)(predicted, truth)
    np.testing.assert_allclose(dices(pixel_confusion(truth, predicted, 3)), theirs.numpy(), rtol=1e-6)


def test_absent_class_has_no_value():
    table = pixel_confusion(torch.tensor([0, 1]), torch.tensor([0, 1]), 3)
    assert np.isnan(ious(table)).tolist() == [False, False, True]


def test_class_outside_the_range_is_refused():
    with pytest.raises(ValueError, match="truth has classes 0 to 3"):
        pixel_confusion(torch.tensor([0, 3]), torch.tensor([0, 1]), 3)


def scenes(masks: np.ndarray, groups: np.ndarray | None = None) -> DenseData:
    split = ArrayScenes(np.zeros((*masks.shape, 3), np.uint8), masks, groups=groups)
    return DenseData("made", split, split, split, (), masks.shape[1], regions=("ground", "a", "b"))


def measured(found: DenseData, logits: torch.Tensor) -> dict[str, float]:
    evaluator = DenseEvaluator(found, "test")
    rows = np.arange(len(found.test))
    masks = torch.from_numpy(found.test.masks(rows))
    batch = {"mask": masks, "index": torch.from_numpy(rows), "part": "test"}
    evaluator.update(batch, {"logits": logits})
    return evaluator.compute(final=True) | {f"chance {k}": v for k, v in evaluator.chance().items()}


def test_dice_is_per_volume_where_pictures_are_slices():
    masks = np.zeros((4, 2, 2), np.uint8)
    masks[0], masks[2] = 1, 1  # a slice with the class in each of two volumes
    predicted = torch.from_numpy(masks).long().clone()
    predicted[2] = 0  # missed in the second volume
    logits = F.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    one = measured(scenes(masks), logits)
    two = measured(scenes(masks, np.array([0, 0, 1, 1])), logits)
    assert one["dice"] == pytest.approx(2 / 3)  # 2 * 4 / (8 + 4), of all slices together
    assert two["dice"] == pytest.approx(0.5)  # of 1 and 0
    assert one["miou"] == pytest.approx((8 / 12 + 4 / 8) / 2)
    assert one["chance pixel_accuracy"] == 0.5


def test_logits_of_cells_are_scaled_to_the_mask():
    masks = np.zeros((1, 4, 4), np.uint8)
    masks[:, :, 2:] = 2
    logits = F.one_hot(torch.tensor([[[0, 2], [0, 2]]]), 3).permute(0, 3, 1, 2).float()
    assert measured(scenes(masks), logits)["pixel_accuracy"] == 1.0


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(CounterpointError, match="logits hold NaN"):
        measured(scenes(np.zeros((1, 4, 4), np.uint8)), torch.full((1, 3, 4, 4), torch.nan))


def test_loss_of_unknown_pixels_is_zero_without_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    masks[1] = IGNORE
    loss = pixel_cross_entropy(logits, masks)
    loss.backward()
    assert logits.grad[1].abs().sum() == 0
    torch.testing.assert_close(loss.detach() * 2, F.cross_entropy(logits[:1], masks[:1].long()).detach())


def test_hard_pixels_are_those_of_low_probability_and_a_sixteenth_at_least():
    logits = torch.zeros(2, 2, 8, 8)
    logits[0, 0, :2] = torch.linspace(-3, 3, 16).view(2, 8)  # a quarter of the pixels, from hard to easy
    logits[0, 0, 2:] = 9.0
    logits[1, 0] = torch.linspace(3, 9, 64).view(8, 8)  # easy everywhere
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[1, 0, 0] = IGNORE
    logits.requires_grad_()
    loss = pixel_cross_entropy(logits, masks, hard=0.7)
    each = F.cross_entropy(logits.detach(), masks.long().clamp(max=1) * 0, reduction="none").flatten(1)
    first = each[0][each[0] >= -math.log(0.7)].mean()
    second = each[1][1:4].mean()  # the hardest three of 63 known pixels
    torch.testing.assert_close(loss.detach(), (first + second) / 2)
    loss.backward()
    assert (logits.grad[1].abs().sum(0) > 0).sum() == 3
    torch.testing.assert_close(
        pixel_cross_entropy(logits, masks, hard=1.0).detach(), pixel_cross_entropy(logits, masks).detach()
    )


# ----------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("recipe", ["mae", "shapes", "weak", "none"])
def test_masks_are_cropped_and_flipped_as_their_pictures(recipe):
    masks = drawn(0, 4, 6, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    images = (masks.float() / 4 + 0.1)[:, None].expand(-1, 3, -1, -1)
    views = ViewPipeline(32, 1, recipe, mean=None, std=None)
    (view,) = views.draw(images.shape, torch.Generator().manual_seed(1))
    view.jitter[:] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    (seen,) = views.apply(images, [view])
    found = cropped_masks(masks, view)
    known = found != IGNORE
    shades = ((seen[:, 0] - 0.1) * 4).round()
    assert (shades[known] == found[known]).float().mean() > 0.9  # the picture is interpolated at edges
    assert (seen[:, 0][~known] == 0).float().mean() > 0.9 or known.all()
    if recipe == "none":
        assert torch.equal(found, masks)


# ----------------------------------------------------------------------------------------------------------------- cells


def test_cells_have_the_most_frequent_known_class():
    masks = torch.tensor([[[0, 0, 1, 2], [0, 1, 1, 1], [255, 255, 2, 255], [255, 2, 2, 2]]])
    assert cell_classes(masks, (2, 2), 3).tolist() == [[[0, 1], [-1, 2]]]


def test_matches_of_equal_features_are_right_by_chance():
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    pairs = near_cells(whole, whole, (4, 4), 1.0)
    right, guess = right_matches(torch.ones(1, 16, 3), torch.ones(1, 16, 3), pairs)
    assert right == pytest.approx(guess)
    features = torch.eye(16)[None]
    assert right_matches(features, features, pairs)[0] == 1.0
    assert right_matches(features, features.flip(1), pairs)[0] == 0.0


def test_every_system_of_views_is_measured_by_cells_on_pictures_with_masks():
    settings = {"encoder": "conv-cells", "epochs": 1, "batch_size": 16, "hidden": 16, "projection": 8}
    rows = Experiment.resolve("simclr", "shapes?train=32&test=8", overrides=settings).run(0)
    assert {"test/correspondence", "test/cell_miou", "valid/correspondence"} <= set(rows[-1])
    rows = Experiment.resolve("simclr", "shapes?train=32&test=8", overrides=settings | {"encoder": "mlp-s"}).run(0)
    assert "test/correspondence" not in rows[-1]


# ----------------------------------------------------------------------------------------------------------- fine-tuning

DATA = "shapes?train=32&test=8"
SMALL = {"encoder": "conv-cells", "head_width": 8, "batch_size": 16, "epochs": 2, "evaluate_every": 2}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a system of views."""
    root = tmp_path_factory.mktemp("runs")
    config = Experiment.resolve(
        "simclr", DATA, overrides={"encoder": "conv-cells", "epochs": 1, "batch_size": 16, "hidden": 8, "projection": 4}
    ).config
    return training.train("simclr", config, data=DATA, out=root, name="parent", say=lambda _: None).path


def test_fine_tuning_starts_from_a_run_and_a_frozen_encoder_stays(parent, tmp_path):
    config = Experiment.resolve(
        "finetune-seg", DATA, overrides=SMALL | {"start": str(parent), "frozen": True, "encoder": "resnet-s"}
    ).config
    run = training.train("finetune-seg", config, data=DATA, out=tmp_path, name="child", say=lambda _: None)
    before, after = Run.open(parent).load_weights(), run.load_weights()
    names = [name for name in after if name.startswith("encoder.")]
    assert names
    for name in names:
        if "num_batches" not in name:
            assert torch.equal(after[name], before[name]), name
    assert {"test/miou", "test/dice", "test/pixel_accuracy"} <= set(run.metrics()[-1])
    assert "Segmentations" in (run.path / "report.html").read_text()
    # The child stands alone: it is loaded and measured without its parent.
    parent.rename(parent.with_name("gone"))
    try:
        assert training.evaluate(run.path, say=lambda _: None)["miou"] == run.metrics()[-1]["test/miou"]
    finally:
        parent.with_name("gone").rename(parent)


def test_full_fine_tuning_changes_the_encoder(parent, tmp_path):
    config = Experiment.resolve("finetune-seg", DATA, overrides=SMALL | {"start": str(parent), "head": "linear"}).config
    run = training.train("finetune-seg", config, data=DATA, out=tmp_path, name="child", say=lambda _: None)
    before, after = Run.open(parent).load_weights(), run.load_weights()
    assert not torch.equal(after["encoder.stem.0.weight"], before["encoder.stem.0.weight"])


def test_a_step_trains_with_the_public_loss(monkeypatch):
    calls = []
    function = finetune_seg.pixel_cross_entropy
    monkeypatch.setattr(
        finetune_seg, "pixel_cross_entropy", lambda logits, masks: (calls.append(masks), function(logits, masks))[1]
    )
    rows = Experiment.resolve("finetune-seg", DATA, overrides=SMALL).run(0)
    assert len(calls) == 4
    assert calls[0].shape == (16, 32, 32)
    assert np.isfinite(rows[-1]["train/loss"])


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, parent):
    config = Experiment.resolve("finetune-seg", DATA, overrides=SMALL | {"start": str(parent)}).config
    need_equal_ends(monkeypatch, finetune_seg.FinetuneSeg, "finetune-seg", config, DATA, 3, tmp_path)


def test_trains_from_the_command_line_on_a_folder_with_masks(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "mine" / kind).mkdir(parents=True)
    for n in range(24):
        classes = np.zeros((32, 32), np.uint8)
        classes[:, : rng.integers(8, 24)] = 1
        Image.fromarray(np.stack([classes * 120 + 60] * 3, 2)).save(tmp_path / "mine" / "images" / f"{n}.png")
        Image.fromarray(classes).save(tmp_path / "mine" / "masks" / f"{n}.png")
    words = ["train", "finetune-seg", "--data", f"masks:{tmp_path / 'mine'}?size=32", "--no-frozen"]
    for name, value in (SMALL | {"epochs": 12, "evaluate_every": 12, "batch_size": 8}).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main([*words, "--lr", "0.1", "--out", str(tmp_path), "--name", "run"]) == 0
    rows = Run.open(tmp_path / "run").metrics()
    assert rows[-1]["test/miou"] > 0.6
    assert rows[-1]["test/pixel_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("settings", "source", "message"),
    [
        ({"encoder": "mlp-s"}, DATA, "no feature map"),
        ({"dropout": 1.5}, DATA, "dropout"),
        ({"start": "/nowhere"}, DATA, "nowhere"),
        ({}, "digits", "for the task views, not for dense"),
    ],
)
def test_bad_settings_are_named(settings, source, message):
    with pytest.raises(CounterpointError, match=message):
        Experiment.resolve("finetune-seg", source, overrides=SMALL | settings).run(0)


def test_encoder_of_the_run_replaces_the_setting(parent):
    config = SMALL | {"start": str(parent), "encoder": "vit-s"}
    task = Experiment.resolve("finetune-seg", "shapes?train=32&test=8&size=16", overrides=config).task()
    assert task.facts["encoder"] == "conv-cells"  # of the run, not of the settings


def test_regions_of_other_data_are_refused():
    trained = Experiment.resolve("finetune-seg", DATA, overrides=SMALL).task()
    other = Experiment.resolve("finetune-seg", f"{DATA}&by=shape", overrides=SMALL).task()
    with pytest.raises(CounterpointError, match="has the regions background, disc"):
        other.check_facts(trained.facts)


def test_source_of_pictures_alone_is_refused():
    from counterpoint.tasks.dense import DenseTask

    with pytest.raises(CounterpointError, match="no class for each pixel"):
        DenseTask(data.load("digits"), Experiment.resolve("finetune-seg", DATA, overrides=SMALL).config)
