"""finetune: classify pictures with the encoder of any trained run, trained whole, in its last blocks, or not at all.

Yosinski, Clune, Bengio, Lipson: "How transferable are features in deep neural networks?", NeurIPS 2014, arXiv 1411.1792.

    counterpoint train finetune --from runs/x --data imagefolder:photos                  train encoder and classifier
    counterpoint train finetune --from runs/x --data imagefolder:photos --tune last --blocks 2
    counterpoint train finetune --from runs/x --data imagefolder:photos --tune head      a linear probe on augmented views
    counterpoint train finetune --encoder timm:resnet18 --pretrained --data imagefolder:photos

The paper copies the first layers of a trained network, and either keeps or trains them; the other layers begin at random. Here
all layers are copied, which is today's practice, and a new linear classifier follows. Frozen blocks keep their running
statistics. Without --from and --pretrained this is supervised training from random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from counterpoint.encoders.taps import block_names
from counterpoint.engine.stages import Turn
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.labelled import LAPTOP, LabelledConfig, LabelledLearner, cross_entropy
from counterpoint.words import counted


@dataclass
class FinetuneConfig(LabelledConfig):
    """Settings of the fine-tuning. Defaults are common values for small sets of pictures."""

    epochs: int = 30
    batch_size: int = 64
    recipe: str = "supervised"
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 1
    tune: Literal["all", "last", "head"] = "all"
    """What trains: all, encoder and classifier; last, the encoder's last blocks and the classifier; head, the classifier alone."""
    blocks: int = 1
    """Number of last blocks that train with --tune last, at least 1."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes, 0 to 1."""

    counts = (*LabelledConfig.counts, "blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("label_smoothing")

    def check(self) -> None:
        super().check()
        if self.lora and self.tune != "all":
            raise CounterpointError(f"--tune {self.tune} freezes layers, and --lora adapts them; give one of the two")


class Finetune(LabelledLearner):
    """An encoder with a linear classifier, whose first blocks may be frozen."""

    def __init__(self, config: FinetuneConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.trained: list[nn.Module] = []  # of an encoder that does not train as a whole
        if config.tune == "all":
            return
        self.encoder.requires_grad_(False)
        first = self._first() if config.tune == "last" else None
        for name, module in self.encoder.named_modules():
            if self.trained or name == first:
                self.trained.append(module.requires_grad_(True))
        self.train()

    def _first(self) -> str:
        """Return the name of the first block that trains. What follows it in the network trains, too."""
        try:
            names = block_names(self.encoder)
        except CounterpointError:
            raise CounterpointError(
                "--tune last: the encoder has no blocks to count; give --tune head or all"
            ) from None
        if self.config.blocks > len(names):
            raise CounterpointError(
                f"--blocks {self.config.blocks}: the encoder has {counted(len(names), 'block')}; give {len(names)} or fewer, or "
                "--tune all"
            )
        return names[-self.config.blocks]

    def train(self, mode: bool = True) -> Finetune:
        super().train(mode)
        if self.config.tune != "all":
            self.encoder.eval()  # running statistics of frozen layers stay, too
            for module in self.trained:
                module.training = mode
        return self

    def turns(self) -> list[Turn]:
        return [self.turn_of([self.classifier] if self.config.tune == "head" else [self.encoder, self.classifier])]

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (view,), labels = batch["views"], batch["label"]
        logits = self.classifier(self.encoder(view))
        return {"loss": cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)}


SYSTEM = System(
    slug="finetune",
    task="labelled",
    config=FinetuneConfig,
    learner=Finetune,
    data="cifar10",
    recipe=LAPTOP | {"recipe": "weak", "optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05, "epochs": 15},
)
