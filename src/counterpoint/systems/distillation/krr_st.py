"""KRR-ST: distil an unlabelled set into a few synthetic images with target vectors, on which a network is pre-trained.

Lee, Lee, Lee, Hwang: "Self-Supervised Dataset Distillation for Transfer Learning", ICLR 2024, arXiv 2310.06511; code
db-Lee/selfsup_dd.

    x, phi         a batch of n real images after augmentation, and the frozen self-supervised teacher with k outputs
    X_s, Y_s       m synthetic images and their target vectors; both are learnt, by an AdamW of their own
    omega          a network of the pool: an encoder, embed, then a linear head; it regresses Y_s on X_s by SGD for T steps
    H_s, H_x       [embed(X_s), 1] and [embed(x), 1]
    P              H_x H_s^T (H_s H_s^T + r I)^{-1} Y_s, the kernel ridge regression; r = ridge * trace, without gradient

The inner problem (pre-train on X_s) is deterministic, as it has no augmentation and no mask. The naive way, to differentiate
through one random draw of a self-supervised loss, is biased: the minimiser of one draw is not that of the mean. The solution
for the head alone has a closed form, so no step is unrolled. In the order of a run:

1. Start: X_s are m random images, Y_s the teacher's features. Each omega takes a random number of steps on them, 1 to T - 1.
2. Distil. A step draws omega, in evaluation mode; its loss is the mean of (P - phi(x))^2. Then omega takes one step on
   (X_s, Y_s). At age T a new network with a new optimiser replaces it instead.
3. Pre-train: a new network regresses Y_s on X_s. Its encoder is what remains; `counterpoint export` also writes the set.

- As in the code: raw pixels in 0..1 at the start, targets of normalised images, raw features, all rates and counts. Images of the
  set are neither augmented nor cut to a range.
- The code never sets a replaced network's age back, so every later visit replaces it again. Default here: the age is set back,
  the evident intent. `--no-reset-age` has the code's behaviour.
- Chosen: the cheapest of three equal ways to P, small systems in float64 (`core.ridge`). Mini-batches of pre-training have equal
  sizes. An age counts a network's steps before distillation, too. Standardised targets and a normalised start are settings, as
  are targets alone, images alone, and random targets.

`--start SET --learn none` pre-trains other networks on a set. Not built: fine-tuning of the whole network, the baselines with
labels, distillation without data. Nor the paper's ResNet-18 with a padded stem: any teacher by name serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.ridge import ridge_predict
from counterpoint.core.seeds import seed_torch
from counterpoint.core.transforms import once
from counterpoint.core.world import over_group, world
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.distilled_sets import DistilledSetConfig, DistilledSetLearner

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
    r"""Compute the mean of (P - Y)^2 over n rows and k outputs. P is the kernel ridge regression from the synthetic rows.

    Args:
        feat_syn, target_syn: features and targets of the m synthetic images. A column of ones is appended to all features.
        feat_real, target_real: features and the teacher's targets of n real images; no gradient.
        ridge: r over the trace of K_ss, at least 0, by default 1e-6. With 0 the rows, or the columns, must be independent.

    Source: the paper's outer objective, without its constant factor n k / 2. Duplicate rows are tolerated. The column of ones
    keeps the trace above 0, so no absolute ridge is needed. Raises ValueError for shapes that do not fit, an empty set, a
    negative ridge, and a singular system.

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
    feat_syn = once(feat_syn, "krr_outer_loss")  # the trace counts as a constant
    predicted = ridge_predict(feat_syn, target_syn, feat_real.detach(), ridge)
    wanted = target_real.detach().to(predicted.dtype)
    if world()[1] == 1:
        return F.mse_loss(predicted, wanted).to(feat_syn.dtype)
    return global_mean((predicted - wanted).square().mean(1)).to(feat_syn.dtype)


# -------------------------------------------------------------------------------------------------------------- settings


@dataclass
class KRRSTConfig(DistilledSetConfig):
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
    pool: int = 10
    """L, number of networks in the pool, at least 1."""
    most_age: int = 1000
    """T, number of a network's training steps after which the next visit replaces it, at least 2."""
    reset_age: bool = True
    """Give a replaced network the age 0. False: the authors' code, where every later visit replaces it."""
    ridge: float = 1e-6
    """Ridge over the trace of the synthetic images' kernel, > 0."""

    counts: ClassVar[tuple[str, ...]] = (*DistilledSetConfig.counts, "pool")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("ridge")
        self.need_share("final_rate")
        if self.most_age < 2:
            raise CounterpointError(f"most_age must be at least 2, got {self.most_age}")


