"""Define the task `regions`: classify proposals, boxes in pictures, of a target domain after training on a source domain.

A training batch, before and after the learner has drawn its views:

    batch["image"]   [B, 3, size, size] uint8, of one domain in each stage
    batch["boxes"]   [B, N, 4] proposals: left, top, right, bottom in pixels
    batch["label"]   [B, N] class numbers, C for the background, -1 where unknown
    batch["score"]   [B, N] logits of objectness
    batch["views"]   regions [B * N, 3, crop, crop], normalised: the weak view, and the strong one where the stage needs it

A learner returns "logits" [B, N, C + 1] from `predict`. `accuracy` is the share of the objects' proposals that get their class.
`background` is the same share of the proposals without an object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tyro.conf import arg

from counterpoint.core.seeds import seed_torch
from counterpoint.core.world import processes
from counterpoint.data.images import Indices
from counterpoint.data.regions import SOURCE, TARGET, RegionData, RegionSplit
from counterpoint.data.shown import PALETTE, with_boxes
from counterpoint.encoders.images import check_image_encoder
from counterpoint.encoders.regions import RegionEncoder, drawn_regions
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.optim import OptimConfig
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.tasks.started import encoder_name, start_encoder
from counterpoint.views.images import Recipe, ViewPipeline, normalise

AT_ONCE = 16  # pictures in a batch of the evaluation
STRONG = Recipe(
    scale=None, flip=0.0, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, blur=0.5
)


@dataclass
class RegionsConfig(OptimConfig):
    """Settings of every learner of regions."""

    epochs: int = 20
    """Passes over the pictures of the target; 0: train on the source alone."""
    batch_size: int = 1
    """Pictures of the target in a batch, over all processes together."""
    encoder: str = "torchvision:resnet50"
    """The network for regions: conv-s, conv-fine, conv-cells, resnet-s, or timm:NAME, torchvision:NAME with `layer`."""
    layer: str = "layer4"
    """The layer whose output is a region's feature map; "" for the last map of conv-s, conv-fine, conv-cells, resnet-s."""
    pretrained: bool = False
    """Start from published weights if the encoder has them."""
    start: Annotated[str, arg(name="from", metavar="RUN")] = ""
    """A finished run of any system on pictures, whose encoder to start from; it replaces --encoder. Default: the encoder's
    random or published weights."""
    frozen: bool = False
    """Train the classifier of regions alone in the first stage; the encoder and its statistics stay as they are."""
    crop: int = 224
    """Height and width of a region's crop in pixels, at least 8."""
    flip: float = 0.5
    """Probability that a picture is mirrored, 0 to 1."""
    shake: float = 0.05
    """Greatest displacement of a box's edges in training, in shares of its size, 0 to 1."""
    erase_low: float = 0.3
    """Least share of a region that the strong view erases, 0 to `erase_high`."""
    erase_high: float = 0.6
    """Greatest share of a region that the strong view erases, up to 1."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    workers: int = 0
    """Number of processes that load pictures; 0: load in the main process."""

    counts: ClassVar[tuple[str, ...]] = ("batch_size", "evaluate_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("flip", "shake", "erase_low", "erase_high")
        if self.erase_low > self.erase_high:
            raise CounterpointError(f"erase_low must be at most erase_high, got {self.erase_low} > {self.erase_high}")
        if self.crop < 8 or self.epochs < 0 or self.workers < 0:
            raise CounterpointError(
                f"crop must be at least 8, epochs and workers not negative; got {self.crop}, {self.epochs}, {self.workers}"
            )
        self.need_count(*self.counts)

    def check(self) -> None:
        """Raise CounterpointError for an unknown encoder. Runs before data are read."""
        check_image_encoder(self.encoder)

    def facts(self, data: RegionData) -> dict[str, Any]:
        """Return the facts of the data that a learner with these settings needs, fit for JSON."""
        found = data.spec | {"examples": len(data.train), "targets": int((data.train.domains == TARGET).sum())}
        return found | {"encoder": encoder_name(self.start)} if self.start else found


# ---------------------------------------------------------------------------------------------------------- the learner


class RegionsLearner(Learner):
    """A classifier of regions. Subclasses build the networks, and write `stages`, `loss`, `classify` and `embed`.

    Attributes:
        strong: whether the stage needs the strong view.
    """

    @property
    def strong(self) -> bool:
        return True

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        if config.start:
            config = dataclasses.replace(config, encoder=data.encoder, pretrained=False)
        self.config, self.size, self.count = config, data.size, data.proposals
        self.classes = len(data.class_names) if hasattr(data, "class_names") else int(data.classes)
        self.pipeline = ViewPipeline(config.crop, 1, STRONG)
        seed_torch(seed)

    def begin(self, survey: Survey) -> None:
        """Give the encoder the weights of the run that the settings start from."""
        super().begin(survey)
        if self.config.start and not self.loaded:
            start_encoder(next(one for one in self.modules() if isinstance(one, RegionEncoder)), self.config.start)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Cut the regions, mirror those of some pictures, and draw the strong view."""
        config, boxes = self.config, batch["boxes"]
        (rows, count), device = boxes.shape[:2], boxes.device
        total, mine = self.share(rows)
        flips = (torch.rand(total, generator=generator) < config.flip)[mine].to(device)
        moves = (2 * torch.rand(total, count, 4, generator=generator) - 1)[mine].to(device) * config.shake
        sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        crops = drawn_regions(batch["image"], boxes + moves * sides, config.crop)
        crops = torch.where(flips.repeat_interleave(count)[:, None, None, None], crops.flip(3), crops)
        views = [normalise(crops)]
        if self.strong:
            shape = (total * count, *crops.shape[1:])
            own = torch.arange(total * count).view(total, count)[mine].flatten()
            views.append(self.pipeline.apply(crops, [self.erased(shape, generator).take(own)])[0])
        return batch | {"views": views}

    def erased(self, shape: Sequence[int], generator: torch.Generator) -> Any:
        """Draw a strong view with a square erased whose area lies between the settings' shares."""
        (view,), config = self.pipeline.draw(shape, generator), self.config
        share = config.erase_low + (config.erase_high - config.erase_low) * torch.rand(shape[0], generator=generator)
        side = (share.sqrt() * config.crop).round()
        corner = (torch.rand(shape[0], 2, generator=generator) * (config.crop - side + 1)[:, None]).floor()
        return dataclasses.replace(view, cut=torch.cat([corner, side[:, None]], 1).long())

    def classify(self, regions: Float[Tensor, "rows 3 crop crop"]) -> Float[Tensor, "rows classes"]:
        """Compute the logits of normalised regions with the network that is kept."""
        raise NotImplementedError

    def embed(self, regions: Float[Tensor, "rows 3 crop crop"]) -> Float[Tensor, "rows dim"]:
        """Compute the features of normalised regions with the network that is kept."""
        raise NotImplementedError

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        regions = drawn_regions(batch["image"], batch["boxes"], self.config.crop)
        return {"logits": self.classify(normalise(regions)).view(*batch["boxes"].shape[:2], -1)}


