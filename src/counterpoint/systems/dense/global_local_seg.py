"""Global-Local: pre-train a U-Net on unlabelled volumes by contrast of slices, then of regions; fine-tune from few labels.

Chaitanya, Erdil, Karani, Konukoglu: "Contrastive learning of global and local features for medical image segmentation with
limited annotations", NeurIPS 2020, arXiv 2006.10511.

    symbol    here                 meaning
    e         encoder              the contracting path of a U-Net
    g1        projector            head on the flattened coarsest map, discarded after stage 1
    d_l       decoder, blocks      the first l blocks of the expanding path
    g2        local_head           head on the decoder's map, discarded after stage 2
    S         partitions           partitions of a volume along its axis; slices of one partition are never negatives
    G^R       strategy 0           SimCLR on slices
    G^D-      strategy 1           negatives are slices of other partitions
    G^D       strategy 2           slices of the same partition of another volume are positives, too
    L^R       local strategy 0     a region of two augmentations of one picture, against its neighbours in both
    L^D       local strategy 1     also against the same region of other volumes' slices

Stage 1 trains e and g1. Stage 2 trains d_l and g2, with e frozen. Stage 3 trains the whole U-Net on labelled slices. The local
losses are in core/regions.py, the batches of both contrasts in tasks/partitions.py.

Differences from the authors' code: groups of runs are always whole; their loop leaves the last one black. Any number of
partitions is possible. A negative at the anchor's own place is left out. With a single volume G^D becomes G^D-. Processes gather
their rows, so W processes compute the loss of one. Not built: keeping the model of the best validation Dice, and Mixup.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.mask_losses import soft_dice_loss
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.regions import grid_regions, local_region_contrastive_loss
from counterpoint.core.rules import Diagonal, Labels
from counterpoint.data.dense import labelled_rows
from counterpoint.encoders.unet import UNetDecoder, UNetEncoder
from counterpoint.engine.loading import Batches, ChosenBatches
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.dense import DenseConfig, DenseLearner, pixel_cross_entropy
from counterpoint.tasks.partitions import PartitionBatches, partition_figure, partition_retrieval
from counterpoint.views.images import Recipe, ViewPipeline, normalise
from counterpoint.views.images.masks import cropped_masks
from counterpoint.words import counted

INTENSITY = Recipe(scale=None, flip=0.0, jitter=1.0, brightness=0.3, contrast=0.3, saturation=0.0, hue=0.0)
CROPPED = replace(INTENSITY, scale=(0.27, 0.27), ratio=(1.0, 1.0))  # 100 of 192 pixels a side
FINE = Recipe(scale=(0.7, 1.0), ratio=(0.9, 1.1), jitter=1.0, brightness=0.1, contrast=0.2, saturation=0.0, hue=0.0)
LEVELS = {"random": 0, "not-same": 1, "same": 2}  # names of the global strategies


@full_precision
def partition_contrastive_loss(
    embedding: Float[Tensor, "rows dim"], n_parts: int = 4, strategy: int = 2, temperature: float = 0.1
) -> Float[Tensor, ""]:
    """Compute the global loss of slices, of which row r belongs to partition r mod n_parts (Eqs. 1 and 2).

    A pair (a, b) has the loss -log(e^s_ab / (e^s_ab + sum over negatives n of e^s_an)), s = cos / temperature.

    Args:
        embedding: rows, normalised here. Strategy 0 (G^R): the two views of a slice are adjacent rows. Strategy 1 (G^D-):
            originals, then their first and their second views, a third each. Strategy 2 (G^D): in runs of n_parts rows
            n originals of a volume, their views, n originals of another volume, their views; and so on.
        n_parts: number of partitions, at least 2.
        strategy: 0, 1 or 2 (default).
        temperature: > 0, by default 0.1.

    Strategy 0 has all other rows as candidates, the others only the rows of other partitions and the positive. The sum over
    pairs is divided by the rows. Raises ValueError for numbers of rows that do not fit and arguments out of range.

    >>> partition_contrastive_loss(torch.ones(6, 2), 2, 1)  # two pairs for each row, log(1 + 3) each
    tensor(2.7726)
    """
    need_positive(temperature=temperature)
    rows = len(embedding)
    group = {0: 2, 1: 3 * n_parts, 2: 4 * n_parts}.get(strategy)
    if group is None:
        raise ValueError(f"strategy must be 0, 1 or 2, got {strategy}")
    if n_parts < 2 or embedding.ndim != 2:
        raise ValueError(
            f"n_parts must be at least 2 and embedding [rows, dim], got {n_parts} and {shapes(embedding=embedding)}"
        )
    need_rows(embedding=embedding)
    if rows % group:
        raise ValueError(
            f"embedding must have a multiple of {group} rows for strategy {strategy} and {n_parts} parts, got {rows}"
        )
    z = unit(embedding, temperature**-0.5)
    at = torch.arange(rows, device=z.device)
    if strategy == 0:
        log_z = pair_logsumexp(z, exclude=Diagonal()).rows
        return (log_z - (z * z[at ^ 1]).sum(1)).mean()
    negatives = pair_logsumexp(z, exclude=Labels(at % n_parts)).rows
    if strategy == 1:
        third = rows // 3
        firsts = [at, at]
        seconds = [(at + third) % rows, (at + 2 * third) % rows]
    else:
        one = at[at % (2 * n_parts) < n_parts]
        two, three, four = ((one + k * n_parts) % rows for k in (1, 2, 3))
        firsts = [one, two, one, three, three, four, two, four]
        seconds = [two, one, three, one, four, three, four, two]
    a, b = torch.cat(firsts), torch.cat(seconds)
    return F.softplus(negatives[a] - (z[a] * z[b]).sum(1)).sum() / rows


# ---------------------------------------------------------------------------------------------------------- the learner


@dataclass
class GlobalLocalConfig(DenseConfig):
    """Settings of Global-Local. Defaults are those of the authors' scripts for cardiac volumes of 192 x 192 pixels."""

    epochs: int = 100
    """Passes of the fine-tuning; an epoch has `steps` steps in every stage."""
    batch_size: int = 10
    """Labelled slices in a batch of the fine-tuning."""
    encoder: str = "unet"
    """The network: unet (six levels) or unet-s (three)."""
    optimizer: str = "adam"
    lr: float = 0.0256
    weight_decay: float = 0.0
    steps: int = 100
    """Number of steps of an epoch, at least 1."""
    global_epochs: int = 100
    """Epochs of the first stage, at least 0; 0: without it."""
    local_epochs: int = 100
    """Epochs of the second stage, at least 0; 0: without it."""
    pretrain_batch: int = 24
    """Slices in a batch of the first two stages: a multiple of `partitions`, times 2 for the strategy same, times 3 for the local
    strategy volumes."""
    strategy: Literal["random", "not-same", "same"] = "same"
    """Global loss: random, SimCLR (G^R); not-same, no negatives of the same partition (G^D-); same, also positives of it (G^D)."""
    local_strategy: Literal["picture", "volumes"] = "picture"
    """Local loss: picture, regions of one picture (L^R); volumes, also of the same partition of other volumes (L^D)."""
    partitions: int = 4
    """Partitions of a volume, at least 2."""
    temperature: float = 0.1
    """Temperature of both losses, > 0."""
    blocks: int = 3
    """l, number of blocks of the decoder that the second stage trains, at least 1 and below the levels of the network."""
    region: Literal[1, 3] = 3
    """Height and width of a region in cells of the decoder's map."""
    negatives: int = 5
    """Neighbours of a region that are its negatives, 1 to 5."""
    hidden: int = 1024
    """Width of the hidden layer of the global head, at least 1."""
    projection: int = 128
    """Width of the rows that both losses compare, at least 1."""
    local_dense: bool = True
    """Map a region's values to rows by a layer; else compare the values."""
    supervision: Literal["dice", "dice-foreground", "cross-entropy"] = "dice"
    """Loss of the fine-tuning: soft Dice of all classes, of the foreground, or cross-entropy."""

    labels_only = False
    counts = (*DenseConfig.counts, "steps", "pretrain_batch", "blocks", "hidden", "projection")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        self.need_weight("global_epochs", "local_epochs")
        if self.partitions < 2 or not 1 <= self.negatives <= 5:
            raise CounterpointError(
                f"partitions must be at least 2 and negatives lie in 1..5, got {self.partitions} and {self.negatives}"
            )
        multiple = (
            self.partitions * (2 if self.strategy == "same" else 1) * (3 if self.local_strategy == "volumes" else 1)
        )
        if self.pretrain_batch % multiple:
            raise CounterpointError(f"pretrain_batch must be a multiple of {multiple} here, got {self.pretrain_batch}")
        if not self.encoder.startswith("unet"):
            raise CounterpointError(f"encoder must be unet or unet-s, got {self.encoder}")


