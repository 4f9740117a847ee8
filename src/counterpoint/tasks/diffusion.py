"""Learn to generate pictures of a subject by a diffusion model of the library diffusers, in two stages.

A learner of this module first trains a small U-Net and a caption encoder on pictures and captions (`pretraining`). Then it trains
what encodes and injects a subject (encoders/injection.py); U-Net and caption encoder stay fixed unless `tune`. Subclasses write
`customization_loss`.

Captions name the subject by the word "subject". Noise is predicted (DDPM, Ho et al., arXiv 2006.11239). Pictures are sampled by
DDIM (arXiv 2010.02502) with guidance (arXiv 2207.12598). Its timesteps have trailing spacing. By default, few
steps begin at step 900 of 999, where signal is left (arXiv 2305.08891). Pictures then get wrong grounds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.distributed import global_mean
from counterpoint.core.seeds import generator_of
from counterpoint.data.generation import PLACEHOLDER, Condition, GenerationData
from counterpoint.encoders.images import check_image_encoder
from counterpoint.encoders.injection import (
    HEADS,
    CaptionEncoder,
    InjectedAttention,
    Injection,
    Patches,
    Subject,
    SubjectEncoder,
    build_unet,
    diffusers,
    time_embedding,
)  # fmt: skip
from counterpoint.encoders.text import train_words
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.branches import Partners
from counterpoint.tasks.generation import GenerationConfig, GenerationLearner, eight_bit, enlarged, signed
from counterpoint.views.images import normalise
from counterpoint.views.subjects import on_white
from counterpoint.words import counted

STEPS = 1000  # timesteps of the noise
MOST = 512  # training pictures whose mean feature centres the real similarity
SHOWN = 6  # subjects on a run's page
References = Literal["segmented", "whole"]
Segmentation = Literal["plain", "none"]
Frame = Literal["cross", "self"]


@dataclass
class DiffusionConfig(GenerationConfig):
    """Settings of a diffusion model with subjects."""

    epochs: int = 100
    batch_size: int = 32
    lr: float = 1e-4 * 8
    """Learning rate of the second stage at a batch of 256."""
    weight_decay: float = 1e-2
    pretrain_epochs: int = 100
    """Epochs of the first stage, which trains the U-Net and the caption encoder; 0 needs --tune."""
    pretrain_lr: float = 1e-3 * 8
    """Learning rate of the first stage at a batch of 256."""
    tune: bool = False
    """Train U-Net, caption encoder and image encoder in the second stage, too."""
    encoder: str = "timm:vit_base_patch16_clip_224.openai"
    """Image encoder of the references (see `counterpoint.encoders.images`)."""
    pretrained: bool = True
    """Start the image encoder from the library's published weights."""
    embedding: int = 256
    """Width of words, tokens and codes, a multiple of 4."""
    width: int = 64
    """Channels of the U-Net's first resolution, a multiple of 8."""
    depth: int = 2
    """Transformer layers of each Q-former."""
    tokens: int = 8
    """Visual tokens beside V_cls."""
    sampling: int = 50
    """Steps of DDIM, 1 to 1000."""
    guidance: float = 2.0
    """Scale of classifier-free guidance, at least 1; 1 is without."""
    dropout: float = 0.05
    """Share of training rows without caption and subject, for guidance, in 0..1."""
    frames: Frame = "cross"
    """Reference of a target: another frame of the subject (cross), or the target itself (self)."""
    references: References = "segmented"
    """References: the subject on white, at a random place and scale (segmented), or the frame as it is (whole)."""
    segmentation: Segmentation = "plain"
    """How the subject is found: pixels unlike the ground (plain), or the whole picture is the subject (none)."""
    locate: bool = True
    """Multiply both branches of a layer's cross-attention by a mask of the subject's place; False: the mask is 1."""

    counts: ClassVar[tuple[str, ...]] = (*GenerationConfig.counts, "embedding", "width", "depth", "tokens", "sampling")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("pretrain_lr")
        self.need_weight("pretrain_epochs")
        if self.embedding % HEADS or self.width % 8:
            raise CounterpointError(
                f"embedding must be a multiple of {HEADS} and width of 8, got {self.embedding} and {self.width}"
            )
        if self.sampling > STEPS or not self.guidance >= 1 or not 0 <= self.dropout < 1:
            raise CounterpointError(
                f"sampling is 1 to {STEPS}, guidance at least 1, and dropout in 0..1, 1 not included; "
                f"got {self.sampling}, {self.guidance} and {self.dropout}"
            )
        if not self.pretrain_epochs and not self.tune:
            raise CounterpointError(
                "pretrain_epochs 0 leaves an untrained U-Net fixed; set --pretrain-epochs or --tune"
            )

    def check(self) -> None:
        check_image_encoder(self.encoder)
        diffusers()

    def facts(self, data: GenerationData) -> dict[str, Any]:
        texts = [*data.train.captions, *[PLACEHOLDER] * len(data.train)]
        return data.spec | {"tokenizer": train_words(texts, self.vocabulary).to_json()}