# ------------------------------------------------------------------------------------------------------------- measures


class RegionsEvaluator:
    """Compares the predicted classes of proposals with their own."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.reset()

    def reset(self) -> None:
        number = len(self.classes) + 1
        self.table = np.zeros((number, number), np.int64)
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        logits, labels = outputs["logits"].detach().float().cpu(), batch["label"].cpu()
        if not torch.isfinite(logits).all():
            raise diverged("the logits hold NaN or infinite values")
        known = labels >= 0
        np.add.at(self.table, (labels[known].numpy(), logits.argmax(-1)[known].numpy()), 1)

    def compute(self, *, final: bool = False) -> dict[str, float]:
        right, total = self.table.diagonal(), self.table.sum(1)
        if final:
            self.figures = {
                "Classes of the proposals": {
                    "kind": "matrix",
                    "values": self.table.tolist(),
                    "names": [*self.classes, "background"],
                }
            }
        return {
            "accuracy": float(right[:-1].sum() / max(1, total[:-1].sum())),
            "background": float(right[-1] / max(1, total[-1])),
        }


def regions_figure(
    split: RegionSplit, classes: Sequence[str], rows: Indices, predicted: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Draw the predicted classes of pictures' proposals beside the true ones, without boxes that overlap better ones.

    Args:
        split: the pictures.
        classes: names of the classes.
        rows: positions of the pictures.
        predicted: heading -> logits [rows, n, C + 1].
    """
    from torchvision.ops import nms

    drawn = []
    for n, row in enumerate(rows.tolist()):
        picture, given = split.images(np.array([row]))[0], split.proposals(row)
        corners = torch.from_numpy(given.corners)
        true = torch.from_numpy(given.labels)
        kinds = [(logits[n].argmax(1), logits[n].softmax(1)[:, :-1].max(1).values) for logits in predicted.values()]
        cells = []
        for heading, (kind, score) in zip(
            [*predicted, "true classes"], [*kinds, (true, torch.from_numpy(given.scores))], strict=True
        ):
            chosen = ((kind >= 0) & (kind < len(classes))).nonzero()[:, 0]
            chosen = chosen[nms(corners[chosen], score[chosen].float(), 0.3)]
            shown = with_boxes(picture, given.corners[chosen.numpy()], kind[chosen].tolist())
            cells.append({"png": shown, "text": heading})
        drawn.append({"cells": cells})
    colours = ", ".join(f"{name}: {PALETTE[n % len(PALETTE)]}" for n, name in enumerate(classes[: len(PALETTE)]))
    return {
        "kind": "captioned",
        "rows": drawn,
        "caption": f"Proposals in the colours of their classes. Those of the background are left out. {colours}.",
    }