# ------------------------------------------------------------------------------------------------------------ the learner


@contextmanager
def extracting(network: nn.Module) -> Iterator[None]:
    """Run a network of the pool in evaluation mode and without gradients of its weights."""
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        network.train().requires_grad_(True)


class KRRST(DistilledSetLearner):
    """The synthetic set, and a pool of networks with their ages."""

    measure: ClassVar[str] = "krr"
    config: KRRSTConfig
    inner: torch.optim.Optimizer | None = None
    ages: Int[Tensor, " pool"]

    def __init__(self, config: KRRSTConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.pool = nn.ModuleList()
        self.register_buffer("ages", torch.zeros(config.pool, dtype=torch.long))

    def structure(self) -> dict[str, Any]:
        found = super().structure()
        return found | {"pool": len(self.pool)} if found else {}

    def shape(self, pictures: int, width: int, pool: int | None = None) -> None:
        super().shape(pictures, width)
        self.fill_pool(self.config.pool if pool is None else pool)

    def fill_pool(self, many: int) -> None:
        """Build new networks of the pool, without their optimiser."""
        self.pool, self.inner = nn.ModuleList(self.new_network() for _ in range(many)), None

    def stages(self) -> list[Stage]:
        def trains() -> list[nn.Module]:
            return [self.synthetic, self.pool]

        distil = Stage("distil", self.config.epochs, trains, enter=self._begin_distillation, evaluated=False)
        return [distil, self.pretraining()] if self.config.learn != "none" else [self.pretraining()]

    # --- 1. start

    def _begin_distillation(self, survey: Survey) -> None:
        """Choose the set's start, and train each network of the pool on it for a random number of steps."""
        self.start(survey)
        self.fill_pool(self.config.pool)
        self.inner = self.sgd(self.pool)
        self.ages.copy_(torch.randint(1, self.config.most_age, (self.config.pool,)))
        for member, age in zip(self.pool, self.ages.tolist(), strict=True):
            self.train_on_set(member, self.inner, age)

    # --- 2. distil

    def turns(self) -> list[Turn]:
        """Return the turn of images and targets, and that of the pool. SGD skips networks without a gradient."""
        falling = 1 - self.config.final_rate
        outer = self.turn_of([self.synthetic], curve=lambda epoch: 1 - falling * epoch / self.epochs)
        self.inner = self.inner or self.sgd(self.pool)
        return [outer, Turn([self.inner], loss=self.advance, minimise="pool_loss")]

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        if "views" not in batch:
            return batch
        # The same numbers on all processes, which therefore choose and replace alike.
        member, draw = (torch.randint(n, (), generator=generator) for n in (len(self.pool), 2**62))
        return batch | {"member": int(member), "draw": int(draw)}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the outer loss of this step's network on the batch."""
        (view,), member = batch["views"], self.pool[batch["member"]]
        with extracting(member):
            synthetic = member.encoder(self.synthetic.pictures)
            with torch.no_grad():
                real = member.encoder(view)
        return {"loss": self.outer_loss(synthetic, real, self.wanted(view))}

    def outer_loss(self, synthetic: Tensor, real: Tensor, wanted: Tensor) -> Float[Tensor, ""]:
        return krr_outer_loss(synthetic, self.synthetic.targets, real, wanted, self.config.ridge)

    def advance(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the error of this step's network on the whole set. Replace an old network instead, with a loss of 0."""
        number = batch["member"]
        member = self.pool[number]
        if int(self.ages[number]) < self.config.most_age:
            self.ages[number] += 1
            return {"pool_loss": self.error_on_set(member, torch.arange(len(self.origin)))}
        with torch.random.fork_rng(devices=[]):
            seed_torch(batch["draw"])
            member.load_state_dict(self.new_network().state_dict())
        assert self.inner is not None
        for parameter in member.parameters():
            self.inner.state.pop(parameter, None)
        if self.config.reset_age:
            self.ages[number] = 0
        return {"pool_loss": torch.zeros((), requires_grad=True, device=self.device)}  # reaches no weight

    # --- 3. pre-train

    def _begin_pretraining(self, survey: Survey) -> None:
        super()._begin_pretraining(survey)
        self.fill_pool(0)


# Settings for a small set of small pictures on a few cores.
SMALL: dict[str, Any] = {
    "epochs": 60,
    "batch_size": 256,
    "encoder": "convnet",
    "lr": 3e-2,
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
