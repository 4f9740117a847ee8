"""Learn a small synthetic set in place of an unlabelled one: the common parts of systems that distil data.

A run has two stages. The first, which a system writes, learns images and target vectors. The second pre-trains a new network on
them, and its encoder is what remains. The set itself is a parameter, exported by `counterpoint export`.

    synthetic.pictures   [m, 3, size, size] as networks take them; they are neither changed nor cut to a range
    synthetic.targets    [m, k], at the start a frozen teacher's features of the images
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.distributed import global_mean
from counterpoint.core.seeds import seed_torch
from counterpoint.core.world import world
from counterpoint.data.distilled import DistilledSet, read_set
from counterpoint.data.images import ImageData
from counterpoint.data.shown import png
from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.encoders.simple import Tower
from counterpoint.engine.loading import Batches, Steps
from counterpoint.engine.optim import light
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.stepper import seed_of
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, cached
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.image_teachers import check_teacher, features_of, image_teacher
from counterpoint.tasks.images import ImagesConfig
from counterpoint.tasks.views import ViewsLearner
from counterpoint.views.images import denormalise, normalise, zero_to_one
from counterpoint.words import counted

SHOWN = 6  # synthetic images on the page
ROUNDS = 20  # epochs at most, in which pre-training is counted
LEAST = 0.1  # of the root mean square of all deviations: an output that hardly varies is not blown up


@dataclass
class DistilledSetConfig(ImagesConfig):
    """Settings of every learner of a synthetic set."""

    teacher: str = "fit:barlow-twins?data=cifar10"
    """Frozen network whose features are regressed: run:RUN, fit:SLUG?data=SOURCE, hf:NAME, timm:NAME, torchvision:NAME."""
    teacher_size: int = 224
    """Pixels to which pictures are enlarged for a teacher of a library."""
    standardise: bool = False
    """Shift and scale the teacher's features to mean 0 and deviation 1 over the training images, output by output. A
    deviation below a tenth of their root mean square counts as that tenth."""
    pictures: int = 1000
    """m, number of synthetic images."""
    learn: Literal["both", "targets", "pictures", "none"] = "both"
    """Learn images and targets, or one of them. none: pre-train on the start, without distillation."""
    start: str = ""
    """A set that `counterpoint export` wrote, a folder or file, to start from. Default: random training images."""
    start_targets: Literal["teacher", "random"] = "teacher"
    """Targets at the start: the teacher's features of the images, or Gaussian rows of the same means and deviations."""
    normalised_start: bool = False
    """Normalise the images at the start as the encoder's inputs are. Default: pixels in 0..1."""
    extractor: str = ""
    """Network that regresses targets during distillation and in `judges`. Default: the encoder's."""
    inner_lr: float = 0.1
    """Learning rate of the SGD of all networks on the set, > 0. It is not scaled."""
    inner_momentum: float = 0.9
    """Momentum of that SGD, 0 to 1."""
    inner_weight_decay: float = 1e-3
    """Weight decay of that SGD, at least 0."""
    pretrain_epochs: int = 1000
    """Passes over the synthetic images in pre-training."""
    pretrain_batch: int = 256
    """Synthetic images in a batch of pre-training, at most."""
    judges: int = 5
    """Number of new networks trained on the set in each evaluation, to measure the set; 0: none."""
    judge_steps: int = 60
    """Training steps of each of them."""

    adapts: ClassVar[bool] = False
    own_start: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = (
        *ImagesConfig.counts,
        "teacher_size",
        "pictures",
        "pretrain_epochs",
        "pretrain_batch",
        "judge_steps",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("inner_lr")
        self.need_share("inner_momentum")
        if self.inner_weight_decay < 0 or self.judges < 0:
            raise CounterpointError(
                f"inner_weight_decay and judges must not be negative, got {self.inner_weight_decay} and {self.judges}"
            )
        check_teacher(self.teacher)
        if self.teacher == "data":
            raise CounterpointError("--teacher data: features of changed images need a network; name a run or a model")

    def check(self) -> None:
        super().check()
        if self.extractor:
            check_image_encoder(self.extractor)

    def facts(self, data: ImageData) -> dict[str, Any]:
        if not self.start and self.pictures > len(data.train):
            raise DataError(
                f"{data.name} has {counted(len(data.train), 'training image')}, fewer than {self.pictures} synthetic ones; lower "
                "--pictures"
            )
        return super().facts(data)


class Synthetic(nn.Module):
    """The synthetic images and their targets, as parameters."""

    def __init__(self, pictures: Tensor, targets: Tensor, learn: str) -> None:
        super().__init__()
        self.pictures = nn.Parameter(pictures, requires_grad=learn in ("both", "pictures"))
        self.targets = nn.Parameter(targets, requires_grad=learn in ("both", "targets"))


class DistilledSetLearner(ViewsLearner):
    """A synthetic set, a frozen teacher, and an encoder with a head that is pre-trained on the set.

    Subclasses write the stage `distil`, with `start` as its action, and `outer_loss`.
    """

    crops: ClassVar[int] = 1
    compares: ClassVar[bool] = False
    measure: ClassVar[str]  # first word of the metrics of `outer_loss`
    config: Any
    teacher: Frozen | None = None
    inherited: bool = False  # the set is that of the run that this one continues
    held: DistilledSet | None = None
    synthetic: Synthetic
    mean: Tensor
    spread: Tensor
    origin: Int[Tensor, " m"]

    def outer_loss(self, synthetic: Tensor, real: Tensor, wanted: Tensor) -> Float[Tensor, ""]:
        """Return the error of the set on real images.

        Args:
            synthetic: [m, d] features of the synthetic images by a network that was trained on the set.
            real: [n, d] features of real images by the same network.
            wanted: [n, k] the teacher's features of the real images.
        """
        raise NotImplementedError

    # --- what depends on the teacher's width and on the number of images

    def build_projector(self, dim: int) -> nn.Module:
        return nn.Identity()  # until the width is known

    def structure(self) -> dict[str, Any]:
        if not hasattr(self, "synthetic"):
            return {}
        m, width = self.synthetic.targets.shape
        return {"pictures": m, "width": width}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if structure:
            self.shape(**structure)

    def shape(self, pictures: int, width: int) -> None:
        """Build an empty set of this size, and a head of this width."""
        empty, device = torch.zeros(pictures, 3, self.size, self.size), self.device
        self.synthetic = Synthetic(empty, torch.zeros(pictures, width), self.config.learn)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("origin", torch.full((pictures,), -1))  # positions of the first images, -1 from a file
        self.projector = nn.Linear(self.encoder.dim, width)
        self.to(device)

    def new_network(self, encoder: str = "", pretrained: bool = False) -> Tower:
        """Build a new network with a head for the targets, by default with the extractor."""
        body = build_image_encoder(
            encoder or self.config.extractor or self.config.encoder, self.size, pretrained=pretrained
        )
        return Tower(body, nn.Linear(body.dim, len(self.mean))).to(self.device)

    def sgd(self, networks: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of networks on the set."""
        config = self.config
        more: dict[str, Any] = {"momentum": config.inner_momentum, "weight_decay": config.inner_weight_decay}
        return light(torch.optim.SGD)(networks.parameters(), lr=config.inner_lr, **more)

    def train_on_set(self, network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Take steps on the whole set. Every process takes the same."""
        images, targets = self.synthetic.pictures.detach(), self.synthetic.targets.detach()
        try:
            for _ in range(steps):
                optimizer.zero_grad()
                nn.functional.mse_loss(network(images), targets).backward()
                optimizer.step()
        except ValueError as error:  # of batch normalisation
            raise CounterpointError(f"--pictures {len(images)} is too few for this network: {error}") from error

    def error_on_set(self, network: Any, rows: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Compute the mean squared error on these rows of the set, of which each process takes its share."""
        rank, size = world()
        mine = rows[rank::size]
        images, targets = self.synthetic.pictures.detach()[mine], self.synthetic.targets.detach()[mine]
        return global_mean((network(images).float() - targets).square().mean(1))

    # --- the teacher

    def begin(self, survey: Survey) -> None:
        """Load the teacher, and build a set of its width, which `start` fills. A run that continues another one has a set."""
        super().begin(survey)
        width, config = self.known(survey, "train").shape[1], self.config
        self.inherited = hasattr(self, "synthetic")
        if not self.inherited:
            self.held = read_set(config.start, self.size) if config.start else None
            self.shape(config.pictures if self.held is None else len(self.held.targets), width)
        found = self.synthetic.targets if self.inherited or self.held is None else self.held.targets
        if found.shape[1] != width:
            raise CounterpointError(
                f"--teacher {config.teacher} gives {width} features, and the set to start from has targets of "
                f"{found.shape[1]}: name the teacher of that set"
            )

    def taught(self) -> Frozen:
        """Load the teacher. CounterpointError where it was trained on images of another size."""
        if self.teacher is None:
            found = image_teacher(self.config.teacher, self.config.teacher_size)
            size = getattr(found.module, "size", self.size)
            if size != self.size:
                raise CounterpointError(
                    f"--teacher {self.config.teacher} was trained on images of {size} pixels, this data has {self.size}: give "
                    f"the data the option size={size}, or name another teacher"
                )
            self.teacher = found.to(self.device)
        return self.teacher

    def wanted(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n k"]:
        """Compute the targets of normalised images: the teacher's features, standardised where the settings ask for it."""
        return (features_of(self.taught(), {"image": images}) - self.mean) / self.spread

    def known(self, survey: Survey, split: str) -> Float[Tensor, "examples k"]:
        """Return the teacher's features of a split's images. CounterpointError where they are not finite."""
        found = cached(self.taught(), survey, split)
        rows = found[torch.arange(len(found))]
        if not bool(rows.isfinite().all()):
            raise CounterpointError(f"--teacher {self.config.teacher} gives features that are NaN or infinite")
        return rows.to(self.device)

    # --- the start

    @torch.no_grad()
    def start(self, survey: Survey) -> None:
        """Choose the images and targets to start from."""
        if self.inherited:
            return
        config, features = self.config, self.known(survey, "train")
        if config.standardise:
            self.mean.copy_(features.mean(0))
            spread = features.std(0, correction=0)
            least = LEAST * spread.square().mean().sqrt().clamp(min=1e-6)
            self.spread.copy_(spread.maximum(least))
        if self.held is not None:
            pictures, targets = map(torch.from_numpy, self.held)
        else:
            rows = (features - self.mean) / self.spread
            self.origin.copy_(torch.randperm(survey.examples)[: config.pictures])
            pixels = survey.split("train").images(self.origin.cpu().numpy())
            pictures = zero_to_one(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            pictures = normalise(pictures) if config.normalised_start else pictures
            targets = rows[self.origin]
            if config.start_targets == "random":
                noise = torch.randn(targets.shape).to(self.device)
                targets = rows.mean(0) + noise * rows.std(0, correction=0)
        self.synthetic.pictures.copy_(pictures)
        self.synthetic.targets.copy_(targets)

    # --- pre-training

    def pretraining(self) -> Stage:
        """Return the last stage: a new network regresses the targets."""
        epochs = self.config.pretrain_epochs
        rounds = max(n for n in range(1, ROUNDS + 1) if epochs % n == 0)

        def batches(survey: Survey) -> Batches:
            return Steps(epochs // rounds * self._batches)

        def turns() -> list[Turn]:
            return [Turn([self.sgd(nn.ModuleList(networks()))], loss=self.regress, minimise="pretrain_loss")]

        def networks() -> list[nn.Module]:
            return [self.encoder, self.projector]

        return Stage("pretrain", rounds, networks, turns, batches, self._begin_pretraining)

    @property
    def _batches(self) -> int:
        """Number of mini-batches of a pass over the set."""
        return -(-len(self.origin) // self.config.pretrain_batch)

    def _begin_pretraining(self, survey: Survey) -> None:
        if self.config.learn == "none":
            self.start(survey)
        fresh: Any = self.new_network(self.config.encoder, self.config.pretrained)
        self.encoder, self.projector = fresh.encoder, fresh.head

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        if self.position.stage + 1 < len(self.stages()):
            return super().prepare(batch, generator)
        number, part = divmod(self.position.step, self._batches)
        order = torch.Generator().manual_seed(seed_of(self.seed, number))
        rows = torch.randperm(len(self.origin), generator=order)
        return {"rows": rows.tensor_split(self._batches)[part].to(self.device)}

    def regress(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the error of the network that remains, on a mini-batch of the set."""
        return {"pretrain_loss": self.error_on_set(lambda x: self.projector(self.encoder(x)), batch["rows"])}

    def row_wise(self) -> list[tuple[nn.Module, str]]:
        return []

    # --- measures, and what remains besides the encoder

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the outer loss of new networks, trained for a short time on the set, on a split's images. The
        difference of two logarithms is that of a ratio of errors.
        """
        found: list[float] = []
        for number in range(self.config.judges):
            wanted = (self.known(survey, split) - self.mean) / self.spread
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                seed_torch(seed_of(self.seed, number))
                network = self.new_network()
                self.train_on_set(network, self.sgd(network), self.config.judge_steps)
            embed = network.eval().encoder

            def features(batch: dict[str, Any], embed: nn.Module = embed) -> Tensor:
                rows: Tensor = embed(batch["image"])
                return rows

            with torch.no_grad():
                real = survey.over(split, features).to(self.device)
                found.append(float(self.outer_loss(embed(self.synthetic.pictures), real, wanted)))
        if not found:
            return {}
        error = float(np.mean(found))
        return {f"{self.measure}_mse": error, f"{self.measure}_log_mse": float(np.log(error))}

    def distilled(self) -> DistilledSet:
        """Return the synthetic images, as networks take them, and their targets."""
        both = self.synthetic.pictures, self.synthetic.targets
        return DistilledSet(*(part.detach().cpu().numpy() for part in both))

    def shown(self) -> NDArray[np.uint8]:
        """Return the synthetic images [m, size, size, 3] as bytes. Values outside the range are cut."""
        images = self.synthetic.pictures.detach().cpu()
        images = denormalise(images) if self.config.normalised_start else images.clamp(0, 1)
        return (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show synthetic images beside their first state and the real image whose features are nearest to the target."""
        split, chosen = survey.split("train"), np.unique(np.linspace(0, len(self.origin) - 1, SHOWN).astype(np.int64))
        targets = self.synthetic.targets.detach()[chosen]
        near = torch.cdist(targets, (self.known(survey, "train") - self.mean) / self.spread).argmin(1)
        rows = [("distilled", self.shown()[chosen]), ("nearest by target", split.images(near.cpu().numpy()))]
        first = self.origin.cpu().numpy()[chosen]
        if (first >= 0).all():
            rows.insert(0, ("at the start", split.images(first)))

        def cells(text: str, pictures: Any) -> dict[str, Any]:
            return {"cells": [{"png": png(p, least=48), "text": text} for p in pictures]}

        caption = (
            f"{len(chosen)} of {counted(len(self.origin), 'synthetic image')}, their first state, and the training image whose "
            "features by the teacher are nearest to the target. Values outside the range of pixels are cut."
        )
        return {"Synthetic images": {"kind": "captioned", "rows": [cells(*row) for row in rows], "caption": caption}}