class DiffusionLearner(GenerationLearner):
    """A U-Net with injected attention, a caption encoder, and the encoder of a subject."""

    config: Any

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        if self.size % 2:
            raise CounterpointError(f"the U-Net halves pictures, which have {self.size} pixels; use an even size")
        dim = config.embedding
        found = self.tokenizer.encode([PLACEHOLDER], 1)[0]
        self.word = int(found[0, 0])
        self.unet, layers = build_unet(self.size, config.width, dim, config.locate)
        self.captions = CaptionEncoder(self.tokenizer.vocabulary, dim, config.context)
        self.patches = Patches(config.encoder, self.size, dim, config.pretrained)
        self.patches.encoder.requires_grad_(config.tune)
        self.mfi = SubjectEncoder(layers, dim, config.depth, config.tokens)
        # A tuned encoder moves away from the frozen one of the real similarity.
        self.first = copy.deepcopy(self.patches.encoder).requires_grad_(False) if config.tune else None
        width = self.frozen(torch.zeros(1, 3, self.size, self.size)).shape[1]
        self.mean: Tensor
        self.trained: Tensor
        self.register_buffer("mean", torch.zeros(width))  # of the frozen encoder's features
        self.register_buffer("trained", torch.zeros((), dtype=torch.int64))  # steps of the second stage
        noise = diffusers()
        self.noising = noise.DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2")
        self.sampler = noise.DDIMScheduler.from_config(self.noising.config, timestep_spacing="trailing")

    @property
    def frozen(self) -> Any:
        """The frozen image encoder, which the real similarity comes from."""
        return self.patches.encoder if self.first is None else self.first

    @property
    def injected(self) -> list[InjectedAttention]:
        """The processors of the cross-attention layers."""
        return [x for x in self.unet.attn_processors.values() if isinstance(x, InjectedAttention)]

    # --- stages

    def stages(self) -> list[Stage]:
        config, base = self.config, [self.unet, self.captions]
        subject: list[nn.Module] = [self.patches, self.mfi, *self.injected]
        base_stage = Stage("pretraining", config.pretrain_epochs, lambda: base, self._pretraining_turns)
        second = Stage("customization", config.epochs, lambda: [*subject, *(base if config.tune else [])])
        return [base_stage, second] if config.pretrain_epochs else [second]

    @property
    def pretraining(self) -> bool:
        """Whether the current stage is the first one."""
        return bool(self.config.pretrain_epochs) and self.position.stage == 0

    def _pretraining_turns(self) -> list[Turn]:
        return [self.turn_of([self.unet, self.captions], rate=self.config.pretrain_lr / self.config.lr)]

    def turns(self) -> list[Turn]:
        return [self.turn_of([self])]

    def train(self, mode: bool = True) -> DiffusionLearner:
        super().train(mode)
        self.frozen.eval()
        if not self.config.tune:
            self.patches.encoder.eval()
        return self

    def begin(self, survey: Survey) -> None:
        """Check subjects and captions; compute the mean feature. DataError where subjects or their word are missing."""
        split = survey.split("train")
        if split.subjects is None:
            raise DataError(
                "the pictures have no subjects, which this system needs; use digit-subjects or subjects:FOLDER"
            )
        for name in ("train", "valid", "test"):
            captions = survey.split(name).captions
            ids = self.tokenizer.encode(captions, self.config.context)[0]
            lost = (~(ids == self.word).any(1)).nonzero().flatten().tolist()
            if lost:
                raise DataError(
                    f"{len(lost)} {name} captions do not name the subject within {self.config.context} words, the first is "
                    f"'{captions[lost[0]]}'; write '{PLACEHOLDER}' for it, or raise --context"
                )
        self.frames = Partners(torch.from_numpy(split.subjects))
        if self.frames.single:
            self.warnings.append(
                f"{counted(self.frames.single, 'subject has', 'subjects have')} one picture: it is its own reference, and MACL "
                "leaves it out"
            )
        rows = np.unique(np.linspace(0, len(split) - 1, min(MOST, len(split))).astype(np.int64))
        self.mean.zero_()
        self.mean.copy_(survey.over("train", lambda batch: self.real(batch["image"]), rows).mean(0))

    # --- subjects

    def real(self, pictures: Tensor) -> Float[Tensor, "n dim"]:
        """Compute features of the segmented subjects by the frozen encoder, minus their mean. No gradient."""
        with torch.no_grad():
            shown = on_white(pictures.float() / 255, self.config.segmentation == "plain")
            found: Tensor = self.frozen(normalise(shown)) - self.mean
        return found

    def seen(self, pictures: Tensor, drawn: Tensor | None = None) -> Float[Tensor, "n cells dim"]:
        """Compute the patch tokens of uint8 references; `drawn` places a segmented subject at random."""
        shown = pictures.float() / 255
        if self.config.references == "segmented":
            shown = on_white(shown, self.config.segmentation == "plain", drawn)
        found: Tensor = self.patches(normalise(shown))
        return found

    def subject(self, patches: Tensor, steps: Int[Tensor, " n"]) -> Subject:
        """Encode patch tokens at timesteps."""
        word = self.captions.embed.weight[self.word]
        found: Subject = self.mfi(patches, word, time_embedding(steps, self.config.embedding))
        return found

    def words_of(self, pictures: Tensor) -> Float[Tensor, "n dim"]:
        """Compute the pseudo-words of uint8 pictures at the middle timestep: unit rows of each layer, side by side."""
        steps = torch.full((len(pictures),), STEPS // 2, device=self.device)
        words = self.subject(self.seen(pictures), steps).words
        return F.normalize(words, dim=2).transpose(0, 1).flatten(1)

    # --- diffusion

    def denoised(
        self,
        noisy: Tensor,
        steps: Tensor,
        ids: Tensor,
        mask: Tensor,
        subject: Subject | None,
        kept: Tensor | None = None,
    ) -> Float[Tensor, "n 3 size size"]:
        """Predict the noise. Rows that are not `kept` have neither caption nor subject; without a subject, none has one."""
        layers = len(self.injected)
        if kept is not None:
            alone = torch.zeros_like(ids)
            alone[:, 0] = self.word
            ids, mask = torch.where(kept[:, None], ids, alone), torch.where(kept[:, None], mask, alone > 0)
        place, words, fused = (ids == self.word).int().argmax(1), None, None
        if subject is not None:
            words, fused = subject.words, subject.fused
            if kept is not None:
                plain = self.captions.embed.weight[self.word]
                words, fused = torch.where(kept[:, None], words, plain), fused * kept[:, None, None]
        texts = self.captions(ids, ~mask, place, words).expand(layers, -1, -1, -1)
        given = Injection(texts, ~mask, place, time_embedding(steps, self.config.embedding), fused)
        found: Tensor = self.unet(noisy, steps, texts[0], cross_attention_kwargs={"ip_hidden_states": given}).sample
        return found

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw noise, timesteps and the rows without condition; in the second stage references and positives, too."""
        total, mine = self.share(len(batch["index"]))
        device = batch["index"].device
        shape = (total, 3, self.size, self.size)
        drawn = {
            "noise": torch.randn(shape, generator=generator),
            "steps": torch.randint(STEPS, (total,), generator=generator),
            "kept": torch.rand(total, generator=generator) >= self.config.dropout,
            "places": torch.rand(total, 6, generator=generator),
        }
        chosen = torch.rand(total, 2, generator=generator)[mine]
        found = batch | {name: value[mine].to(device) for name, value in drawn.items()}
        if self.pretraining:
            return found
        assert self.survey is not None
        other, third = self.frames.two_of(batch["index"], chosen)
        reference = batch["index"].cpu() if self.config.frames == "self" else other
        positive = other if self.config.frames == "self" else third
        for name, rows in (("reference", reference), ("positive", positive)):
            found[name] = self.survey.batch("train", rows.tolist())["image"].to(device)
        found["paired"] = (reference != positive).to(device)  # a second view exists
        found["subject"] = torch.from_numpy(self.frames.kinds[batch["index"].cpu().numpy()]).to(device)
        return found

    def diffusion_loss(self, batch: dict[str, Any], subject: Subject | None) -> Float[Tensor, ""]:
        """Compute the mean squared error of the predicted noise on the target."""
        noisy = self.noising.add_noise(signed(batch["image"]), batch["noise"], batch["steps"])
        found = self.denoised(noisy, batch["steps"], batch["ids"], batch["mask"], subject, batch["kept"])
        return global_mean((found - batch["noise"]).square().mean((1, 2, 3)))

    def customization_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of the second stage."""
        raise CounterpointError(f"{type(self).__name__} has no loss of its second stage; write `customization_loss`")

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.pretraining:
            loss = self.diffusion_loss(batch, None)
            return {"loss": loss, "diffusion": loss.detach()}
        return self.customization_loss(batch)

    def end_step(self) -> None:
        if not self.pretraining:
            self.trained += 1

    # --- pictures

    def check_condition(self, condition: Condition) -> None:
        words = self.unknown_words(condition.text)
        if words:
            raise CounterpointError(
                f"the prompt '{condition.text}' has words that the run does not know: {', '.join(words)}; use words of the "
                f"training captions, and '{PLACEHOLDER}' for the subject"
            )
        if self.tokenizer.model.encode(condition.text).ids.count(self.word) != 1:
            raise CounterpointError(
                f"the prompt '{condition.text}' must name the subject once; write '{PLACEHOLDER}' for it"
            )
        if not condition.subject:
            raise CounterpointError("this run makes pictures of a subject; give its pictures with --subject FOLDER")

    def made(self, batch: dict[str, Any], generator: torch.Generator) -> Float[Tensor, "n 3 size size"] | None:
        if not self.trained:
            return None
        ids, mask, device = batch["ids"], batch["mask"], self.device
        counts = torch.tensor([len(one) for one in batch["subject"]], device=device)
        pictures = torch.from_numpy(np.stack([one for many in batch["subject"] for one in many]))
        patches = self.seen(pictures.permute(0, 3, 1, 2).to(device))
        shape = (3, self.size, self.size)
        # Row by row, so that a picture does not depend on the number of those after it.
        x = torch.stack([torch.randn(shape, generator=generator) for _ in ids]).to(device)
        self.sampler.set_timesteps(self.config.sampling)
        for step in self.sampler.timesteps.tolist():
            steps = torch.full((len(ids),), step, device=device)
            found = self.subject(patches, steps.repeat_interleave(counts))
            own = Subject(*(_means(x, counts, dim) for x, dim in zip(found, (0, 0, 1, 1), strict=True)))
            noise = self.denoised(x, steps, ids, mask, own)
            if self.config.guidance > 1:
                plain = self.denoised(x, steps, ids, mask, None, torch.zeros_like(steps, dtype=torch.bool))
                noise = plain + self.config.guidance * (noise - plain)
            x = self.sampler.step(noise, step, x).prev_sample
        return x

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        subject = [[one] for one in batch["reference"].permute(0, 2, 3, 1).cpu().numpy()]
        found = self.made(batch | {"subject": subject}, generator_of(self.seed, *batch["index"][:1].tolist()))
        pictures = None if found is None else eight_bit(found)
        return {"pictures": pictures, "words": self.words_of(batch["image"]), "real": self.real(batch["image"])}

    @torch.no_grad()
    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show subjects: the reference, the frame that the caption describes, and the generated picture."""
        split = survey.split("test")
        first = np.unique(split.subjects, return_index=True)[1][:SHOWN]
        batch = survey.batch("test", first)
        made = self.predict(batch)["pictures"]
        if made is None:
            return {}
        lines = []
        for n, row in enumerate(first):
            parts = ((batch["reference"], "reference"), (batch["image"], "real"), (made, split.captions[row]))
            lines.append({"cells": [{"png": enlarged(of[n]), "text": str(text)} for of, text in parts]})
        said = (
            "Unseen subjects: the reference, the real frame of the caption, and the picture generated for the caption."
        )
        return {"Subjects in other scenes": {"kind": "captioned", "rows": lines, "caption": said}}


def _means(x: Tensor, counts: Int[Tensor, " n"], dim: int) -> Tensor:
    """Average consecutive rows, `counts` of them each."""
    return torch.stack([part.mean(dim) for part in x.split(counts.tolist(), dim)], dim)
