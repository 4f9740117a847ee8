"""Detectors of torchvision as proposers: the same boxes as their own proposal network, files, caching, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from counterpoint.data.coco import load
from counterpoint.data.regions import UNKNOWN, iou
from counterpoint.encoders import detectors
from counterpoint.errors import CounterpointError

TWO = "fasterrcnn_mobilenet_v3_large_320_fpn"
ONE = "ssdlite320_mobilenet_v3_large"


def pixels(seed: int = 0, shape: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*shape, 3), np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the states of small detectors with random weights."""
    out = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    two = models.get_model(TWO, weights=None, weights_backbone=None, num_classes=3)
    torch.nn.init.normal_(two.rpn.head.cls_logits.weight, std=0.5)
    save_file(two.state_dict(), out / "two.safetensors")
    torch.save({"model": models.get_model(ONE, weights=None, weights_backbone=None).state_dict()}, out / "one.pt")
    torch.save({"x": 1}, out / "odd.pt")
    (out / "broken.pt").write_bytes(b"x")
    return {"two": out / "two.safetensors", "one": out / "one.pt", "odd": out / "odd.pt", "broken": out / "broken.pt"}


def test_proposals_are_those_of_the_detector_s_own_first_stage(weights: dict[str, Path]) -> None:
    network = detectors.build_detector(f"torchvision:{TWO}/{weights['two']}")
    assert not network.training
    picture = pixels()
    (found,) = detectors.propose(network, [picture], 150)  # as many as this detector keeps itself
    with torch.no_grad():
        images, _ = network.transform([torch.from_numpy(picture).permute(2, 0, 1).float() / 255])
        theirs = network.rpn(images, network.backbone(images.tensors))[0][0]
    high, wide = images.image_sizes[0]
    theirs = (theirs * torch.tensor([60 / wide, 40 / high] * 2)).numpy()
    theirs = theirs[(theirs[:, 2:] - theirs[:, :2] >= 1).all(1)]
    np.testing.assert_allclose(found.corners, theirs, rtol=1e-4, atol=1e-3)
    assert (np.diff(found.scores) <= 0).all()
    (few,) = detectors.propose(network, [picture], 5)
    np.testing.assert_allclose(few.corners, found.corners[:5], rtol=1e-4, atol=1e-3)


def test_a_detector_of_one_stage_gives_its_detections(weights: dict[str, Path]) -> None:
    network = detectors.build_detector(f"torchvision:{ONE}/{weights['one']}")
    (found,) = detectors.propose(network, [pixels()], 12)
    assert 0 < len(found.scores) <= 12
    assert np.isfinite(found.scores).all()
    assert (found.corners >= 0).all()
    assert (found.corners <= [60, 40, 60, 40]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:detr", "name torchvision:NAME or torchvision:NAME/FILE"),
        ("torchvision:resnet18", "unknown detector of torchvision 'resnet18'"),
        (f"torchvision:{TWO}/{{broken}}", "cannot be read as weights"),
        (f"torchvision:{TWO}/{{odd}}", "holds no state of a network"),
        (f"torchvision:{ONE}/{{two}}", "the weights do not fit the detector"),
        (f"torchvision:{TWO}/nowhere.pt", "cannot be read as weights"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, message: str, weights: dict[str, Path]) -> None:
    with pytest.raises(CounterpointError, match=message):
        detectors.build_detector(name.format(**weights))


def test_pictures_of_ones_own_get_a_detector_s_proposals_once(
    weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "bare").mkdir()
    for n in range(6):
        Image.fromarray(pixels(n)).save(tmp_path / f"{n}.png")
        content["images"].append({"id": n, "file_name": f"{n}.png", "width": 60, "height": 40})
        content["annotations"].append({"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 60, 40]})
        if n < 1:
            Image.fromarray(pixels(20 + n)).save(tmp_path / "bare" / f"{n}.png")
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    calls: list[int] = []
    real = detectors.propose
    monkeypatch.setattr(detectors, "propose", lambda *a: (calls.append(1), real(*a))[1])

    def found():
        return load(
            str(tmp_path / "boxes.json"), target=str(tmp_path / "bare"), size=60, proposals=20,
            detector=f"torchvision:{TWO}/{weights['two']}",
        )  # fmt: skip

    data = found()
    one = data.train.proposals(0)
    assert one.corners.shape == (20, 4)
    objects = np.array([[0, 0, 60, 40]], np.float32)
    assert ((iou(one.corners, objects)[:, 0] >= 0.5) == (one.labels == 0)).all()
    assert (data.train.proposals(len(data.train) - 1).labels == UNKNOWN).all()
    assert any("objects with an IoU of 0.5 or more" in note for note in data.notes)
    again = found().train.proposals(0)
    assert (again.corners == one.corners).all()
    assert len(calls) == 2  # one for each domain; the second time both are read
