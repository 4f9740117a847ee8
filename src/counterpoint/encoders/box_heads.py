"""Detect objects on an encoder's feature maps, with the detectors of torchvision: FCOS in one stage, Faster R-CNN in two.

A feature pyramid (arXiv 1612.03144) joins the maps; their strides are measured, so any encoder and any size of pictures fit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from counterpoint.core.distributed import global_mean, mean_of_total, row_counts

LEAST = 0.05  # score below which a detection is left out
MOST = 100  # detections of a picture
SCALES, RATIOS = (2, 4, 8), (0.5, 1.0, 2.0)  # of Faster R-CNN's anchors: sides in strides, and heights over widths
SIDE = 7  # of the map that Faster R-CNN cuts for a proposal
Targets = list[dict[str, Tensor]]  # "boxes" [k, 4] and "labels" [k] of each picture


class Pyramid(nn.Module):
    """Join maps of several resolutions, and add coarser ones.

    Args:
        channels: channels of each map, the finest first.
        width: channels of the result.
        stages: 1 adds two levels by convolutions, as FCOS; 2 adds one by pooling, as Faster R-CNN.
    """

    def __init__(self, channels: Sequence[int], width: int, stages: int) -> None:
        super().__init__()
        self.out_channels = width
        more = LastLevelP6P7(width, width) if stages == 1 else LastLevelMaxPool()
        self.network = FeaturePyramidNetwork(list(channels), width, more)

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        found: OrderedDict[str, Tensor] = self.network(OrderedDict((str(n), x) for n, x in enumerate(maps)))
        return found


class BoxHead(nn.Module):
    """A detector over feature maps. Subclasses write `build`, `losses` and `detect`.

    Args:
        shapes: [channels, height, width] of each map, the finest first.
        size: height and width of the pictures.
        classes: number of classes; class 0 is the background.
        width: channels of the pyramid.
    """

    stages = 1
    network: Any

    def __init__(self, shapes: Sequence[torch.Size], size: int, classes: int, width: int) -> None:
        super().__init__()
        self.size, self.levels = size, len(shapes)
        pyramid = Pyramid([shape[0] for shape in shapes], width, self.stages)
        with torch.no_grad():
            maps = pyramid([torch.zeros(1, *shape) for shape in shapes])
        self.network = self.build(pyramid, [size / x.shape[2] for x in maps.values()], classes)

    def build(self, pyramid: Pyramid, strides: list[float], classes: int) -> Any:
        """Build the network over the levels of a pyramid, of these strides in pixels."""
        raise NotImplementedError

    def pictures(self, images: Tensor) -> ImageList:
        """Return the pictures as torchvision's detectors take them."""
        return ImageList(images, [(self.size, self.size)] * len(images))

    def losses(self, maps: Sequence[Tensor], images: Tensor, targets: Targets) -> dict[str, Float[Tensor, ""]]:
        """Compute the terms of the loss, means over the batch of all processes.

        Args:
            maps: the encoder's maps, the finest first.
            images: [n, channels, size, size], of which the size is used.
            targets: the objects of each picture.
        """
        raise NotImplementedError

    def detect(self, maps: Sequence[Tensor], images: Tensor) -> list[dict[str, Tensor]]:
        """Return "boxes" [k, 4] in pixels, "labels" [k] and "scores" [k] of each picture, the best first."""
        raise NotImplementedError


class _Totals(FCOSHead):
    """FCOS's head with totals over the matched places in place of means; `matched` has their number."""

    matched = 0

    def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: Any) -> dict[str, Tensor]:
        self.matched = int(sum((numbers >= 0).sum() for numbers in matched_idxs))
        means = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return {name: value * max(1, self.matched) for name, value in means.items()}


