"""Propose boxes by a detector of torchvision: the regions of a picture that may hold an object.

    torchvision:NAME            a detector with its published weights, downloaded on first use: fasterrcnn_resnet50_fpn
    torchvision:NAME/FILE       with the weights of a file, a state that `torch.save` or safetensors wrote

A detector in two stages (Faster, Mask and Keypoint R-CNN) gives the proposals of its first stage, with their objectness. One in a
single stage (RetinaNet, FCOS, SSD) gives its detections, whatever their class. The detector scales and normalises pictures
itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.encoders.images import fetched
from counterpoint.errors import CounterpointError, unknown
from counterpoint.waiting import patient_track

FORM = "torchvision:NAME or torchvision:NAME/FILE"
EDGE = 1e-4  # objectness stays this far from 0 and 1, so that logits are finite
LEAST = 1.0  # pixels of a box's side


class Proposed(NamedTuple):
    """Boxes of one picture, the best ones first."""

    corners: NDArray[np.float32]  # [n, 4] left, top, right, bottom in pixels
    scores: NDArray[np.float32]  # [n] logits of objectness


def detectors() -> list[str]:
    """Return the names of torchvision's detectors."""
    from torchvision import models

    return list(models.list_models(module=models.detection))


def check_detector(name: str) -> None:
    """Raise CounterpointError for a name that `build_detector` does not know."""
    library, _, rest = name.partition(":")
    if library != "torchvision" or not rest:
        raise CounterpointError(f"unknown detector '{name}'; name {FORM}, such as torchvision:fasterrcnn_resnet50_fpn")
    if (model := rest.partition("/")[0]) not in detectors():
        raise unknown("detector of torchvision", model, detectors())


def build_detector(name: str) -> nn.Module:
    """Load a detector by its name (see the module), in evaluation mode.

    Raises CounterpointError for an unknown name, a file that does not fit, and weights that cannot be downloaded.
    """
    check_detector(name)
    from torchvision import models

    model, _, file = name.partition(":")[2].partition("/")
    if not file:
        network: Any = fetched(lambda: models.get_model(model, weights="DEFAULT"), name)
        return network.eval()
    state = _state(Path(file), name)
    classes = _classes(state)
    more = {"num_classes": classes} if classes else {}
    try:
        network = models.get_model(model, weights=None, weights_backbone=None, **more)
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise CounterpointError(
            f"{name}: the weights do not fit the detector: {' '.join(str(error).split())[:200]}"
        ) from error
    return network.eval()


def _state(file: Path, name: str) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, pickle, zipfile and safetensors
        raise CounterpointError(
            f"{name}: {file} cannot be read as weights ({type(error).__name__}); name a file of a state that torch.save or "
            "safetensors wrote"
        ) from error
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CounterpointError(f"{name}: {file} holds no state of a network; save network.state_dict()")
    return found


def _classes(state: dict[str, Tensor]) -> int:
    """Return the number of classes of a two-stage detector's state; 0 where its head is another."""
    head = state.get("roi_heads.box_predictor.cls_score.weight")
    return 0 if head is None else len(head)


def digest(network: nn.Module) -> str:
    """Return hexadecimal digits that identify a network's weights."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


@torch.no_grad()
def propose(network: nn.Module, pictures: Sequence[NDArray[np.uint8]], count: int) -> list[Proposed]:
    """Return the best proposals of each picture, at most `count` of them; boxes thinner than a pixel are left out.

    Args:
        network: a detector of torchvision, in evaluation mode.
        pictures: uint8 [h, w, 3] of any sizes.
        count: maximum number, at least 1.
    """
    device = next(network.parameters()).device
    found = []
    for pixels in patient_track(pictures, "proposing boxes"):
        image = torch.from_numpy(np.array(pixels)).to(device).permute(2, 0, 1).float() / 255
        two_stages = hasattr(network, "rpn")
        boxes, probability = (_first_stage if two_stages else _detections)(network, image, count)
        wide = (boxes[:, 2:] - boxes[:, :2] >= LEAST).all(1)
        boxes, probability = boxes[wide][:count], probability[wide][:count]
        found.append(Proposed(boxes.cpu().numpy(), torch.logit(probability.float(), EDGE).cpu().numpy()))
    return found


def _first_stage(network: Any, image: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return boxes and objectness of the proposal network, sorted."""
    images, _ = network.transform([image])
    maps = network.backbone(images.tensors)
    maps = {"0": maps} if isinstance(maps, Tensor) else maps
    rpn, levels = network.rpn, list(maps.values())
    objectness, deltas = rpn.head(levels)
    anchors = rpn.anchor_generator(images, levels)
    shapes = [(part[0].shape[0], part[0].shape[1] * part[0].shape[2]) for part in objectness]
    per_level = [anchors_of * places for anchors_of, places in shapes]
    flat = [torch.cat([_rows(part, size) for part in parts]) for parts, size in ((objectness, 1), (deltas, 4))]
    boxes = rpn.box_coder.decode(flat[1], anchors).view(1, -1, 4)
    most = rpn._post_nms_top_n
    try:
        rpn._post_nms_top_n = {"training": count, "testing": count}
        kept, scores = rpn.filter_proposals(boxes, flat[0].view(1, -1), images.image_sizes, per_level)
    finally:
        rpn._post_nms_top_n = most
    sizes = torch.tensor(images.image_sizes[0][::-1] * 2, device=image.device)
    own = torch.tensor([image.shape[2], image.shape[1]] * 2, device=image.device)
    order = scores[0].argsort(descending=True, stable=True)
    return (kept[0] * own / sizes)[order], scores[0][order]


def _rows(part: Tensor, size: int) -> Tensor:
    """Return a level's numbers [1, anchors * size, h, w] as rows [h * w * anchors, size], as torchvision orders them."""
    _, channels, high, wide = part.shape
    return part.view(1, channels // size, size, high, wide).permute(0, 3, 4, 1, 2).reshape(-1, size)


def _detections(network: Any, image: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the detections of a single-stage network, whatever their class."""
    kept = network.score_thresh, network.detections_per_img
    try:
        network.score_thresh, network.detections_per_img = 0.0, count
        (found,) = network([image])
    finally:
        network.score_thresh, network.detections_per_img = kept
    order = found["scores"].argsort(descending=True, stable=True)
    return found["boxes"][order], found["scores"][order]
