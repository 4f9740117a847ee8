"""finetune-det: detect objects with the encoder of any trained run, the field's downstream test of learned features.

Tian, Shen, Chen, He: "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, arXiv 1904.01355.
Ren, He, Girshick, Sun: "Faster R-CNN", NeurIPS 2015, arXiv 1506.01497, with the pyramid of Lin et al., arXiv 1612.03144.

    counterpoint train finetune-det --from runs/x --data coco:mine.json             fine-tune encoder and detector
    counterpoint train finetune-det --from runs/x --data coco:mine.json --frozen    train the detector alone
    counterpoint train finetune-det --encoder timm:resnet50 --pretrained --data coco:mine.json --head faster-rcnn

The detectors are torchvision's, over a feature pyramid on the encoder's maps (`encoders/box_heads.py`). A vision transformer has a
single map: it is the pyramid's finest level, and coarser levels follow from it. With `--frozen` the encoder keeps its weights and
its running statistics. Faster R-CNN samples by random numbers that differ between processes; FCOS gives the same numbers with any
number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.encoders.box_heads import HEADS
from counterpoint.encoders.maps import feature_maps
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.boxes import BoxesConfig, BoxesLearner
from counterpoint.tasks.downstream import DownstreamLearner, check_frozen

GROUPS = 32  # of the channels, in torchvision's normalisation of FCOS's head


@dataclass
class FinetuneDetConfig(BoxesConfig):
    """Settings of the fine-tuning. Defaults are common values for small sets of pictures."""

    epochs: int = 60
    batch_size: int = 16
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: int = 1
    frozen: bool = False
    """Keep the encoder as it is and train the detector alone."""
    head: Literal["fcos", "faster-rcnn"] = "fcos"
    """fcos: in one stage, each place of a map predicts a box. faster-rcnn: in two, proposals first."""
    width: int = 256
    """Channels of the feature pyramid and of the detector, a multiple of 32."""
    stride: int = 8
    """Least stride in pixels of the encoder's maps that the detector uses; 4 for small objects. Coarser maps all count."""

    counts = (*BoxesConfig.counts, "width", "stride")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % GROUPS:
            raise CounterpointError(f"width must be a multiple of {GROUPS}, got {self.width}")

    def check(self) -> None:
        super().check()
        check_frozen(self)


class FinetuneDet(DownstreamLearner, BoxesLearner):
    """An encoder with a detector on its maps."""

    def __init__(self, config: FinetuneDetConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        with torch.no_grad():
            maps = feature_maps(self.encoder.eval(), torch.zeros(1, data.channels, self.size, self.size))
        strides = [self.size / x.shape[2] for x in maps]
        self.first = next((n for n, stride in enumerate(strides) if stride >= config.stride), len(maps) - 1)
        shapes = [x.shape[1:] for x in maps[self.first :]]
        self.head = HEADS[config.head](shapes, self.size, len(self.regions), config.width)
        self.begin_training()

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the encoder's maps that the detector uses, the finest first."""
        return feature_maps(self.encoder, images)[self.first :]

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        return self.head.detect(self.maps(images), images)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (images,), ((boxes, kinds),) = batch["views"], batch["seen"]
        targets = [{"boxes": own[kind >= 0], "labels": kind[kind >= 0]} for own, kind in zip(boxes, kinds, strict=True)]
        terms = self.head.losses(self.maps(images), images, targets)
        return {"loss": torch.stack(list(terms.values())).sum(), **{k: v.detach() for k, v in terms.items()}}


SYSTEM = System(
    slug="finetune-det",
    task="boxes",
    config=FinetuneDetConfig,
    learner=FinetuneDet,
    data="shapes",
    recipe={
        "epochs": 40,
        "encoder": "resnet-s",
        "recipe": "shapes",
        "width": 64,
        "stride": 4,
        "lr": 1.6e-2,  # 1e-3 for a batch of 16
        "evaluate_every": 5,
    },
)