# ------------------------------------------------------------------------------------------------------------- the task


class _Pictures(Dataset[dict[str, Any]]):
    """Pictures of a split with their proposals, by lists of positions."""

    def __init__(self, split: RegionSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any]:
        at = np.asarray(indices, np.int64)
        # A process's share of a small batch may be empty; the shape is then that of any picture.
        found = [self.split.proposals(int(n)) for n in (at if len(at) else [0])]
        return {
            "image": torch.from_numpy(self.split.images(at)).permute(0, 3, 1, 2).contiguous(),
            "boxes": torch.from_numpy(np.stack([one.corners for one in found])[: len(at)]),
            "label": torch.from_numpy(np.stack([one.labels for one in found])[: len(at)]),
            "score": torch.from_numpy(np.stack([one.scores for one in found])[: len(at)]),
            "index": torch.from_numpy(at),
        }


class RegionsTask:
    """Loaders and evaluator of one source of pictures with proposals."""

    name = "regions"
    headline = "accuracy"  # the measure it judges by
    contract = "regions"  # the form of data it takes (see counterpoint.data.load)
    at_once = AT_ONCE

    def __init__(self, data: RegionData, config: RegionsConfig) -> None:
        if not isinstance(data, RegionData):
            raise CounterpointError(
                f"{data.name} has no proposals, which the task regions needs; name shifted-shapes or coco"
            )
        self.data, self.config = data, config
        self.facts = config.facts(data)

    def split(self, name: str) -> RegionSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: RegionSplit = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError where a domain that a stage needs has no picture, or the valid split is too small."""
        check_watched(self.data.name, len(self.data.valid), "pictures")
        domains = self.data.train.domains
        if not (domains == SOURCE).any():
            raise DataError(f"{self.data.name}: no training picture is of the source")
        if self.config.epochs and not (domains == TARGET).any():
            raise DataError(
                f"{self.data.name}: no training picture is of the target; name one (?target=PLACE), or set --epochs 0"
            )

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Raise CounterpointError if these data do not fit a run that was trained on other data."""
        if list(trained["class_names"]) != list(self.data.classes):
            raise CounterpointError(
                f"{self.data.name} has the classes {', '.join(self.data.classes)}; the run was trained on "
                f"{', '.join(trained['class_names'])}"
            )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        chosen = Batches(len(self.data.train), self.config.batch_size) if batches is None else batches
        bound = chosen.bind(seed, position, *processes())
        workers = self.config.workers
        pictures = _Pictures(self.data.train)
        return DataLoader(pictures, batch_size=None, sampler=bound, num_workers=workers, persistent_workers=workers > 0)

    def evaluation_batch(self, split: str | RegionSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these pictures of a split as a learner's `predict` takes them."""
        return _Pictures(self.split(split) if isinstance(split, str) else split)[list(map(int, rows))]

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the pictures of a split, in order."""
        pictures = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(pictures)))) for start in range(0, len(pictures), AT_ONCE)]
        return DataLoader(_Pictures(pictures), batch_size=None, sampler=at)

    def evaluator(self, split: str) -> RegionsEvaluator:
        return RegionsEvaluator(self.data.classes)


TASK = RegionsTask
