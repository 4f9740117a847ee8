"""Define the common parts of the tasks with pictures (`views`, `labelled`): batches, settings, an encoder with its views.

A training batch, before and after the learner has drawn its views:

    batch["image"]   [B, 3, H, W] uint8
    batch["index"]   [B] positions in the training set, for state kept per example
    batch["label"]   [B] int64, or None without labels
    batch["views"]   list of V float tensors [B, 3, S, S], normalised
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tyro.conf import Suppress, arg

from counterpoint.core.seeds import seed_torch
from counterpoint.core.world import processes
from counterpoint.data.images import ImageData, ImageSplit, Indices
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.optim import OptimConfig
from counterpoint.engine.stages import Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.adapted import adapt, check_adapters
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.tasks.started import encoder_name, start_encoder
from counterpoint.views.images import ViewPipeline, check_recipe, normalise
from counterpoint.words import counted

BATCH = 256  # images in a batch of the evaluation


@dataclass
class ImagesConfig(OptimConfig):
    """Settings of every learner from pictures."""

    epochs: int = 200
    """Passes over the training images."""
    batch_size: int = 256
    """Images in a batch, over all processes together. The last, smaller batch of an epoch is dropped."""
    encoder: str = "torchvision:resnet50"
    """The network to train and keep: resnet-s, conv-s, conv-group, conv-fine, conv-cells, convnet, convnet-s, unet,
    unet-s, mlp-s, vit-s, vit-xs, vit-conv, timm:NAME, torchvision:NAME, hf:NAME."""
    pretrained: bool = False
    """Start from published weights if the encoder has them."""
    start: Annotated[str, arg(name="from", metavar="RUN")] = ""
    """A finished run of any system on pictures, whose encoder to start from; it replaces --encoder. Default: the encoder's
    random or published weights."""
    lora: int = 0
    """Rank of low-rank adapters (LoRA). They train instead of the encoder's own weights, which stay as --from or --pretrained
    gave them. 0: no adapters, train the encoder."""
    lora_alpha: float | None = None
    """Adapters are multiplied by lora_alpha / lora; > 0. None: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers with adapters: attention, linear, conv, or names, ends of names and patterns of layers. Default: attention and
    linear layers of transformers; convolutions and linear layers of others."""
    lora_statistics: Literal["frozen", "train"] = "frozen"
    """Running statistics of the encoder's batch normalisation beside adapters: frozen, or train as without adapters."""
    recipe: str = "simclr"
    """Augmentation of the views: simclr, simclr-cifar, supcon, moco-v1, moco-v2, byol, swav, dino, dino-cifar, adainf,
    adainf-cifar, obow, obow-cifar, mae, supervised, weak, none; for small digits digits-moved, digits-easy, digits-plain,
    digits-shifted, digits-hard, digits-s0, digits-s25, digits-s50, digits-s100, digit-patterns, digit-styles,
    obow-canvases, tile-canvases; shapes; clusters; latent-factors (see counterpoint.views.images.RECIPES)."""
    evaluate_every: int = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    neighbours: int = 20
    """Number of neighbours in the k-nearest-neighbours evaluation."""
    bank: int = 10000
    """Maximum number of training images whose features the evaluation uses."""
    workers: int = 0
    """Number of processes that load images; 0: load in the main process."""
    parts: Annotated[dict[str, Any], Suppress] = field(default_factory=dict)
    """Settings of the parts added to the system, by slug."""

    counts: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "evaluate_every", "neighbours", "bank")
    adapts: ClassVar[bool] = True  # whether `start` and `lora` apply to the encoder
    own_start: ClassVar[bool] = False  # whether `start` has another meaning

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_weight("workers")
        self.need_count(*self.counts)

    def check_batch(self) -> None:
        """Raise CounterpointError for too small a batch; this class accepts any size."""

    def check(self) -> None:
        """Raise CounterpointError for unknown names of networks and views. Runs before data are read."""
        check_image_encoder(self.encoder)
        check_recipe(self.recipe)
        check_adapters(self)
        self.check_batch()

    def facts(self, data: ImageData) -> dict[str, Any]:
        """Return the facts of the data that a learner with these settings needs, fit for JSON."""
        found = data.spec | {"class_names": list(data.classes), "examples": len(data.train)}
        if self.start and self.adapts:  # kept with the run, which can be loaded when the first run is gone
            found["encoder"] = encoder_name(self.start)
        for part in self.parts.values():
            found |= part.facts(data)
        return found


