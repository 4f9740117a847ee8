r"""PCL-SR: re-train a network that enlarges pictures with L1 and a contrast of sharper and softer copies of the same scene.

Wu, Jiang, Liu: "A Practical Contrastive Learning Framework for Single-Image Super-Resolution", IEEE TNNLS 2023, arXiv
2111.13924. Code: github.com/Aitical/PCL-SISR.

Pixel losses give blurred pictures. PCL-SR pulls the output towards the original and sharpened copies of it. It pushes the output
away from the enlarged input and blurred copies of the original. Features come from a small critic of the Haar bands without the
low frequencies. Critic and network learn in turns. The network gets no adversarial loss.

    F, x, y       the network, a small picture in 0..1, the original; F(x) is the output
    K             number of sharpened copies, and of blurred ones
    E, E_l        the critic, and the output of its block l (0 to 7) with C channels
    s(u, v)       cosine of two maps at each place, over channels; the mean over places
    P, N          positives y and its K sharpened copies; negatives x, enlarged, and K blurred copies of y

    r, f          logits of E: of y and its sharpened copies; of F(x) and the blurred copies of y
    half(r, f)  = mean_i [ -r_i + log( e^{r_i} + sum_j e^{f_j} ) ]
    L_critic    = half(r, f) + half(-f, -r)
    l_k         = mean_b [ -s(a, p_k) + log( e^{s(a, p_k)} + sum_j e^{s(a, n_j)} ) ],   a = E_l(F(x)), no temperature
    L           = R mean|F(x) - y| + alpha mean_l mean_k l_k

A step updates E by L_critic, then F by L through the updated E. E's weights and running statistics do not change in the second
turn. Other values of `contrast`: l_k without the positive in the denominator (lmcl); a difference (cosine) or a ratio (l1, l2) of
means over the layers (`feature_ratio`); none, L1 alone. The naive ratio is --contrast l1 --copies 0.

half(r, f) is in core/adversarial.py, s and l_k are in core/map_similarity.py, E is in encoders/critics.py.

Differences from the released code:
  - It computes E(F(x)) without gradient, so F learns from L1 alone. Here the gradient flows; `gradient_bug` restores the fault.
  - It normalises every set of pictures in E by its own batch statistics, also in the second turn (`norm="each"`). By default
    pictures of both kinds share the statistics of the first turn, and the second turn uses the running ones.
  - Its pre-trained weights come from other projects. `weights` and `pretrained` load such weights. Otherwise a first stage trains
    F by L1 with the code's defaults: half the learning rate after two thirds of the epochs.
  - Nets with other ranges than R = 255 set `rgb_range`: it weights L1 against the contrast. Networks here take 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.adversarial import contrastive_discriminator
from counterpoint.core.checks import need_word
from counterpoint.core.distributed import global_mean
from counterpoint.core.map_similarity import Maps, map_similarity, need_maps, patch_nce, unit_maps
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.encoders.critics import BLOCKS, VGG19, HaarCritic, fixed
from counterpoint.engine.optim import clip_values, constant_rate, restarts
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, snapshot
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.restored import RestoredConfig, RestoredLearner
from counterpoint.tasks.sample_figures import samples_figure
from counterpoint.views.images.sharpness import Samples, need_rising

TINY = 3e-7  # the floor of a ratio's denominator
LEAST = 17  # pixels of a patch: on maps of one place PyTorch's CPU leaves weight gradients in bf16 unset (docs/guides/libraries.md)

# --------------------------------------------------------------------------------------------------------------- equations


class FeatureRatio(NamedTuple):
    loss: Float[Tensor, ""]
    positive: Float[Tensor, ""]
    negative: Float[Tensor, ""]


Ratio = Literal["cosine", "l1", "l2"]


@over_group
@full_precision
def feature_ratio(
    anchors: Sequence[Maps],
    positives: Sequence[Float[Tensor, "positives b _ _ _"] | Sequence[Maps]],
    negatives: Sequence[Float[Tensor, "negatives b _ _ _"] | Sequence[Maps]],
    kind: Ratio | int = "cosine",
    layer_weight: bool = False,
) -> FeatureRatio:
    r"""Compare the mean nearness to positives, Pbar, with that to negatives, Nbar, over all layers.

    Args:
        anchors: for each layer the feature maps of the outputs.
        positives, negatives: for each layer one or more maps like the anchor; no gradient.
        kind: "cosine" (or 0; default): Nbar - Pbar of cosines s. "l2" (or 2): (1 - Pbar) / (1 - Nbar + 3e-7) of cosines. "l1"
            (or 1): Pbar / (Nbar + 3e-7) of mean absolute differences. It is huge where negatives equal the anchor.
        layer_weight: weight layer number j of the list by 1 / 2^j; default no. Pbar is a sum over layers, a mean over positives.

    Returns the loss, Pbar and Nbar. Raises ValueError for shapes that do not fit, an empty batch, no layer and an unknown kind.
    Raises it too for a layer without a positive or a negative. Source: the authors' code, loss/cl.py.

    >>> a = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    >>> feature_ratio([a], [[a]], [[a.flip(1)]]).loss
    tensor(-1.)
    """
    names: tuple[str, ...] = get_args(Ratio)
    chosen = kind if isinstance(kind, str) else dict(enumerate(names)).get(int(kind), str(kind))
    need_word(names, kind=chosen)
    if not len(anchors) or not len(anchors) == len(positives) == len(negatives):
        raise ValueError(
            f"anchors, positives and negatives need one entry for each layer, got {len(anchors)}, {len(positives)} and "
            f"{len(negatives)}"
        )
    sums: list[Tensor] = []
    for name, sides in (("positives", positives), ("negatives", negatives)):
        total = torch.zeros((), device=anchors[0].device)
        for layer, (anchor, maps) in enumerate(zip(anchors, sides, strict=True)):
            need_maps(anchor, **{name: maps})
            if not len(maps):
                raise ValueError(f"{name} of layer {layer} must hold at least one map")
            if chosen == "l1":
                found = [(anchor - one.detach()).abs().mean((1, 2, 3)) for one in maps]
            else:
                a = unit_maps(anchor)
                found = [map_similarity(a, one) for one in maps]
            total = total + global_mean(torch.stack(found).mean(0)) * (0.5**layer if layer_weight else 1.0)
        sums.append(total)
    p, n = sums
    loss = {"cosine": n - p, "l1": p / (n + TINY), "l2": (1 - p) / (1 - n + TINY)}[chosen]
    return FeatureRatio(loss, p, n)


# ------------------------------------------------------------------------------------------------------------- the learner


@dataclass
class PCLSRConfig(RestoredConfig):
    """Settings of PCL-SR. Defaults are the authors' for RCAN at scale 4: 600 epochs of 1,000 steps, after a pre-training."""

    optimizer: str = "adam"
    lr: float = 8e-4
    """Learning rate of both networks at a batch of 256, multiplied by batch_size / 256; the critic's stays constant."""
    weight_decay: float = 0.0
    least_lr: float = 1e-8
    """Learning rate at the end of a cycle, at least 0."""
    cycles: int = 3
    """Number of cycles of the learning rate, each half a cosine; at least 1."""
    restart_weight: float = 1.0
    """Factor of the learning rate in all cycles after the first, 0 to 1; 0.5 for NLSN."""
    clip_value: float = 1.0
    """Largest absolute value of an entry of the network's gradient, at least 0; 0: no limit."""
    pretrain_epochs: int = 300
    """Epochs of pre-training by L1, at least 0; 0: none. With --weights or --pretrained there are none either."""
    pretrain_lr: float = 1.6e-3
    """Learning rate of the pre-training at a batch of 256, > 0; half of it in the last third."""
    rgb_range: float = 255.0
    """R, the factor of L1 of pictures in 0..1, > 0: the range in which alpha was chosen (RCAN 255, NLSN 1)."""
    contrast: Literal["infonce", "lmcl", "cosine", "l1", "l2", "none"] = "infonce"
    """Term beside L1: infonce; lmcl, without the positive in the denominator; cosine, a difference; l1 or l2, a ratio; none."""
    alpha: float = 5.0
    """Weight of the contrast, at least 0; 5 for RCAN, 3 for NLSN."""
    embedding: Literal["critic", "vgg19"] = "critic"
    """Features to contrast: the critic's, or VGG19's of torchvision, which does not learn."""
    layers: tuple[int, ...] = (4,)
    """Blocks of the critic (0 to 7) to contrast, or numbers of VGG19's layers."""
    layer_weights: bool = False
    """Weight layer j of `layers`, from 0, by 1 / 2^j, with the contrasts cosine, l1 and l2."""
    copies: int = 3
    """K, the number of sharpened positives and of blurred negatives beside the original and the enlarged input; 0: none."""
    sharpness: tuple[float, float] = (0.5, 3.0)
    """Least and greatest factor of sharpening, at least 0; below 1 blurs, 1 changes nothing."""
    blur: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of a negative's blur, in pixels, > 0."""
    noisy: bool = False
    """Add the original with noise of 2 grey levels to the positives."""
    shuffled: bool = False
    """Add each negative of another scene of the batch (of this process's share) to the negatives."""
    critic_width: int = 64
    """Channels of the critic's first block, at least 1."""
    critic_copies: bool = True
    """Let the critic learn from the sharpened copies as real and from the blurred ones as restored, too."""
    norm: Literal["shared", "each"] = "shared"
    """Statistics of the critic's batch normalisation: of all pictures of its turn, then running ones; or, as in the released code,
    of each set of pictures in both turns."""
    gradient_bug: bool = False
    """Stop the contrast's gradient before the network, as the released code does: training is then that of L1 alone."""

    counts: ClassVar[tuple[str, ...]] = (*RestoredConfig.counts, "cycles", "critic_width")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("pretrain_lr", "rgb_range")
        self.need_share("restart_weight")
        self.need_weight("least_lr", "clip_value", "pretrain_epochs", "alpha", "copies")
        need_rising(0.0, sharpness=self.sharpness)
        need_rising(1e-6, blur=self.blur)
        most = BLOCKS if self.embedding == "critic" else 37
        if not self.layers or not all(0 <= layer < most for layer in self.layers):
            raise CounterpointError(
                f"layers must be numbers from 0 to {most - 1} of {self.embedding}, got {self.layers}"
            )
        if self.contrast != "none" and self.patch < LEAST:
            raise CounterpointError(f"patch must be at least {LEAST} pixels for the critic, got {self.patch}")
        if self.norm == "each" and self.batch_size == 1 and self.patch <= 32:
            raise CounterpointError(
                f"a batch of one patch of {self.patch} pixels has no statistics in the critic's last block; set --norm shared or "
                "a larger --batch-size or --patch"
            )