class OneStage(BoxHead):
    """FCOS (arXiv 1904.01355): each place of a map scores the classes, and predicts its distances to the edges of a box.

    Its loss is divided by the number of places with an object, in the batch of all processes.
    """

    def build(self, pyramid: Pyramid, strides: list[float], classes: int) -> FCOS:
        anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        # The places lie in the middle of their cells, as in the paper; torchvision's lie at the cells' corners.
        anchors.cell_anchors = [
            anchor + stride / 2 for anchor, stride in zip(anchors.cell_anchors, strides, strict=True)
        ]
        head = _Totals(pyramid.out_channels, 1, classes)
        for layer in head.modules():
            if isinstance(layer, nn.GroupNorm):  # one channel of a map of one cell has no deviation
                layer.num_groups = min(layer.num_groups, pyramid.out_channels // 2)
        return FCOS(pyramid, classes, anchor_generator=anchors, head=head, score_thresh=LEAST, detections_per_img=MOST)

    def _outputs(self, maps: Sequence[Tensor], images: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """Return the head's outputs, the anchors of each picture, and the number of places of each level."""
        levels = list(self.network.backbone(maps).values())
        outputs = {name: value.float() for name, value in self.network.head(levels).items()}
        anchors = self.network.anchor_generator(self.pictures(images), levels)
        return outputs, anchors, [x.shape[2] * x.shape[3] for x in levels]

    def losses(self, maps: Sequence[Tensor], images: Tensor, targets: Targets) -> dict[str, Float[Tensor, ""]]:
        head = self.network.head
        head.matched = 0
        if len(images):
            outputs, anchors, places = self._outputs(maps, images)
            totals = self.network.compute_loss(targets, outputs, anchors, places)
        else:  # a process's share of a small batch
            none = maps[0].sum() * 0
            totals = dict.fromkeys(("classification", "bbox_regression", "bbox_ctrness"), none)
        count = max(1, sum(row_counts(head.matched, images.device)))
        return {name: mean_of_total(total, count) for name, total in totals.items()}

    def detect(self, maps: Sequence[Tensor], images: Tensor) -> list[dict[str, Tensor]]:
        outputs, anchors, places = self._outputs(maps, images)
        each = {name: list(value.split(places, 1)) for name, value in outputs.items()}
        split = [list(one.split(places)) for one in anchors]
        found: list[dict[str, Tensor]] = self.network.postprocess_detections(
            each, split, self.pictures(images).image_sizes
        )
        return found


class TwoStages(BoxHead):
    """Faster R-CNN (arXiv 1506.01497) with a pyramid: proposals, then their classes and boxes.

    The two stages sample anchors and proposals by PyTorch's own random numbers, which differ between processes.
    """

    stages = 2

    def build(self, pyramid: Pyramid, strides: list[float], classes: int) -> FasterRCNN:
        width = pyramid.out_channels
        sizes = tuple(tuple(scale * stride for scale in SCALES) for stride in strides)
        names = [str(n) for n in range(self.levels)]
        return FasterRCNN(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
            box_roi_pool=MultiScaleRoIAlign(names, SIDE, 2),
            box_head=TwoMLPHead(width * SIDE**2, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, classes),
            box_score_thresh=LEAST,
            box_detections_per_img=MOST,
        )

    def _run(
        self, maps: Sequence[Tensor], images: Tensor, targets: Targets | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        levels = OrderedDict((name, x.float()) for name, x in self.network.backbone(maps).items())
        pictures = self.pictures(images)
        proposals, first = self.network.rpn(pictures, levels, targets)
        found, second = self.network.roi_heads(levels, proposals, pictures.image_sizes, targets)
        return found, first | second

    def losses(self, maps: Sequence[Tensor], images: Tensor, targets: Targets) -> dict[str, Float[Tensor, ""]]:
        if len(images):
            terms = self._run(maps, images, targets)[1]
        else:  # a process's share of a small batch
            names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
            terms = dict.fromkeys(names, maps[0].sum() * 0)
        order = sorted(terms)  # equal on all processes
        return {name: global_mean(terms[name].expand(len(images))) for name in order}

    def detect(self, maps: Sequence[Tensor], images: Tensor) -> list[dict[str, Tensor]]:
        return self._run(maps, images, None)[0]


HEADS: dict[str, type[BoxHead]] = {"fcos": OneStage, "faster-rcnn": TwoStages}
