"""The task boxes: COCO's measures, boxes in views, both detectors, fine-tuning from any run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.fcos import FCOSHead

from counterpoint import cli, data, training
from counterpoint.data.dense import Boxes
from counterpoint.encoders.box_heads import HEADS
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.classics import finetune_det
from counterpoint.tasks.boxes import BoxesTask, padded
from counterpoint.tasks.measures.boxes import Detections, average_precision
from counterpoint.views.images import ViewPipeline
from counterpoint.views.images.boxes import cropped_boxes
from counterpoint.views.images.masks import cropped_masks
from interrupted import need_equal_ends
from launch import command_over_processes

DATA = "shapes?train=32&test=8"
SMALL = {
    "encoder": "conv-s", "width": 32, "batch_size": 16, "epochs": 2, "evaluate_every": 2, "warmup_epochs": 0, "stride": 4,
}  # fmt: skip

BOTH = pytest.mark.parametrize("head", ["fcos", pytest.param("faster-rcnn", marks=pytest.mark.slow)])


def boxes(*rows: tuple[float, ...]) -> Boxes:
    """Return boxes of rows (left, top, right, bottom, class)."""
    of = np.array(rows, np.float32).reshape(-1, 5)
    return Boxes(of[:, :4], of[:, 4].astype(np.int64), np.arange(len(of)))


def found(*rows: tuple[float, ...]) -> Detections:
    """Return detections of rows (left, top, right, bottom, class, score)."""
    of = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(of[:, :4], of[:, 4].astype(np.int64), of[:, 5])


# -------------------------------------------------------------------------------------------------------------- measures


def test_precision_equals_torchmetrics():
    from torchmetrics.detection import MeanAveragePrecision

    rng = np.random.default_rng(0)
    truth, given = [], []
    for _ in range(12):
        corners = rng.uniform(0, 50, (rng.integers(0, 5), 2)).astype(np.float32)
        own = np.concatenate([corners, corners + rng.uniform(5, 20, corners.shape)], 1)
        labels = rng.integers(1, 4, len(own))
        truth.append(Boxes(own.astype(np.float32), labels, np.arange(len(own))))
        moved = np.concatenate([own + rng.normal(0, 1.5, own.shape), own[:1] + 30]).astype(np.float32)
        kinds = np.concatenate([np.where(rng.random(len(own)) < 0.8, labels, 1), labels[:1]])
        given.append(Detections(moved, kinds, rng.random(len(moved)).astype(np.float32)))
    theirs = MeanAveragePrecision(iou_type="bbox", class_metrics=True)
    tensors = [
        [{"boxes": torch.from_numpy(one.corners), "labels": torch.from_numpy(one.labels)} for one in side]
        for side in (given, truth)
    ]
    for one, detections in zip(tensors[0], given, strict=True):
        one["scores"] = torch.from_numpy(detections.scores)
    theirs.update(*tensors)
    wanted = theirs.compute()
    mine, each = average_precision(truth, given)
    for name, key in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75"), ("ar100", "mar_100")):
        assert mine[name] == pytest.approx(float(wanted[key]), abs=1e-6), name
    assert 0.1 < mine["ap"] < 0.9
    of_class = dict(zip(wanted["classes"].tolist(), wanted["map_per_class"].tolist(), strict=True))
    assert {number: pair[0] for number, pair in each.items()} == pytest.approx(of_class, abs=1e-6)


def test_precision_of_few_boxes():
    truth = [boxes((0, 0, 10, 10, 1)), boxes((5, 5, 9, 9, 2), (20, 20, 30, 30, 1)), boxes()]
    right = [found((0, 0, 10, 10, 1, 0.9)), found((5, 5, 9, 9, 2, 0.8), (20, 20, 30, 30, 1, 0.7)), found()]
    assert average_precision(truth, right)[0] == pytest.approx(dict.fromkeys(("ap", "ap50", "ap75", "ar100"), 1.0))
    # A false detection in a picture without objects, more certain than all others, halves a class's precision.
    wrong = [right[0], right[1], found((0, 0, 5, 5, 2, 0.99))]
    assert average_precision(truth, wrong)[1][2] == pytest.approx((0.5, 0.5), abs=0.01)
    # An IoU of 0.6 is right for three of ten thresholds: 0.5, 0.55 and 0.6.
    loose = [found((0, 0, 10, 6.01, 1, 0.9)), right[1], found()]
    measured, each = average_precision(truth, loose)
    assert measured["ap50"] == pytest.approx(1.0)
    assert each[1][0] < 0.7
    for given in ([found()] * 3, [found((0, 0, 10, 10, 3, 1.0)), found(), found()]):  # none, and an unknown class
        assert average_precision(truth, given) == (
            dict.fromkeys(("ap", "ap50", "ap75", "ar100"), 0.0),
            {1: (0, 0), 2: (0, 0)},
        )
    assert average_precision([boxes()], [found()])[1] == {}


# ----------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("recipe", ["mae", "shapes", "weak", "none"])
def test_boxes_are_cut_and_mirrored_as_masks(recipe):
    rng = np.random.default_rng(0)
    each, masks = [], np.zeros((24, 32, 32), np.uint8)
    for row in range(24):
        left, top = rng.integers(0, 20, 2)
        wide, high = rng.integers(4, 12, 2)
        masks[row, top : top + high, left : left + wide] = 1
        each.append(boxes((left, top, left + wide, top + high, 1)))
    (view,) = ViewPipeline(32, 1, recipe).draw((24, 3, 32, 32), torch.Generator().manual_seed(1))
    cut, kept = cropped_boxes(padded(each)[0], view)
    shown = cropped_masks(torch.from_numpy(masks), view, fill=0)
    seen = 0
    for row in range(24):
        at = shown[row].nonzero()
        if not len(at):
            assert (cut[row, 0, 2:] - cut[row, 0, :2]).prod() < 4
            continue
        (top, left), (bottom, right) = at.amin(0).tolist(), (at.amax(0) + 1).tolist()
        scale = float((32 / view.boxes[row, 2:].float()).max())
        assert cut[row, 0].tolist() == pytest.approx([left, top, right, bottom], abs=scale + 0.01)
        seen += int(kept[row, 0])
    assert seen > 10
    if recipe == "none":
        assert torch.equal(cut, padded(each)[0])


def test_box_that_a_view_hardly_shows_does_not_count():
    (view,) = ViewPipeline(16, 1, "none").draw((1, 3, 16, 16), torch.Generator())
    view.boxes[:] = torch.tensor([0, 8, 16, 16])  # the right half, and ground beside the picture
    given = torch.tensor([[[0.0, 0.0, 10.0, 8.0], [0.0, 0.0, 11.0, 8.0], [0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 8.5, 8.0]]])
    cut, kept = cropped_boxes(given, view)
    assert kept.tolist() == [[False, True, False, False]]  # 2/10 of it, 3/11 of it, none, thinner than a pixel
    assert cut[0, 1].tolist() == [0.0, 0.0, 3.0, 8.0]


# ------------------------------------------------------------------------------------------------------------- detectors


def drawn_maps(count: int, sides: tuple[int, ...] = (8, 4)) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 16, side, side, generator=generator) for side in sides], torch.zeros(count, 3, 32, 32)


TARGETS = [
    {"boxes": torch.tensor([[2.0, 3.0, 15.0, 17.0], [16.0, 12.0, 30.0, 31.0]]), "labels": torch.tensor([1, 2])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    {"boxes": torch.tensor([[4.0, 4.0, 12.0, 12.0]]), "labels": torch.tensor([2])},
]


class Fixed(torch.nn.Module):
    """A backbone that gives the pyramid of known maps, whatever the pictures."""

    out_channels = 64

    def __init__(self, pyramid: torch.nn.Module, maps: list[torch.Tensor]) -> None:
        super().__init__()
        self.pyramid, self.maps = pyramid, maps

    def forward(self, _images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid(self.maps)


@pytest.mark.parametrize("name", list(HEADS))
def test_loss_and_detections_are_those_of_torchvision_s_whole_detector(name):
    torch.manual_seed(0)
    head = HEADS[name]([torch.Size((16, 8, 8)), torch.Size((16, 4, 4))], 32, 3, 64)
    maps, images = drawn_maps(3)

    def seeded(training: bool, run: Callable[[], Any]) -> Any:
        head.train(training)
        torch.manual_seed(3)
        return run()

    losses = seeded(True, lambda: head.losses(maps, images, TARGETS))
    detections = seeded(False, lambda: head.detect(maps, images))
    whole = head.network
    whole.backbone = Fixed(whole.backbone, maps)
    whole.transform.min_size, whole.transform.max_size = (32,), 32  # pictures keep their size
    whole.transform.torch_choice = lambda sizes: sizes[0]  # without a random number
    if name == "fcos":  # its own head, which divides by the places of its batch
        state = whole.head.state_dict()
        whole.head = FCOSHead(64, 1, 3)
        whole.head.load_state_dict(state)
    wanted = seeded(True, lambda: whole(list(images), TARGETS))
    assert set(losses) == set(wanted)
    for term, value in wanted.items():
        torch.testing.assert_close(losses[term], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(detections, seeded(False, lambda: whole(list(images))), strict=True):
        for key in ("boxes", "labels", "scores"):
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-4)


def test_places_of_fcos_lie_in_the_middle_of_their_cells():
    head = HEADS["fcos"]([torch.Size((16, 4, 4))], 32, 3, 32)
    maps, images = drawn_maps(1, (4,))
    levels = list(head.network.backbone(maps).values())
    (anchors,) = head.network.anchor_generator(head.pictures(images), levels)
    places = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert places[:2].tolist() == [[4.0, 4.0], [12.0, 4.0]]
    assert places[15].tolist() == [28.0, 28.0]


@pytest.mark.parametrize("name", list(HEADS))
def test_share_without_pictures_has_a_loss_of_zero(name):
    head = HEADS[name]([torch.Size((16, 8, 8))], 32, 3, 32)
    maps, images = drawn_maps(0, (8,))
    maps[0].requires_grad_()
    terms = head.losses(maps, images, [])
    torch.stack(list(terms.values())).sum().backward()
    assert all(float(value.detach()) == 0 for value in terms.values())


def test_one_picture_on_a_map_of_one_cell_is_detected():
    head = HEADS["fcos"]([torch.Size((16, 4, 4))], 32, 3, 32).eval()  # the coarsest map has one cell
    maps, images = drawn_maps(3, (4,))
    alone = [head.detect([maps[0][n : n + 1]], images[:1])[0] for n in range(3)]
    for one, other in zip(alone, head.detect(maps, images), strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a system of views."""
    root = tmp_path_factory.mktemp("runs")
    settings = {"encoder": "conv-s", "epochs": 1, "batch_size": 16, "hidden": 8, "projection": 4}
    config = Experiment.resolve("simclr", DATA, overrides=settings).config
    return training.train("simclr", config, data=DATA, out=root, name="parent", say=lambda _: None).path