class ImageLearner(Learner):
    """An encoder and its training views. Subclasses add heads and the loss of batch["views"]."""

    crops: ClassVar[int] = 1

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        if config.start and config.adapts:
            config = replace(config, encoder=data.encoder, pretrained=False)
        self.config = config
        self.size = data.size
        self.examples: int | None = getattr(
            data, "examples", None
        )  # number of training images, to which positions refer
        seed_torch(seed)
        self.encoder = self.build_encoder(data)
        if config.lora:
            adapt(self.encoder, config, data.size, data.channels)
        self.views = self.build_views()

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if not self.loaded:
            self.take_start()
        # State by position and an epoch's order refer to the images before the interruption.
        if self.examples not in (None, survey.examples):
            raise DataError(
                f"the data has {survey.examples} training images now, this run was begun on {self.examples}; restore the set, or "
                "start a new run"
            )

    def take_start(self) -> None:
        """Give the encoder the weights of the run that the settings start from."""
        if self.config.start and self.config.adapts:
            start_encoder(self, self.config.start)

    def build_encoder(self, data: Any) -> ImageEncoder:
        """Build the network that the settings name."""
        config = self.config
        return build_image_encoder(config.encoder, data.size, channels=data.channels, pretrained=config.pretrained)

    def build_views(self) -> ViewPipeline:
        """Build the pipeline that makes views of the images."""
        return ViewPipeline(self.size, crops=self.crops, recipe=self.config.recipe)

    def drawn(self, images: Tensor, generator: torch.Generator, views: Any = None) -> list[Any]:
        """Draw the parameters of views for the whole batch; return those of this process's images.

        Args:
            images: This process's images, [B, 3, H, W].
            generator: Source of the random numbers, equal on all processes.
            views: The pipeline. Default: `self.views`.
        """
        total, mine = self.share(len(images))
        return [view.take(mine) for view in (views or self.views).draw((total, *images.shape[1:]), generator)]

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return batch | {"views": self.views.apply(batch["image"], self.drawn(batch["image"], generator))}

    def embed(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        """Compute the features of normalised images, for evaluation and export."""
        return self.encoder(images)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"feature": self.embed(batch["image"])}

    def turns(self) -> list[Turn]:
        return [self.turn_of([self])]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        tokens = [(self.encoder, "tokens")] if hasattr(self.encoder, "tokens") else []
        return [(self.encoder, "forward"), *tokens]


class ImageBatches(Dataset[dict[str, Any]]):
    """A split, or some of its images, read by lists of positions.

    Args:
        split: a split of an image set.
        rows: positions of the images to use; None: all. batch["index"] holds positions in the split in either case.
        labels: [len(split)] labels that replace the split's own; None: the split's.
    """

    def __init__(self, split: ImageSplit, rows: Indices | None = None, labels: Indices | None = None) -> None:
        self.split, self.rows = split, rows
        self.labels = split.labels if labels is None else labels

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = np.asarray(indices, np.int64)
        rows = rows if self.rows is None else self.rows[rows]
        return {
            "image": torch.from_numpy(self.split.images(rows)).permute(0, 3, 1, 2).contiguous(),
            "index": torch.from_numpy(rows),
            "label": None if self.labels is None else torch.from_numpy(self.labels[rows]),
        }

    def __len__(self) -> int:
        return len(self.split) if self.rows is None else len(self.rows)


