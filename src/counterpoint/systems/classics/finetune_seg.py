"""finetune-seg: segment pictures with the encoder of any trained run, the field's downstream test of learned features.

Long, Shelhamer, Darrell: "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, arXiv 1411.4038.

    counterpoint train finetune-seg --from runs/x --data masks:mine                 fine-tune encoder and head
    counterpoint train finetune-seg --from runs/x --data masks:mine --frozen        train the head alone
    counterpoint train finetune-seg --encoder timm:resnet18 --pretrained --data masks:mine

The head is FCN's without skips, as in the transfer of MoCo and PixPro to Cityscapes. On the last feature map it has two 3 x 3
convolutions with batch normalisation and ReLU (none with `--head linear`). Dropout and a 1 x 1 convolution to the classes follow.
Logits are upsampled bilinearly. With `--frozen` the encoder keeps its weights and its running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.maps import feature_map, map_shape
from counterpoint.systems.base import System
from counterpoint.tasks.dense import LAPTOP, DenseConfig, DenseLearner, pixel_cross_entropy
from counterpoint.tasks.downstream import DownstreamLearner, check_frozen


@dataclass
class FinetuneSegConfig(DenseConfig):
    """Settings of the fine-tuning. Defaults are common values for small sets of pictures."""

    epochs: int = 60
    batch_size: int = 16
    recipe: str = "supervised"
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_epochs: int = 1
    frozen: bool = False
    """Keep the encoder as it is and train the head alone."""
    head: Literal["fcn", "linear"] = "fcn"
    """fcn: two convolutions before the classes. linear: a linear layer on each cell."""
    head_width: int = 128
    """Channels of the head's convolutions, at least 1."""
    dropout: float = 0.1
    """Share of the head's channels to drop in training, 0 to 1."""

    counts = (*DenseConfig.counts, "head_width")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("dropout")

    def check(self) -> None:
        super().check()
        check_frozen(self)


class FinetuneSeg(DownstreamLearner, DenseLearner):
    """An encoder with a fully convolutional head."""

    def __init__(self, config: FinetuneSegConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        width, classes = config.head_width, len(self.regions)
        dim = self.encoder.dim
        layers: list[nn.Module] = []
        if config.head == "fcn":
            for inputs in (dim, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
            dim = width
        self.head = nn.Sequential(*layers, nn.Dropout2d(config.dropout), nn.Conv2d(dim, classes, 1))
        map_shape(self.encoder, self.size)  # an error if it has no map
        self.begin_training()

    def segment(self, images: Tensor) -> Float[Tensor, "n classes h w"]:
        found = self.head(feature_map(self.encoder, images))
        return F.interpolate(found, images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (images,), (masks,) = batch["views"], batch["masks"]
        return {"loss": pixel_cross_entropy(self.segment(images), masks)}


SYSTEM = System(
    slug="finetune-seg",
    task="dense",
    config=FinetuneSegConfig,
    learner=FinetuneSeg,
    data="shapes",
    recipe=LAPTOP,
)