def test_fine_tuning_starts_from_a_run_and_a_frozen_encoder_stays(parent, tmp_path):
    settings = SMALL | {"start": str(parent), "frozen": True, "encoder": "resnet-s"}
    config = Experiment.resolve("finetune-det", DATA, overrides=settings).config
    run = training.train("finetune-det", config, data=DATA, out=tmp_path, name="child", say=lambda _: None)
    before, after = Run.open(parent).load_weights(), run.load_weights()
    names = [name for name in after if name.startswith("encoder.") and "num_batches" not in name]
    assert names
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert {"test/ap", "test/ap50", "test/ap75", "test/ar100"} <= set(run.metrics()[-1])
    page = (run.path / "report.html").read_text()
    assert "Detections" in page
    assert "Classes of the objects" in page
    assert training.evaluate(run.path, say=lambda _: None)["ap"] == run.metrics()[-1]["test/ap"]


@BOTH
def test_full_fine_tuning_changes_the_encoder(parent, tmp_path, head, undrawn):
    config = Experiment.resolve("finetune-det", DATA, overrides=SMALL | {"start": str(parent), "head": head}).config
    run = training.train("finetune-det", config, data=DATA, out=tmp_path, name="child", say=lambda _: None)
    before, after = Run.open(parent).load_weights(), run.load_weights()
    assert not torch.equal(after["encoder.stem.0.weight"], before["encoder.stem.0.weight"])
    assert np.isfinite(run.metrics()[-1]["train/loss"])


