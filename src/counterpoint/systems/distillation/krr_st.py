"""KRR-ST: distil an unlabelled set into a few synthetic images with target vectors, on which a network is pre-trained.

Lee, Lee, Lee, Hwang: "Self-Supervised Dataset Distillation for Transfer Learning", ICLR 2024, arXiv 2310.06511; code
db-Lee/selfsup_dd.

    x, phi         a batch of n real images after augmentation, and the frozen self-supervised teacher with k outputs
    X_s, Y_s       m synthetic images and their target vectors; both are learnt, by an AdamW of their own
    omega          a network of the pool: `embed`, then a linear head; it regresses Y_s on X_s by SGD, up to an age of T steps
    H_s, H_x       [embed(X_s), 1] and [embed(x), 1]
    P              H_x H_s^T (H_s H_s^T + r I)^{-1} Y_s, the kernel ridge regression; r = ridge * trace, without gradient

The inner problem (pre-train on X_s) is deterministic, as it has no augmentation and no mask. The naive way, to differentiate
through one random draw of a self-supervised loss, is biased: the minimiser of one draw is not that of the mean. Solving for the
head alone has a closed form. So no step is unrolled. In the order of a run:

1. Start: X_s are m random images, Y_s the teacher's features. Each omega takes 1 to T - 1 steps on them, at random.
2. Distil. A step draws omega, in evaluation mode; its loss is the mean of (P - phi(x))^2. Then omega takes one step on (X_s,
   Y_s), or, at age T, is replaced by a new network with a new optimiser.
3. Pre-train: a new network regresses Y_s on X_s. Its encoder is what remains; `counterpoint export` also writes the set.

- Of the code: raw pixels in 0..1 at the start, targets of normalised images, raw features, all rates and counts.
- The code never sets a replaced network's age back, so later on each visit replaces it. Default here: it is set back, the
  evident intent. `--no-reset-age` has the code's behaviour.
- Chosen: the sum over outputs of P as H_x W, W from the smaller of two equal systems (`core.ridge`). float64 for small ones.
  Mini-batches of equal size. Standardised targets and a normalised start are settings.

Not built: the paper's ResNet-18 with a padded stem (any teacher by name serves), fine-tuning, the baselines with labels, and
knowledge distillation without data. The paper's learning rate is for a batch of 1,024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.ridge import ridge_weights
from counterpoint.core.world import over_group, world
from counterpoint.data.distilled import DistilledSet, read_set
from counterpoint.data.images import ImageData
from counterpoint.data.shown import png
from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.encoders.simple import Tower
from counterpoint.engine.loading import Batches, Steps
from counterpoint.engine.optim import light, optimisers
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.stepper import seed_of
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, cached
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.image_teachers import check_teacher, features_of, image_teacher
from counterpoint.tasks.images import ImagesConfig
from counterpoint.tasks.views import ViewsLearner
from counterpoint.views.images import denormalise, normalise, zero_to_one

SHOWN = 10  # synthetic images on the page
ROUNDS = 20  # epochs at most, in which pre-training is counted

# ------------------------------------------------------------------------------------------------------------ outer loss


@over_group
@full_precision
def krr_outer_loss(
    feat_syn: Float[Tensor, "m d"],
    target_syn: Float[Tensor, "m k"],
    feat_real: Float[Tensor, "n d"],
    target_real: Float[Tensor, "n k"],
    ridge: float = 1e-6,
) -> Float[Tensor, ""]:
    r"""Compute the mean of (P - Y)^2 over n rows and k outputs, with P the kernel ridge regression from the synthetic rows.

    Args:
        feat_syn, target_syn: features and targets of the m synthetic images. A column of ones is appended to all features.
        feat_real, target_real: features and the teacher's targets of n real images; no gradient.
        ridge: r over the trace of K_ss, at least 0, by default 1e-6. With 0 the rows, or the columns, must be independent.

    Source: Eq. 7 without its factor n k / 2. Duplicate rows are tolerated. The column of ones keeps the trace above 0, so no
    absolute ridge is needed. Raises ValueError for shapes that do not fit, an empty set, and a negative ridge.

    >>> krr_outer_loss(torch.eye(2), torch.zeros(2, 1), torch.eye(2), torch.ones(2, 1))
    tensor(1.)
    """
    four = {"feat_syn": feat_syn, "target_syn": target_syn, "feat_real": feat_real, "target_real": target_real}
    for name, part in four.items():
        if part.ndim != 2:
            raise ValueError(f"{name} must be a matrix, got {shapes(**{name: part})}")
    for side in ("syn", "real"):
        if len(four[f"feat_{side}"]) != len(four[f"target_{side}"]):
            raise ValueError(f"feat_{side} and target_{side} need one row for each image, got {shapes(**four)}")
    for kind in ("feat", "target"):
        if four[f"{kind}_syn"].shape[1] != four[f"{kind}_real"].shape[1]:
            raise ValueError(f"{kind}_syn and {kind}_real must have one width, got {shapes(**four)}")
    if not len(feat_syn):
        raise ValueError(f"feat_syn is an empty set: {shapes(feat_syn=feat_syn)}")
    need_rows(feat_real=feat_real)
    weights = ridge_weights(torch.cat([feat_syn, feat_syn.new_ones(len(feat_syn), 1)], 1), target_syn, ridge)
    weights = weights.to(feat_real.dtype)
    error = torch.addmm(weights[-1], feat_real.detach(), weights[:-1]) - target_real.detach()
    return global_mean(error.square().mean(1))


# -------------------------------------------------------------------------------------------------------------- settings


@dataclass
class KRRSTConfig(ImagesConfig):
    """Settings of KRR-ST. Defaults are the paper's for CIFAR-100."""

    epochs: int = 3334
    """Passes over the training images in distillation: 160,000 steps of 1,024 of CIFAR's 50,000 images."""
    batch_size: int = 1024
    encoder: str = "convnet"
    recipe: str = "weak"
    optimizer: str = "adamw"
    lr: float = 1e-4 / 4
    """Learning rate of images and targets at a batch of 256; it is scaled with batch_size / 256."""
    weight_decay: float = 0.0
    schedule: Literal["epoch", "step"] = "step"
    final_rate: float = 1e-3
    """Share of the learning rate at the end of distillation, approached linearly, 0 to 1."""
    teacher: str = "fit:barlow-twins?data=cifar10"
    """Frozen network whose features are regressed: run:RUN, fit:SLUG?data=SOURCE, hf:NAME, timm:NAME, torchvision:NAME."""
    teacher_size: int = 224
    """Pixels to which pictures are enlarged for a teacher of a library."""
    standardise: bool = False
    """Shift and scale the teacher's features to mean 0 and deviation 1 over the training images, output by output."""
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
    """Network of the pool and of the judges. Default: the encoder's."""
    pool: int = 10
    """Number of networks in the pool."""
    most_age: int = 1000
    """T, number of a network's training steps after which the next visit replaces it, at least 2."""
    reset_age: bool = True
    """Give a replaced network the age 0. False: the authors' code, where every later visit replaces it."""
    ridge: float = 1e-6
    """Ridge over the trace of the synthetic images' kernel, above 0."""
    inner_lr: float = 0.1
    """Learning rate of the SGD of the pool, of pre-training and of judges. It is not scaled."""
    inner_momentum: float = 0.9
    """Momentum of that SGD, 0 to 1."""
    inner_weight_decay: float = 1e-3
    """Weight decay of that SGD, at least 0."""
    pretrain_epochs: int = 1000
    """Passes over the synthetic images in pre-training."""
    pretrain_batch: int = 256
    """Synthetic images in a batch of pre-training, at most."""
    judges: int = 5
    """Number of new networks trained on the set in each evaluation, to measure `krr_mse` on its images; 0: none."""
    judge_steps: int = 60
    """Training steps of each of them."""

    counts: ClassVar[tuple[str, ...]] = (
        *ImagesConfig.counts, "teacher_size", "pictures", "pool", "pretrain_epochs", "pretrain_batch", "judge_steps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("ridge", "inner_lr")
        self.need_share("final_rate", "inner_momentum")
        if self.inner_weight_decay < 0 or self.judges < 0 or self.most_age < 2:
            raise CounterpointError(
                "inner_weight_decay and judges must not be negative and most_age must be at least 2, got "
                f"{self.inner_weight_decay}, {self.judges} and {self.most_age}"
            )
        for name, known in (
            ("learn", ("both", "targets", "pictures", "none")), ("start_targets", ("teacher", "random")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise unknown(name.replace("_", " "), getattr(self, name), known)
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
                f"{data.name} has {len(data.train)} training images, fewer than {self.pictures} synthetic ones; lower --pictures"
            )
        return super().facts(data)


# ------------------------------------------------------------------------------------------------------------ the learner


class Synthetic(nn.Module):
    """The synthetic images and their targets, as parameters."""

    def __init__(self, pictures: Tensor, targets: Tensor, learn: str) -> None:
        super().__init__()
        self.pictures = nn.Parameter(pictures, requires_grad=learn in ("both", "pictures"))
        self.targets = nn.Parameter(targets, requires_grad=learn in ("both", "targets"))


@contextmanager
def extracting(network: nn.Module) -> Iterator[None]:
    """Run a network of the pool in evaluation mode and without gradients of its weights."""
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        network.train().requires_grad_(True)


class KRRST(ViewsLearner):
    """Synthetic images with targets, a pool of networks with ages, a frozen teacher, and the encoder that remains."""

    crops: ClassVar[int] = 1
    compares: ClassVar[bool] = False
    config: KRRSTConfig
    teacher: Frozen | None = None
    inner: torch.optim.Optimizer | None = None
    synthetic: Synthetic
    pool: nn.ModuleList
    mean: Tensor
    spread: Tensor
    ages: Int[Tensor, " pool"]
    origin: Int[Tensor, " m"]

    def build_projector(self, dim: int) -> nn.Module:
        return nn.Identity()  # until the teacher's width is known

    def structure(self) -> dict[str, Any]:
        if not hasattr(self, "synthetic"):
            return {}
        m, width = self.synthetic.targets.shape
        return {"pictures": m, "width": width, "pool": len(self.pool)}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if structure:
            self._shape(**structure)

    def _shape(self, pictures: int, width: int, pool: int = 0) -> None:
        """Build what depends on the number of images and on the teacher's width."""
        empty, config = torch.zeros(pictures, 3, self.size, self.size), self.config
        self.synthetic = Synthetic(empty, torch.zeros(pictures, width), config.learn)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("ages", torch.zeros(config.pool, dtype=torch.long))
        self.register_buffer("origin", torch.full((pictures,), -1))  # positions of the first images, -1 from a file
        self.projector = nn.Linear(self.encoder.dim, width)
        self.pool = nn.ModuleList(self._network() for _ in range(pool))
        self.inner = None
        self.to(self.device)

    def _network(self, encoder: str = "", pretrained: bool = False) -> Tower:
        """Build a new network with a head: by default one of the pool."""
        name = encoder or self.config.extractor or self.config.encoder
        body = build_image_encoder(name, self.size, pretrained=pretrained)
        return Tower(body, nn.Linear(body.dim, len(self.mean))).to(self.device)

    def _sgd(self, networks: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        more: dict[str, Any] = {"momentum": config.inner_momentum, "weight_decay": config.inner_weight_decay}
        return light(torch.optim.SGD)(networks.parameters(), lr=config.inner_lr, **more)

    def _train(self, network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Train a network on the whole set. Every process does the same."""
        images, targets = self.synthetic.pictures.detach(), self.synthetic.targets.detach()
        try:
            for _ in range(steps):
                optimizer.zero_grad()
                nn.functional.mse_loss(network(images), targets).backward()
                optimizer.step()
        except ValueError as error:  # of batch normalisation
            raise CounterpointError(f"--pictures {len(images)} is too small for this network: {error}") from error

    # --- the teacher

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        self._taught()

    def _taught(self) -> Frozen:
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

    def _known(self, survey: Survey, split: str) -> Float[Tensor, "examples k"]:
        """Return the teacher's features of a split's images. CounterpointError where they are not finite."""
        found = cached(self._taught(), survey, split)
        rows = found[torch.arange(len(found))]
        if not bool(rows.isfinite().all()):
            raise CounterpointError(f"--teacher {self.config.teacher} gives features that are NaN or infinite")
        return rows.to(self.device)

    def standardised(self, features: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Shift and scale features of the teacher. Without the setting `standardise` they stay as they are."""
        return (features - self.mean) / self.spread

    # --- 1. start

    def stages(self) -> list[Stage]:
        config = self.config
        rounds = max(n for n in range(1, ROUNDS + 1) if config.pretrain_epochs % n == 0)

        def turns() -> list[Turn]:
            optimizer = self._sgd(nn.ModuleList([self.encoder, self.projector]))
            return [Turn([optimizer], loss=self.regress, minimise="pretrain_loss")]

        def batches(survey: Survey) -> Batches:
            return Steps(config.pretrain_epochs // rounds * self._batches)

        own = lambda: [self.encoder, self.projector]  # noqa: E731
        pretrain = Stage("pretrain", rounds, own, turns, batches, self._begin_pretraining)
        if config.learn == "none":
            return [pretrain]
        return [
            Stage("distil", config.epochs, lambda: [self.synthetic, self.pool], enter=self._start, evaluated=False),
            pretrain,
        ]

    def _start(self, survey: Survey) -> None:
        """Choose the images and targets to start from, and train each network of the pool on them."""
        config = self.config
        features = self._known(survey, "train")
        if not hasattr(self, "synthetic"):  # else this run continues another one, from its set
            self._choose(survey, features)
        if self.synthetic.targets.shape[1] != features.shape[1]:
            raise CounterpointError(
                f"--teacher {config.teacher} gives {features.shape[1]} features, and the set to start from has targets of "
                f"{self.synthetic.targets.shape[1]}: name the teacher of that set"
            )
        if config.learn == "none":
            return
        self.pool = nn.ModuleList(self._network() for _ in range(config.pool))
        self.inner = self._sgd(self.pool)
        self.ages.copy_(torch.randint(1, config.most_age, (config.pool,)))
        for member, age in zip(self.pool, self.ages.tolist(), strict=True):
            self._train(member, self.inner, age)

    @torch.no_grad()
    def _choose(self, survey: Survey, features: Float[Tensor, "examples k"]) -> None:
        config = self.config
        held = read_set(config.start, self.size) if config.start else None
        self._shape(config.pictures if held is None else len(held.pictures), features.shape[1])
        if config.standardise:
            self.mean.copy_(features.mean(0))
            self.spread.copy_(features.std(0, correction=0).clamp(min=1e-6))
        rows = self.standardised(features)
        if held is not None:
            pictures, targets = map(torch.from_numpy, held)
            if targets.shape[1] != features.shape[1]:
                self.synthetic = Synthetic(pictures, targets, config.learn)  # named by the caller's check
                return
        else:
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

    # --- 2. distil

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        if self.position.stage + 1 == len(self.stages()):
            number, part = divmod(self.position.step, self._batches)
            order = torch.Generator().manual_seed(seed_of(self.seed, number))
            rows = torch.randperm(len(self.origin), generator=order)
            return {"rows": rows.tensor_split(self._batches)[part].to(self.device)}
        # The same numbers on all processes, which therefore choose and replace alike.
        member, draw = (
            torch.randint(len(self.pool), (), generator=generator),
            torch.randint(2**62, (), generator=generator),
        )
        return super().prepare(batch, generator) | {"member": int(member), "draw": int(draw)}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the outer loss of a network of the pool on this batch."""
        (view,), member = batch["views"], self.pool[batch["member"]]
        wanted = self.standardised(features_of(self._taught(), {"image": view}))
        with extracting(member):
            synthetic = member.encoder(self.synthetic.pictures)
            with torch.no_grad():
                real = member.encoder(view)
        return {"loss": krr_outer_loss(synthetic, self.synthetic.targets, real, wanted, self.config.ridge)}

    def advance(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the same network's error on the whole set, for its step; or replace it where it is old."""
        number = batch["member"]
        if int(self.ages[number]) < self.config.most_age:
            self.ages[number] += 1
            return {"pool_loss": self._error(self.pool[number], torch.arange(len(self.origin)))}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch["draw"])
            self.pool[number].load_state_dict(self._network().state_dict())
        assert self.inner is not None
        for parameter in self.pool[number].parameters():
            self.inner.state.pop(parameter, None)
        if self.config.reset_age:
            self.ages[number] = 0
        return {"pool_loss": torch.zeros((), requires_grad=True, device=self.device)}  # reaches no weight: no step

    def _error(self, network: Any, rows: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Compute the squared error on these rows of the set, of which each process takes its share."""
        rank, size = world()
        mine = rows[rank::size]
        images, targets = self.synthetic.pictures.detach()[mine], self.synthetic.targets.detach()[mine]
        return global_mean((network(images).float() - targets).square().mean(1))

    def turns(self) -> list[Turn]:
        """Return the turn of images and targets, and the turn of the pool. SGD keeps a state for each of its networks."""
        config = self.config
        falling = 1 - config.final_rate
        outer = optimisers(
            config, [self.synthetic], self.epochs, config.batch_size, steps_per_epoch=self.steps_per_epoch,
            curve=lambda epoch: 1 - falling * epoch / self.epochs,
        )  # fmt: skip
        self.inner = self.inner or self._sgd(self.pool)
        return [outer, Turn([self.inner], loss=self.advance, minimise="pool_loss")]

    def row_wise(self) -> list[tuple[nn.Module, str]]:
        return []

    # --- 3. pre-train

    @property
    def _batches(self) -> int:
        """Number of mini-batches of a pass over the set."""
        return -(-len(self.origin) // self.config.pretrain_batch)

    def _begin_pretraining(self, survey: Survey) -> None:
        if self.config.learn == "none":
            self._start(survey)
        self.pool, self.inner = nn.ModuleList(), None
        fresh = self._network(self.config.encoder, self.config.pretrained)
        self.encoder, self.projector = fresh.encoder, fresh.head

    def regress(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the error of the network that remains, on a mini-batch of the set."""
        return {"pretrain_loss": self._error(lambda images: self.projector(self.encoder(images)), batch["rows"])}

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the outer loss of new networks, trained for a short time on the set, on a split's images."""
        found, wanted = [], None
        for number in range(self.config.judges):
            wanted = self.standardised(self._known(survey, split)) if wanted is None else wanted
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(seed_of(self.seed, number))
                network = self._network()
                self._train(network, self._sgd(network), self.config.judge_steps)
            embed = network.eval().encoder
            real = survey.over(split, lambda batch, embed=embed: embed(batch["image"])).to(self.device)
            with torch.no_grad():
                four = embed(self.synthetic.pictures), self.synthetic.targets, real, wanted
                found.append(float(krr_outer_loss(*four, self.config.ridge)))
        return {"krr_mse": float(np.mean(found))} if found else {}

    # --- what remains besides the encoder

    def distilled(self) -> DistilledSet:
        """Return the synthetic images, as networks take them, and their targets."""
        return DistilledSet(
            *(part.detach().cpu().numpy() for part in (self.synthetic.pictures, self.synthetic.targets))
        )

    def shown(self) -> UInt8[np.ndarray, "m size size 3"]:
        """Return the synthetic images as bytes. Values outside the range are cut."""
        images = self.synthetic.pictures.detach().cpu()
        images = denormalise(images) if self.config.normalised_start else images.clamp(0, 1)
        return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show synthetic images beside their first state and the real image whose features are nearest to the target."""
        split, chosen = survey.split("train"), np.unique(np.linspace(0, len(self.origin) - 1, SHOWN).astype(np.int64))
        targets = self.synthetic.targets.detach()[chosen]
        near = torch.cdist(targets, self.standardised(self._known(survey, "train"))).argmin(1).cpu().numpy()
        rows = [("distilled", self.shown()[chosen]), ("nearest by targets", split.images(near))]
        first = self.origin.cpu().numpy()[chosen]
        if (first >= 0).all():
            rows.insert(0, ("start", split.images(first)))
        larger = -(-48 // self.size)  # pictures of a few pixels are shown larger

        def cells(text: str, pictures: Any) -> dict[str, Any]:
            return {"cells": [{"png": png(p.repeat(larger, 0).repeat(larger, 1)), "text": text} for p in pictures]}

        caption = (
            f"{len(chosen)} of {len(self.origin)} synthetic images, what each began as, and the training image whose "
            "features by the teacher are nearest to its learnt target. Values outside the range of pixels are cut."
        )
        return {"Synthetic images": {"kind": "captioned", "rows": [cells(*row) for row in rows], "caption": caption}}


# Settings for a small set of small pictures on a few cores.
SMALL: dict[str, Any] = {
    "epochs": 60,
    "batch_size": 256,
    "encoder": "convnet",
    "lr": 1e-2,
    "teacher": "torchvision:resnet18",
    "standardise": True,
    "normalised_start": True,
    "pictures": 50,
    "pool": 4,
    "most_age": 60,
    "pretrain_epochs": 300,
}
TEACHER = (
    "fit:barlow-twins?data=digits%3Fsize=8&encoder=conv-fine&recipe=digits-hard&epochs=60&hidden=128&projection=64"
    "&evaluate_every=60"
)

SYSTEM = System(
    slug="krr-st",
    task="views",
    config=KRRSTConfig,
    learner=KRRST,
    data="digits?size=8",
    recipes={
        "digits": SMALL
        | {"encoder": "convnet-s", "recipe": "digits-moved", "teacher": TEACHER, "pictures": 10, "epochs": 100}
    },
    recipe=SMALL,
)