class GlobalLocal(DenseLearner):
    """A U-Net with a head for slices and a head for regions."""

    encoder: UNetEncoder

    def __init__(self, config: GlobalLocalConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        widths = self.encoder.widths
        if config.blocks >= len(widths):
            raise CounterpointError(
                f"blocks must be below the {counted(len(widths), 'level')} of {config.encoder}, got {config.blocks}"
            )
        coarse = (self.size // 2 ** (len(widths) - 1)) ** 2 * widths[-1]
        self.projector = nn.Sequential(
            nn.Flatten(),
            nn.Linear(coarse, config.hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.projection, bias=False),
        )
        self.decoder = UNetDecoder(widths)
        width = widths[-1 - config.blocks]
        self.local_head = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1, bias=False),
        )  # fmt: skip
        values = config.region**2 * width
        self.dense = nn.Linear(values, config.projection, bias=False) if config.local_dense else None
        side = self.size // 2 ** (len(widths) - 1 - config.blocks)
        try:
            self.regions_of = grid_regions(side, side, config.region, config.negatives)
        except ValueError as error:
            raise CounterpointError(f"blocks: {error}; raise --blocks, or use larger pictures") from error
        self.classifier = nn.Conv2d(widths[0], len(self.regions), 1)
        self.pipelines = {
            name: ViewPipeline(self.size, 2 if name != "segment" else 1, recipe)
            for name, recipe in (("global", CROPPED), ("local", INTENSITY), ("segment", FINE))
        }

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        found = []
        if config.global_epochs:
            trained = [self.encoder, self.projector]
            found.append(Stage("global", config.global_epochs, lambda: trained, batches=self._volumes, evaluated=False))
        if config.local_epochs:
            heads = [self.decoder, self.local_head, *([self.dense] if self.dense is not None else [])]
            found.append(Stage("local", config.local_epochs, lambda: heads, batches=self._volumes, evaluated=False))
        whole = [self.encoder, self.decoder, self.classifier]
        return [*found, Stage("segment", config.epochs, lambda: whole, batches=self._labelled)]

    def _volumes(self, survey: Survey) -> Batches:
        groups = getattr(survey.split(), "groups", None)
        if groups is None:
            raise DataError(
                "the pictures are no slices of volumes; use a source of volumes, or --global-epochs 0 --local-epochs 0"
            )
        config = self.config
        return PartitionBatches(groups, config.partitions, config.pretrain_batch, config.steps)

    def _labelled(self, survey: Survey) -> Batches:
        rows = labelled_rows(survey.split())
        return ChosenBatches(rows, min(self.config.batch_size, len(rows)), self.config.steps)

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw the views of the stage; originals of the first stage are not changed."""
        images = batch["image"]
        views = self.pipelines[self.stage_name]
        drawn = self.drawn(images, generator, views)
        found = batch | {"views": views.apply(images, drawn)}
        if self.stage_name == "segment":
            return found | {"masks": [cropped_masks(batch["mask"], view) for view in drawn]}
        return found if self.stage_name == "local" else found | {"plain": normalise(images)}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"global": self.of_slices, "local": self.of_regions, "segment": self.of_masks}[self.stage_name](batch)

    def of_slices(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the global loss: rows in the order of the strategy, gathered over processes."""
        config = self.config
        # A single volume has no other one to be alike: G^D- then.
        several = self.survey is None or len(np.unique(self.survey.split().groups)) > 1
        strategy = LEVELS[config.strategy] if several else min(1, LEVELS[config.strategy])
        first, second = batch["views"]
        pictures = {0: [first, second], 1: [batch["plain"], first, second], 2: [batch["plain"], first]}[strategy]
        rows = self.projector(self.encoder.features(torch.cat(pictures))).chunk(len(pictures))
        each = [self.whole(part) for part in rows]
        if strategy == 0:
            ordered = torch.stack(each, 1).flatten(0, 1)
        elif strategy == 1:
            ordered = torch.cat(each)
        else:
            runs = [part.unflatten(0, (-1, config.partitions)) for part in each]  # a run for each volume
            ordered = torch.stack(runs, 1).flatten(0, 2)
        loss = partition_contrastive_loss(ordered, config.partitions, strategy, config.temperature)
        return {"loss": loss, "global": loss.detach()}

    def of_regions(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the local loss; the encoder is frozen, but its statistics move."""
        config = self.config
        with torch.no_grad():
            levels = self.encoder.levels(torch.cat(batch["views"]))
        maps = self.local_head(self.decoder(levels, config.blocks)).permute(0, 2, 3, 1)
        first, second = (self.whole(part) for part in maps.chunk(2))
        strategy = int(config.local_strategy == "volumes")
        ordered = torch.cat([first, second]) if strategy else torch.stack([first, second], 1).flatten(0, 1)
        dense = None if self.dense is None else self.dense.weight.T
        own, others = self.regions_of
        settings = (strategy, config.region, config.temperature, dense)
        loss = local_region_contrastive_loss(ordered, own, others, *settings)
        return {"loss": loss, "local": loss.detach()}

    def of_masks(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the supervised loss of the labelled slices."""
        logits, masks = self.segment(batch["views"][0]), batch["masks"][0]
        if self.config.supervision == "cross-entropy":
            return {"loss": pixel_cross_entropy(logits, masks)}
        return {"loss": soft_dice_loss(logits, masks, self.config.supervision == "dice-foreground")}

    def segment(self, images: Tensor) -> Float[Tensor, "n classes h w"]:
        return self.classifier(self.decoder(self.encoder.levels(images)))

    # --- what it learned

    def _rows(self, survey: Survey, split: str) -> tuple[Tensor, NDArray[np.int64]] | None:
        """Return the unit rows of g1 of all slices, and their volumes; None for fewer than two volumes."""
        groups = getattr(survey.split(split), "groups", None)
        if groups is None or len(np.unique(groups)) < 2:
            return None
        rows = survey.over(split, lambda batch: self.projector(self.encoder.features(batch["image"])))
        return unit(rows.float()), groups

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure how often a slice's nearest slice of another volume, by the global head, is of the same partition."""
        found = self._rows(survey, split)
        return {"partition_retrieval": partition_retrieval(*found, self.config.partitions)} if found else {}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the mean similarity of partitions of different volumes, by the global head."""
        found = self._rows(survey, "train")
        return {"Partitions of different volumes": partition_figure(*found, self.config.partitions)} if found else {}


SYSTEM = System(
    slug="global-local-seg",
    task="dense",
    config=GlobalLocalConfig,
    learner=GlobalLocal,
    data="phantoms",
    recipe={
        "encoder": "unet-s",
        "epochs": 10,
        "global_epochs": 10,
        "local_epochs": 10,
        "steps": 40,
        "batch_size": 8,
        "pretrain_batch": 8,
        "lr": 0.032,  # 1e-3 for a batch of 8
        "blocks": 1,
        "hidden": 64,
        "projection": 32,
        "evaluate_every": 5,
    },
)