@BOTH
def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, parent, head):
    config = Experiment.resolve("finetune-det", DATA, overrides=SMALL | {"start": str(parent), "head": head}).config
    need_equal_ends(monkeypatch, finetune_det.FinetuneDet, "finetune-det", config, DATA, 3, tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path, undrawn):
    data = f"{DATA}&least=1"
    settings = SMALL | {"encoder": "conv-group", "batch_size": 5, "optimizer": "sgd", "lr": 0.5}
    words = ["train", "finetune-det", "--data", data, "--out", str(tmp_path), "--name", "two"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command_over_processes(words, tmp_path)
    config = Experiment.resolve("finetune-det", data, overrides=settings).config
    run = training.train("finetune-det", config, data=data, out=tmp_path, name="one", say=lambda _: None)
    mine, other = run.load_weights(), Run.open(tmp_path / "two").load_weights()
    for name, value in mine.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "source", "message"),
    [
        ({"encoder": "mlp-s"}, DATA, "no feature map"),
        ({"width": 40}, DATA, "multiple of 32"),
        ({"stride": 0}, DATA, "stride"),
        ({"frozen": True, "lora": 4, "start": "x"}, DATA, "--frozen keeps the encoder"),
        ({}, "digits", "for the task views, not for dense"),
        ({}, "phantoms", "has no boxes around objects"),
    ],
)
def test_bad_settings_are_named(settings, source, message):
    with pytest.raises(CounterpointError, match=message):
        Experiment.resolve("finetune-det", source, overrides=SMALL | settings).run(0)


