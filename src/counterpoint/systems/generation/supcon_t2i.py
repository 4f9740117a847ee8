r"""SupCon-T2I: label-guided supervised contrast in both phases of text-to-image GANs, by two branches with shared parameters.

Liu, Zhang, Zhang, Li, Pan: "A Framework For Image Synthesis Using Supervised Contrastive Learning", ICPR 2024, arXiv 2412.03957.
No code of the authors is public. It builds on AttnGAN (arXiv 1711.10485) and GALIP (arXiv 2301.12959).

A text-to-image GAN learns to match pictures and captions first, then to generate. The match knows only which caption belongs to
which picture. Here both phases see two pairs of each class, one in each branch, and pull all pictures and captions of a class
together.

    E_I, E_T      encoders of pictures (code, regions) and of captions (sentence, words); both branches share them
    X, Z          codes and sentences of both branches
    F             codes E_I(G(z, E_T(T))) of generated pictures of both branches
    sup(A, C)     mean over anchors i of A of -1/|P(i)| sum_{j in P(i)} [ s_ij - log sum_j' e^{s_ij'} ], s = cosine / tau
    L_DAMSM       CE of gamma3 cosines of codes and sentences both ways, and of gamma3 R, the match by words (core/damsm.py)

    L_pre = sum over branches of L_DAMSM + inter [ sup(X,Z) + sup(Z,X) ] / 2 + inner [ sup(X,X) + sup(Z,Z) ] / 2
    L_G   = sum over branches of [ L_adv + match L_m ] + sup_weight [ sup(F,Z) + sup(F,F) ] / 2

P(i) are all candidates of the anchor's class, without the anchor itself. The first phase trains E_I and E_T, the second D and G in
turns, with both encoders fixed. The discriminator has no contrastive term.

    attngan-s   L_adv: binary cross-entropy of both logits at two scales, and the KL term; L_m = L_DAMSM of the largest pictures
    galip-s     L_adv: hinge with the gradient penalty, D on E_I's maps; L_m = -mean cosine of code and sentence

Choices where the paper's print was not available: the form of the sums, weights of 1, tau = 1 / gamma3, and the masking of
DAMSM's negatives of the same class, which stays on (`mask_same_class`). A phase without labels has one branch of all pictures, so
every arm sees as many pictures in a step. Pairs without a class form a class of their own each.

Left out: DM-GAN and SSA-GAN as backbones, labels with several classes, real pictures among the candidates of sup(F, F), and the
compared UniCL and cross-entropy guidance. Regions are the last map of E_I with 4 cells a side or more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.averages import blended
from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.damsm import damsm_sentence, damsm_words
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, mean_where
from counterpoint.core.operands import class_similarity, positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Diagonal
from counterpoint.core.world import over_group
from counterpoint.encoders.critics import fixed
from counterpoint.encoders.generators import PictureEncoder, WordEncoder, build_critics, build_generator, check_backbone
from counterpoint.encoders.images import check_image_encoder
from counterpoint.engine.loading import Batches
from counterpoint.engine.optim import optimisers
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.branches import Partners, joined
from counterpoint.tasks.generation import GenerationConfig, GenerationLearner, signed

# --------------------------------------------------------------------------------------------------------------- equations


@over_group
@full_precision
def label_guided_contrast(
    anchors: Float[Tensor, "n dim"],
    candidates: Float[Tensor, "m dim"],
    labels_a: Int[Tensor, " n"],
    labels_c: Int[Tensor, " m"],
    temperature: float = 0.1,
    exclude_self: bool = False,
) -> Float[Tensor, ""]:
    r"""Compute sup(A, C): the mean over anchors of -log-softmax over candidates, averaged over those of the anchor's class.

    Args:
        anchors, candidates: rows of two sets, which this function normalises, or one set twice.
        labels_a, labels_c: classes of both.
        temperature: > 0, divides cosines; by default 0.1.
        exclude_self: the candidates are the anchors in the same order, and an anchor is no candidate of its own. Default: no.

    Returns the mean over anchors with a positive, 0 without any. Time is linear in the positives, by class sums; memory is linear
    in the rows.

    Raises ValueError for shapes that do not fit, an empty set, and a temperature that is not positive and finite.

    >>> x, y = torch.eye(3), torch.arange(3)
    >>> label_guided_contrast(x, x, y, y, temperature=1.0)  # CE of the unit matrix
    tensor(0.5514)
    """
    if anchors.ndim != 2 or candidates.ndim != 2 or anchors.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"anchors and candidates must be [n, dim] and [m, dim], got {shapes(anchors=anchors, candidates=candidates)}"
        )
    for name, labels, rows in (("labels_a", labels_a, anchors), ("labels_c", labels_c, candidates)):
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"{name} must be [{len(rows)}], got {list(labels.shape)}")
    if exclude_self and len(anchors) != len(candidates):
        raise ValueError(f"exclude_self needs candidates like anchors, got {len(candidates)} for {len(anchors)}")
    need_rows(anchors=anchors, candidates=candidates)
    need_positive(temperature=temperature)
    alone = exclude_self and anchors is candidates  # the kernel computes half of a symmetric matrix
    x = scaled(unit(anchors), temperature**0.5 if alone else temperature)
    y = x if alone else unit(candidates)
    similarity, count = class_similarity(x, gather_rows(y), labels_a, gather_rows(labels_c))
    if exclude_self:
        similarity, count = similarity - positive_similarity(x, y), count - 1
    log_z = batch_logsumexp(x, None if alone else y, exclude=Diagonal() if exclude_self else ()).rows
    losses = torch.where(count > 0, log_z - similarity / count.clamp(min=1), 0.0)
    return mean_where(losses, count > 0)


# ------------------------------------------------------------------------------------------------------------- the learner

Labels = Literal["both", "pretraining", "none"]


@dataclass
class SupConT2IConfig(GenerationConfig):
    """Settings of SupCon-T2I. Defaults are AttnGAN's for CUB, with two branches of its batches."""

    epochs: int = 600
    batch_size: int = 40
    """Pictures in a step of the second phase, over both branches."""
    optimizer: str = "adam"
    lr: float = 2e-4 * 256 / 40
    """Learning rate of G at a batch of 256, multiplied by batch_size / 256; it stays constant."""
    weight_decay: float = 0.0
    beta1: float = 0.5
    """Adam's beta 1 of G and D; the encoders keep the default."""
    critic_rate: float = 1.0
    """Learning rate of D, relative to G's; 4 for GALIP."""
    pretrain_epochs: int = 600
    """Epochs of the first phase; 0: the encoders keep their first weights."""
    pretrain_batch_size: int = 96
    """Pictures in a step of the first phase, over both branches."""
    pretrain_lr: float = 2e-3 * 256 / 96
    """Learning rate of the first phase at a batch of 256; 0.98 times as much after each epoch."""
    text_clip: float = 0.25
    """Maximum norm of the gradient of E_T."""
    encoder: str = "torchvision:inception_v3"
    """E_I, an image encoder with a feature map (see `counterpoint.encoders.images`)."""
    pretrained: bool = True
    """Start E_I from the library's published weights."""
    tune: bool = False
    """Train E_I whole in the first phase; False: its projections alone."""
    backbone: str = "attngan-s"
    """Generator and discriminators: attngan-s or galip-s."""
    embedding: int = 256
    """Width of codes, sentences, regions and words, even."""
    noise: int = 100
    """Numbers of the noise z."""
    width: int = 64
    """Channels of the maps of G and D."""
    labels: Labels = "both"
    """Phases with the label-guided contrast and two branches: both, pretraining or none."""
    mask_same_class: bool = True
    """Leave other pairs of the same class out of DAMSM's negatives."""
    shuffle_labels: bool = False
    """Give classes to training pairs at random, as a control. The judges keep the true ones."""
    temperature: float = 0.1
    """Temperature of the label-guided contrast."""
    gammas: tuple[float, float, float] = (4.0, 5.0, 10.0)
    """DAMSM's gamma1, gamma2 and gamma3."""
    inter_weight: float = 1.0
    """Weight of the contrast between pictures and captions, at least 0."""
    inner_weight: float = 1.0
    """Weight of the contrast among pictures and among captions, at least 0."""
    sup_weight: float = 1.0
    """Weight of the contrast of generated pictures, at least 0."""
    match_weight: float = 5.0
    """Weight of the match of a generated picture and its caption, at least 0; 4 for GALIP."""
    decay: float = 0.999
    """Decay of the moving average of G, which generates for evaluation; below 1."""

    counts: ClassVar[tuple[str, ...]] = (
        *GenerationConfig.counts, "pretrain_batch_size", "embedding", "noise", "width",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in get_args(Labels):
            raise unknown("labels", self.labels, get_args(Labels))
        self.need_positive("temperature", "pretrain_lr", "critic_rate", "text_clip")
        self.need_weight("inter_weight", "inner_weight", "sup_weight", "match_weight", "pretrain_epochs")
        for name in ("decay", "beta1"):
            if not 0 <= getattr(self, name) < 1:
                raise CounterpointError(f"{name} must lie in 0..1, 1 not included, got {getattr(self, name)}")
        for name, size in (("batch_size", self.batch_size), ("pretrain_batch_size", self.pretrain_batch_size)):
            if size < 4 or size % 2:
                raise CounterpointError(f"{name} must be even and at least 4, for two branches, got {size}")
        if self.embedding % 2 or self.width % 4:
            raise CounterpointError(
                f"embedding must be even and width a multiple of 4, got {self.embedding} and {self.width}"
            )

    def check(self) -> None:
        check_backbone(self.backbone)
        check_image_encoder(self.encoder)


class SupConT2I(GenerationLearner):
    """Encoders of pictures and captions, a generator and its discriminators."""

    config: SupConT2IConfig

    def __init__(self, config: SupConT2IConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        if config.labels != "none" and data.classes < 2:
            raise CounterpointError(
                f"the label-guided contrast needs classes, and the data have {data.classes}; name a column of labels, or set "
                "--labels none"
            )
        self.pictures = PictureEncoder(config.encoder, self.size, config.embedding, config.pretrained)
        self.pictures.encoder.requires_grad_(config.tune)
        self.texts = WordEncoder(self.tokenizer.vocabulary, config.embedding)
        self.generator: Any = build_generator(config.backbone, self.size, config.noise, config.embedding, config.width)
        channels, scales = self.pictures.channels, self.generator.scales
        self.critics = build_critics(config.backbone, channels, config.embedding, config.width, scales)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of G
        self.partners = Partners(torch.zeros(1, dtype=torch.int64))  # of the training pairs, from `begin` on

    # --- two phases

    def stages(self) -> list[Stage]:
        config, trains = self.config, [self.pictures, self.texts]
        first = Stage("pretraining", config.pretrain_epochs, lambda: trains, self.pretraining_turns, self._batches)
        second = Stage("generation", config.epochs, lambda: [self.generator, self.critics], batches=self._batches)
        return [first, second] if config.pretrain_epochs else [second]

    @property
    def pretraining(self) -> bool:
        """Whether the current stage is the first phase."""
        return bool(self.config.pretrain_epochs) and self.position.stage == 0

    @property
    def branches(self) -> int:
        """Number of branches of the current stage."""
        return 2 if self.config.labels in (("both", "pretraining") if self.pretraining else ("both",)) else 1

    def _batches(self, survey: Survey) -> Batches:
        """Return the batches of a stage. Of two branches they are the first; `prepare` draws the second."""
        size = self.config.pretrain_batch_size if self.pretraining else self.config.batch_size
        if survey.examples < size:
            raise CounterpointError(f"a batch of {size} pictures exceeds the {survey.examples} of training; lower its size")
        items = survey.examples // self.branches
        return Batches(survey.examples, size // self.branches, drop_last=True, items=items)

    def train(self, mode: bool = True) -> SupConT2I:
        super().train(mode)
        if not (self.pretraining and self.config.tune):
            self.pictures.encoder.eval()  # a fixed encoder keeps its statistics
        return self

    def pretraining_turns(self) -> list[Turn]:
        """Return the turn of the first phase, with AttnGAN's decay of the learning rate and its bound of E_T's gradient."""
        config = self.config
        turn = self._turn([self.pictures, self.texts], config.pretrain_batch_size, lambda epoch: 0.98**epoch)
        clipped = list(self.texts.parameters())
        turn.optimizers[0].register_step_pre_hook(
            lambda *_: [nn.utils.clip_grad_norm_(clipped, config.text_clip), None][1]
        )
        return [turn]

    def turns(self) -> list[Turn]:
        """Return the turns of a step of the second phase: first D, then G."""
        size = self.config.batch_size
        critics, generator = (self._turn([one], size, lambda _: 1.0) for one in (self.critics, self.generator))
        for turn in (critics, generator):
            for group in turn.optimizers[0].param_groups:
                group["betas"] = (self.config.beta1, group["betas"][1])
        return [Turn(critics.optimizers, critics.schedules, self.critic_loss, "critic_loss"), generator]

    def _turn(self, modules: list[nn.Module], size: int, curve: Callable[[float], float]) -> Turn:
        config = self.config
        rate = config.pretrain_lr / config.lr if self.pretraining else 1.0
        rate = config.critic_rate if modules == [self.critics] else rate
        steps = self.steps_per_epoch
        return optimisers(config, modules, self.epochs, size, steps_per_epoch=steps, rate=rate, curve=curve)

    # --- a step

    def begin(self, survey: Survey) -> None:
        labels = survey.labels
        assert labels is not None
        if self.config.shuffle_labels:
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))]
        self.partners = Partners(labels)
        if self.config.labels != "none" and self.partners.single:
            self.warnings.append(f"{self.partners.single} classes have one training pair, which is its own partner")

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw the pairs of the second branch, which follow those of the first, and the noise."""
        total, mine = self.share(len(batch["index"]))
        drawn = torch.rand(total, generator=generator)[mine]
        noise = [torch.randn(total, self.config.noise, generator=generator)[mine] for _ in range(self.branches)]
        found = dict(batch)
        if self.branches == 2:
            assert self.survey is not None
            other = self.survey.batch("train", self.partners.of(batch["index"], drawn).tolist())
            found = joined(batch, other, "image", "ids", "mask", "index")
        label = torch.from_numpy(self.partners.kinds)[found["index"].cpu()]
        label = torch.where(label < 0, -1 - found["index"].cpu(), label)  # without a class: one of its own
        device = batch["index"].device
        return found | {"label": label.to(device), "noise": torch.cat(noise).to(device)}

    def _each(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the rows of each branch."""
        return zip(*(tensor.chunk(self.branches) for tensor in tensors), strict=True)

    def contrast(self, label: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum of sup(A, C) over pairs of anchors and candidates, divided by 2."""
        tau = self.config.temperature
        return torch.stack([label_guided_contrast(a, c, label, label, tau, a is c) for a, c in pairs]).sum() / 2

    def damsm(self, code: Tensor, regions: Tensor, sentence: Tensor, words: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return L_DAMSM, summed over the branches."""
        total, gammas = code.new_zeros(()), self.config.gammas
        for x, r, s, w, lengths, label in self._each(code, regions, sentence, words, batch["mask"].sum(1), batch["label"]):
            known = label.clamp(min=-1) if self.config.mask_same_class else None
            total = total + sum(damsm_sentence(x, s, gammas[2], known)) + sum(damsm_words(r, w, lengths, gammas, known))
        return total

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.pretraining_loss(batch) if self.pretraining else self.generator_loss(batch)

    def pretraining_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute L_pre."""
        config, label = self.config, batch["label"]
        code, regions = self.pictures(signed(batch["image"]))
        sentence, words = self.texts(batch["ids"], batch["mask"])
        loss = damsm = self.damsm(code, regions, sentence, words, batch)
        found = {"damsm": damsm.detach()}
        if self.branches == 2:
            found["inter"] = self.contrast(label, (code, sentence), (sentence, code))
            found["inner"] = self.contrast(label, (code, code), (sentence, sentence))
            loss = damsm + config.inter_weight * found["inter"] + config.inner_weight * found["inner"]
        return {"loss": loss} | found

    def critic_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute D's loss, summed over the branches. The generated pictures stay in the batch for the turn of G.

        Wrong captions are those of the next pair; the last pair has none.
        """
        with torch.no_grad():
            batch["sentence"], batch["words"] = self.texts(batch["ids"], batch["mask"])
        batch["made"] = self.generator(batch["noise"], batch["sentence"], batch["words"], batch["mask"])
        real, total = signed(batch["image"]), torch.zeros((), device=self.device)
        for critic, fake in zip(self.critics, batch["made"].pictures, strict=True):
            shown = F.adaptive_avg_pool2d(real, fake.shape[2:])
            both = [*critic.maps(shown, self.pictures.maps), *critic.maps(fake.detach(), self.pictures.maps)]
            for sentence, *maps in self._each(batch["sentence"], *both):
                everyone, mine = self.whole(sentence), self.share(len(sentence))[1]
                kept = torch.arange(len(everyone), device=real.device)[mine] < len(everyone) - 1
                half = len(maps) // 2
                total = total + critic.loss(maps[:half], maps[half:], sentence, everyone.roll(-1, 0)[mine], kept)
        return {"critic_loss": total}

    def generator_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute L_G through the updated D and the fixed encoders."""
        config, made, sentence = self.config, batch["made"], batch["sentence"]
        maps = self.pictures.maps(made.pictures[-1])
        code, regions = self.pictures.codes(maps)
        adversarial = made.divergence
        with fixed(self.critics, own_statistics=False):
            for critic, fake in zip(self.critics, made.pictures, strict=True):
                adversarial = adversarial + critic.generator_loss(critic.maps(fake, lambda _: maps), sentence)
        adversarial = self.branches * adversarial
        if config.backbone == "galip-s":
            match = -self.branches * global_mean(F.cosine_similarity(code, sentence))
        else:
            match = self.damsm(code, regions, sentence, batch["words"], batch)
        loss, found = adversarial + config.match_weight * match, {"adversarial": adversarial, "match": match}
        if self.branches == 2:
            found["sup"] = self.contrast(batch["label"], (code, sentence), (code, code))
            loss = loss + config.sup_weight * found["sup"]
        return {"loss": loss} | {name: value.detach() for name, value in found.items()}

    def end_step(self) -> None:
        if not self.pretraining:
            blended(self.average, self.average, self.generator, 1 - self.config.decay if self.steps else 1.0)
            self.steps += 1

    # --- pictures and codes

    def made(self, batch: dict[str, Any], generator: torch.Generator) -> Float[Tensor, "n 3 size size"] | None:
        if not self.steps:
            return None
        noise = torch.randn(len(batch["ids"]), self.config.noise, generator=generator).to(self.device)
        found: Tensor = self.average(noise, *self.texts(batch["ids"], batch["mask"]), batch["mask"]).pictures[-1]
        return found

    def codes(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        text = self.texts(batch["ids"], batch["mask"])[0]
        return {"image": self.pictures(signed(batch["image"]))[0], "text": text}


LAPTOP: dict[str, Any] = {
    "backbone": "galip-s",
    "encoder": "conv-cells",
    "pretrained": False,
    "tune": True,
    "embedding": 64,
    "width": 32,
    "noise": 32,
    "batch_size": 64,
    "pretrain_batch_size": 64,
    "pretrain_epochs": 12,
    "pretrain_lr": 2e-3 * 4,
    "epochs": 25,
    "lr": 4e-4 * 4,
    "beta1": 0.0,
    "critic_rate": 2.0,
    "match_weight": 4.0,
    "decay": 0.99,
}

SYSTEM = System(
    slug="supcon-t2i",
    task="generation",
    config=SupConT2IConfig,
    learner=SupConT2I,
    data="digit-scenes",
    recipe=LAPTOP,
)