class EvaluationBatches(Dataset[dict[str, Any]]):
    """Normalised images of several parts in turn; batch["part"] is the part's name.

    Args:
        parts: name, split and positions of each part.
        reader: reads a split by lists of positions.
        size: images in a batch.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, ImageSplit, Indices]],
        reader: type[ImageBatches] = ImageBatches,
        size: int = BATCH,
    ) -> None:
        self.reader = reader
        self.at = [
            (name, split, rows[start : start + size])
            for name, split, rows in parts
            for start in range(0, len(rows), size)
        ]

    def __getitem__(self, number: int) -> dict[str, Any]:
        name, split, rows = self.at[number]
        batch = self.reader(split)[rows.tolist()]
        return batch | {"image": normalise(batch["image"]), "part": name}

    def __len__(self) -> int:
        return len(self.at)


def chosen_bank(rows: Indices, limit: int) -> Indices:
    """Select at most `limit` of these positions, always the same, in order."""
    return np.sort(rows[np.random.default_rng(0).permutation(len(rows))[:limit]])


class ImageTask:
    """Training batches and facts of one source of images. Each task's file adds its evaluation."""

    name: ClassVar[str]
    headline: str  # the measure it judges by
    contract: ClassVar[str] = "views"  # the form of data it takes (see counterpoint.data.load)
    at_once: ClassVar[int] = BATCH  # rows of an `evaluation_batch` at most
    watched: ClassVar[str] = "images"  # what a valid split must hold
    reader: ClassVar[type[ImageBatches]] = ImageBatches  # reads the batches of a split

    def __init__(self, data: ImageData, config: Any) -> None:
        if not isinstance(data, ImageData):
            raise CounterpointError(
                f"{data.name} has no single images, which the task {self.name} needs; name a source of images"
            )
        self.data = data
        self.config: Any = config
        self.rows = self.training_rows()
        if len(data.test) < 2:
            raise DataError(f"{data.name}: needs at least 2 test images, has {len(data.test)}")

    def split(self, name: str) -> ImageSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        return named_split(self.data, name)

    def asked(self, name: str) -> Indices:
        """Return the positions of the images to measure in the split valid or test."""
        return np.arange(len(self.split(name)))

    def evaluation_batch(self, split: str | ImageSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these images of a split as a learner's `predict` takes them: normalised, no augmentation."""
        found = self.reader(self.split(split) if isinstance(split, str) else split)[list(map(int, rows))]
        return found | {"image": normalise(found["image"]), "part": "survey"}

    def check_training(self) -> None:
        """Raise DataError if an epoch would have no step, or if the valid split is too small to monitor training."""
        data, config = self.data, self.config
        check_watched(data.name, len(self.asked("valid")), self.watched)
        # An epoch may have fewer images than the set (see ImageData.epoch).
        seen = min(len(self.rows), data.epoch or len(self.rows))
        if seen < config.batch_size:
            raise DataError(
                f"{data.name} has {counted(seen, 'training image')}{' an epoch' if seen < len(self.rows) else ''}, fewer than a "
                "batch of "
                f"{config.batch_size}; use --batch-size {max(2, seen)} or less"
            )

    def training_rows(self) -> Indices:
        """Return the positions of the training images to use."""
        return np.arange(len(self.data.train))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings."""
        return self.config.facts(self.data)

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Raise CounterpointError if these data do not fit a run that was trained on other data."""
        for name in ("size", "channels"):
            if trained[name] != self.data.spec[name]:
                raise CounterpointError(
                    f"{self.data.name} has images of {name} {self.data.spec[name]}, the run was trained on {trained[name]}"
                    + (f"; add ?size={trained[name]} to --data" if name == "size" else "")
                )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches`, of `rows`, replaces them for a stage."""
        batches = self.batches() if batches is None else batches
        return self.loader(self.reader(self.data.train, self.rows), batches.bind(seed, position, *processes()))

    def loader(self, images: ImageBatches, batches: Batches) -> DataLoader[dict[str, Any]]:
        """Return a loader of these batches."""
        workers = self.config.workers
        return DataLoader(images, batch_size=None, sampler=batches, num_workers=workers, persistent_workers=workers > 0)

    def batches(self) -> Batches:
        """Return the batches of an epoch, as positions in `rows`."""
        return Batches(len(self.rows), self.config.batch_size, drop_last=True, items=self.data.epoch)
