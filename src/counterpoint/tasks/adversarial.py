"""Learn to generate pictures of captions in two phases: match pictures and captions, then train a generator against critics.

A learner of this module has encoders E_I and E_T, a generator G and critics D (encoders/generators.py). The first phase trains the
encoders, the second G and D in turns, with fixed encoders. A step of a phase may have several branches: equal numbers of pairs,
one after another. Losses of single pairs are computed for each branch and added.

Subclasses write `pretraining_loss` and may add to `generator_loss`; `branches` is the number of branches of the current phase.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.averages import blended
from counterpoint.core.damsm import damsm_sentence, damsm_words
from counterpoint.core.distributed import global_mean
from counterpoint.encoders.critics import fixed
from counterpoint.encoders.generators import PictureEncoder, WordEncoder, build_critics, build_generator, check_backbone
from counterpoint.encoders.images import check_image_encoder
from counterpoint.engine.loading import Batches
from counterpoint.engine.optim import constant_rate, optimisers
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.tasks.generation import GenerationConfig, GenerationLearner, signed


@dataclass
class AdversarialConfig(GenerationConfig):
    """Settings of a generator with critics. Defaults are AttnGAN's for CUB, with two branches of its batches."""

    epochs: int = 600
    batch_size: int = 40
    """Pictures in a step of the second phase, over both branches."""
    optimizer: str = "adam"
    lr: float = 2e-4 * 256 / 40
    """Learning rate of G at a batch of 256, multiplied by batch_size / 256; it stays constant."""
    weight_decay: float = 0.0
    beta1: float = 0.5
    """Beta 1 of G and D, for optimisers that have one; the encoders keep the default."""
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
    gammas: tuple[float, float, float] = (4.0, 5.0, 10.0)
    """DAMSM's gamma1, gamma2 and gamma3."""
    match_weight: float = 5.0
    """Weight of the match of a generated picture and its caption, at least 0; 4 for GALIP."""
    decay: float = 0.999
    """Decay of the moving average of G, which generates for evaluation; below 1."""
    mask_same_class: bool = True
    """Leave other pairs of the same class out of DAMSM's negatives."""

    counts: ClassVar[tuple[str, ...]] = (
        *GenerationConfig.counts, "pretrain_batch_size", "embedding", "noise", "width",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("pretrain_lr", "critic_rate", "text_clip")
        self.need_weight("match_weight", "pretrain_epochs")
        self.need_below_one("decay", "beta1")
        for name, size in (("batch_size", self.batch_size), ("pretrain_batch_size", self.pretrain_batch_size)):
            if size < 4 or size % 2:
                raise CounterpointError(f"{name} must be even and at least 4, for two branches, got {size}")
        if len(self.gammas) != 3 or not all(0 <= gamma < float("inf") for gamma in self.gammas):
            raise CounterpointError(f"gammas must be three numbers of at least 0, got {self.gammas}")
        if self.embedding % 2 or self.width % 4:
            raise CounterpointError(
                f"embedding must be even and width a multiple of 4, got {self.embedding} and {self.width}"
            )

    def check(self) -> None:
        check_backbone(self.backbone)
        check_image_encoder(self.encoder)


class AdversarialLearner(GenerationLearner):
    """Encoders of pictures and captions, a generator and its critics."""

    config: Any

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.pictures = PictureEncoder(config.encoder, self.size, config.embedding, config.pretrained)
        self.pictures.encoder.requires_grad_(config.tune)
        self.texts = WordEncoder(self.tokenizer.vocabulary, config.embedding)
        self.generator: Any = build_generator(config.backbone, self.size, config.noise, config.embedding, config.width)
        channels, scales = self.pictures.channels, self.generator.scales
        self.critics: Any = build_critics(config.backbone, channels, config.embedding, config.width, scales)
        self.average: Any = copy.deepcopy(self.generator).requires_grad_(False)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of G

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
        return 1

    def _batches(self, survey: Survey) -> Batches:
        """Return the batches of a stage. Of two branches they are the first; `prepare` draws the second."""
        size = self.config.pretrain_batch_size if self.pretraining else self.config.batch_size
        if survey.examples < size:
            option = "--pretrain-batch-size" if self.pretraining else "--batch-size"
            raise CounterpointError(
                f"a batch of {size} pictures exceeds the {survey.examples} of training; lower {option}"
            )
        items = survey.examples // self.branches
        return Batches(survey.examples, size // self.branches, drop_last=True, items=items)

    def train(self, mode: bool = True) -> AdversarialLearner:
        super().train(mode)
        if not (self.pretraining and self.config.tune):
            self.pictures.encoder.eval()  # a fixed encoder keeps its statistics
        return self

    def pretraining_turns(self) -> list[Turn]:
        """Return the turn of the first phase, with AttnGAN's decay of the learning rate and its bound of E_T's gradient."""
        config = self.config
        turn = self._turn([self.pictures, self.texts], config.pretrain_batch_size, lambda epoch: 0.98**epoch)
        clipped = list(self.texts.parameters())

        def bounded(*_: Any) -> None:
            nn.utils.clip_grad_norm_(clipped, config.text_clip)

        turn.optimizers[0].register_step_pre_hook(bounded)
        return [turn]

    def turns(self) -> list[Turn]:
        """Return the turns of a step of the second phase: first D, then G."""
        size = self.config.batch_size
        critics, generator = (self._turn([one], size, constant_rate) for one in (self.critics, self.generator))
        for turn in (critics, generator):
            for group in turn.optimizers[0].param_groups:
                if "betas" in group:
                    group["betas"] = (self.config.beta1, group["betas"][1])
        return [Turn(critics.optimizers, critics.schedules, self.critic_loss, "critic_loss"), generator]

    def _turn(self, modules: list[nn.Module], size: int, curve: Callable[[float], float]) -> Turn:
        config = self.config
        rate = config.pretrain_lr / config.lr if self.pretraining else 1.0
        rate = config.critic_rate if modules == [self.critics] else rate
        steps = self.steps_per_epoch
        return optimisers(config, modules, self.epochs, size, steps_per_epoch=steps, rate=rate, curve=curve)

    # --- a step

    def _each(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the rows of each branch."""
        return zip(*(tensor.chunk(self.branches) for tensor in tensors), strict=True)

    def damsm(self, code: Tensor, regions: Tensor, sentence: Tensor, words: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return L_DAMSM, summed over the branches."""
        total, gammas = code.new_zeros(()), self.config.gammas
        for x, r, s, w, lengths, label in self._each(
            code, regions, sentence, words, batch["mask"].sum(1), batch["label"]
        ):
            known = label.clamp(min=-1) if self.config.mask_same_class else None
            total = total + sum(damsm_sentence(x, s, gammas[2], known)) + sum(damsm_words(r, w, lengths, gammas, known))
        return total

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.pretraining_loss(batch) if self.pretraining else self.generator_loss(batch)

    def pretraining_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of the first phase."""
        raise CounterpointError(f"{type(self).__name__} has no loss of its first phase; write `pretraining_loss`")

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
        """Compute the loss of G through the updated D and the fixed encoders. The codes of the pictures stay in the batch."""
        config, made, sentence = self.config, batch["made"], batch["sentence"]
        maps = self.pictures.maps(made.pictures[-1])
        batch["code"], regions = self.pictures.codes(maps)
        adversarial = made.divergence
        with fixed(self.critics, own_statistics=False):
            for critic, fake in zip(self.critics, made.pictures, strict=True):
                adversarial = adversarial + critic.generator_loss(critic.maps(fake, lambda _: maps), sentence)
        if config.backbone == "galip-s":
            match = -self.branches * global_mean(F.cosine_similarity(batch["code"], sentence))
        else:
            match = self.damsm(batch["code"], regions, sentence, batch["words"], batch)
        loss = self.branches * adversarial + config.match_weight * match
        return {"loss": loss, "adversarial": adversarial.detach(), "match": match.detach()}

    def end_step(self) -> None:
        if not self.pretraining:
            blended(self.average, self.average, self.generator, 1 - self.config.decay if self.steps else 1.0)
            self.steps += 1

    # --- pictures and codes

    def made(self, batch: dict[str, Any], generator: torch.Generator) -> Float[Tensor, "n 3 size size"] | None:
        if not self.steps:
            return None
        # Row by row, so that a picture does not depend on the number of those after it.
        noise = torch.stack([torch.randn(self.config.noise, generator=generator) for _ in batch["ids"]]).to(self.device)
        found: Tensor = self.average(noise, *self.texts(batch["ids"], batch["mask"]), batch["mask"]).pictures[-1]
        return found

    def codes(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        text = self.texts(batch["ids"], batch["mask"])[0]
        return {"image": self.pictures(signed(batch["image"]))[0], "text": text}