class PCLSR(RestoredLearner):
    """A network that enlarges pictures, and a critic of their high frequencies."""

    config: PCLSRConfig

    def __init__(self, config: PCLSRConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        contrasts = config.contrast != "none"
        self.critic = HaarCritic(config.critic_width) if contrasts and config.embedding == "critic" else None
        self.vgg = Frozen(VGG19(), "torchvision:vgg19") if contrasts and config.embedding == "vgg19" else None
        self.samples = Samples(config.copies, config.sharpness, config.blur, noisy=config.noisy)
        self.before = snapshot(self.network)  # the network at the beginning of the last stage, for the page

    # --- stages: L1 first, then L1 and the contrast in turns

    def stages(self) -> list[Stage]:
        config = self.config
        last = Stage("contrast", config.epochs, enter=self._remember)
        if not config.pretrain_epochs or config.weights or config.pretrained:
            return [last]
        return [Stage("pre-training", config.pretrain_epochs, lambda: [self.network], self.pretraining_turns), last]

    def _remember(self, survey: Survey) -> None:
        self.before = snapshot(self.network)

    @property
    def pretraining(self) -> bool:
        """Whether the current stage trains by L1 before the contrast."""
        return self.survey is not None and self.position.stage + 1 < len(self.stages())

    def pretraining_turns(self) -> list[Turn]:
        """Return the turn of the first stage: L1, with half the learning rate in the last third."""
        last, rate = 2 * self.epochs / 3, self.config.pretrain_lr / self.config.lr
        return [self.turn_of([self.network], curve=lambda epoch: rate * (1.0 if epoch < last else 0.5))]

    def turns(self) -> list[Turn]:
        """Return the turns of a step: first the critic, if it learns, then the network."""
        config = self.config
        floor = config.least_lr / (config.lr * config.batch_size / 256)
        curve = restarts(self.epochs, config.cycles, config.restart_weight, floor)
        network = self.turn_of([self.network], curve=curve)
        clip_values(network.optimizers, config.clip_value)
        if self.critic is None:
            return [network]
        critic = self.turn_of([self.critic], curve=constant_rate)
        return [Turn(critic.optimizers, critic.schedules, self.critic_loss, "critic_loss"), network]

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Cut patches, then make positives and negatives of them. All contrasts of a seed see the same patches."""
        batch = super().prepare(batch, generator)
        low, high = batch["low"], batch["high"]
        if self.config.contrast == "none" or self.pretraining:
            return batch
        total, mine = self.share(len(high))
        drawn = self.samples.draw((total, *high.shape[1:]), generator)
        order = torch.rand(total, generator=generator)[mine].argsort()
        positives, negatives = self.samples.apply(high, low, drawn.take(mine))
        return batch | {"positives": positives, "negatives": negatives, "order": order.to(high.device)}

    def critic_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute L_critic. The outputs stay in the batch for the second turn."""
        assert self.critic is not None
        batch["restored"] = restored = self.network(batch["low"])
        copies = self.config.copies if self.config.critic_copies else 0
        real = batch["positives"][: 1 + copies]
        fake = [restored.detach(), *batch["negatives"][1 : 1 + copies]]
        if self.config.norm == "each":
            logits = [self.critic(images) for images in (*real, *fake)]
        else:
            logits = list(self.critic(torch.cat([*real, *fake])).chunk(len(real) + len(fake)))
        return {
            "critic_loss": contrastive_discriminator(torch.cat(logits[: len(real)]), torch.cat(logits[len(real) :]))
        }

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        restored = batch.pop("restored", None)
        restored = self.network(batch["low"]) if restored is None else restored
        l1 = global_mean((restored.float() - batch["high"]).abs().mean((1, 2, 3)))
        if config.contrast == "none" or self.pretraining:
            return {"loss": config.rgb_range * l1, "l1": l1}
        contrast = self._contrast(restored, batch)
        return {"loss": config.rgb_range * l1 + config.alpha * contrast, "l1": l1, "contrast": contrast}

    def _contrast(self, restored: Tensor, batch: dict[str, Any]) -> Tensor:
        """Compute L_CL through the fixed critic."""
        config, each = self.config, self.config.norm == "each"
        embed: Any = self.critic if self.vgg is None else self.vgg.module
        many, others = len(batch["positives"]), [*batch["positives"], *batch["negatives"]]
        with fixed(embed, own_statistics=each and self.vgg is None):
            with torch.no_grad():
                parts = [embed.features(x, config.layers) for x in (others if each else [torch.cat(others)])]
            with torch.set_grad_enabled(not config.gradient_bug):
                anchors = embed.features(restored, config.layers)
        maps = [torch.cat(layer).unflatten(0, (len(others), -1)) for layer in zip(*parts, strict=True)]
        positives = [layer[:many] for layer in maps]
        negatives = [layer[many:] for layer in maps]
        if config.shuffled:
            negatives = [torch.cat([layer, layer[:, batch["order"]]]) for layer in negatives]
        if config.contrast in ("cosine", "l1", "l2"):
            return feature_ratio(anchors, positives, negatives, config.contrast, config.layer_weights).loss
        include = config.contrast == "infonce"
        each_layer = zip(anchors, positives, negatives, strict=True)
        return torch.stack([patch_nce(a, p, n, include) for a, p, n in each_layer]).mean()

    # --- the page

    def columns(self, low: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n 3 H W"]]:
        began = {"before the contrast": self.before(low)} if self.survey is not None else {}
        return began | super().columns(low)

    @torch.no_grad()
    def figures(self, survey: Survey) -> dict[str, Any]:
        found = super().figures(survey)
        if self.config.contrast == "none":
            return found
        batch, generator = survey.batch("test", [0]), torch.Generator().manual_seed(self.seed)
        drawn = samples_figure(self.samples, batch["high"], batch["low"], self.config.scale, generator)
        return found | {"Positives and negatives": drawn}


LAPTOP: dict[str, Any] = {
    "network": "edsr-s",
    "scale": 2,
    "patch": 48,
    "batch_size": 8,
    "repeats": 4,
    "critic_width": 16,
    "lr": 0.016,
    "pretrain_lr": 0.032,
    "pretrain_epochs": 50,
    "epochs": 32,
    "cycles": 1,
}

SYSTEM = System(
    slug="pcl-sr",
    task="restored",
    config=PCLSRConfig,
    learner=PCLSR,
    data="photographs",
    recipe=LAPTOP,
)