def test_data_of_other_classes_are_refused():
    trained = Experiment.resolve("finetune-det", DATA, overrides=SMALL).task()
    other = Experiment.resolve("finetune-det", f"{DATA}&by=shape", overrides=SMALL).task()
    with pytest.raises(CounterpointError, match="has the classes disc"):
        other.check_facts(trained.facts)
    with pytest.raises(CounterpointError, match="no boxes around objects"):
        BoxesTask(data.load("digits"), trained.config)


# -------------------------------------------------------------------------------------------------------- the user's own


def written(root: Path, count: int, first: int = 0, **more: object) -> Path:
    """Write pictures with a red square each, and their file in COCO's layout."""
    root.mkdir()
    content: dict[str, list[dict[str, object]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 5, "name": "red"}],
    }
    for n in range(count):
        rng = np.random.default_rng(first + n)
        pixels = np.full((32, 48, 3), 60, np.uint8)
        left, top, side = (int(x) for x in (rng.integers(0, 32), rng.integers(0, 16), rng.integers(10, 16)))
        pixels[top : top + side, left : left + side] = (220, 30, 30)
        Image.fromarray(pixels).save(root / f"{n}.png")
        content["images"].append({"id": n + 1, "file_name": f"{n}.png", "width": 48, "height": 32})
        box = {"id": n + 1, "image_id": n + 1, "category_id": 5, "bbox": [left, top, side, side]}
        content["annotations"].append(box | more)
    (root / "boxes.json").write_text(json.dumps(content))
    return root / "boxes.json"


@pytest.mark.slow
@pytest.mark.parametrize("head", list(HEADS))
def test_most_objects_of_own_pictures_are_detected(tmp_path, head, undrawn):
    mine, held = written(tmp_path / "mine", 48), written(tmp_path / "held", 12, first=100)
    words = ["train", "finetune-det", "--data", f"coco:{mine}?size=48&test={held}", "--head", head]
    for name, value in (SMALL | {"epochs": 20, "evaluate_every": 20, "batch_size": 8, "lr": 0.1}).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "run"]) == 0
    assert Run.open(tmp_path / "run").metrics()[-1]["test/ap50"] > 0.4
    learner = load_learner(tmp_path / "run")
    assert learner.regions == ("background", "red")


def test_split_without_objects_is_refused(tmp_path):
    mine, held = written(tmp_path / "mine", 20), written(tmp_path / "held", 4, first=9, category_id=9)
    with pytest.raises(DataError, match="no picture of the test split has an object"):
        Experiment.resolve("finetune-det", f"coco:{mine}?size=32&test={held}", overrides=SMALL).run(0)
