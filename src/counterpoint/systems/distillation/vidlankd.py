"""VidLanKD: teach a language model, which sees text only, what a language model with videos has learned.

Tang, Cho, Tan, Bansal: "VidLanKD: Improving Language Understanding via Video-Distilled Knowledge Transfer", NeurIPS 2021,
arXiv 2107.02681; code zinengtang/VidLanKD.

    x, mask        token numbers of n texts, 15 % of them masked as in BERT; True at tokens, False at padding
    h              [n, tokens, dim] the teacher's last states; in stage 1 unit(h) is compared with videos
    e              [n, dim] unit vectors of videos: a linear map of each second, a transformer, the first state, an MLP
    g              [n, tokens, width] the student's last states
    k1, k2         two heads of the student (linear, GELU, LayerNorm, linear), for NST and for the contrast
    t              unit(h) of the frozen teacher, on the same masked tokens

In the order of a run:

1. Teacher: masked words on texts with videos, and a hinge at each token, between its video and another text's.
2. Student: masked words on texts alone, and two losses towards t (core/token_lessons.py). NST compares neurons, by their
   activations over the positions of a sentence. The contrast compares, at each position, the sentences of the batch.

Video encoder, teacher and heads are discarded. The student's encoder remains.

- Of the paper, not of the code: both encoders of stage 1 train. The code's optimiser lacks the video encoder, which stays at its
  random start; `--frozen-video` has that behaviour. The paper's CRD has a bank of negatives. The code replaces it by NT-Xent in
  the batch, which is the default here; `--contrast bank` is CRD.
- As in the code: scales of the losses (NST is a sum over sentences; NT-Xent is divided by the number of rows once more), margin 1,
  one negative, temperature 1, rates and clipping.
- Chosen: padding enters no loss. Without padding the values are the code's. Blocks normalise before attention, not after. A head
  is applied at once to all tokens. `--teacher text` trains the same teacher without videos, `run:RUN` and `hf:NAME` give
  a finished one.

Not built: half precision of its own (`--precision` has it for all systems), and the fine-tuning on GLUE, SQuAD and SWAG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import batch_order, gather_rows, mean_of_total, place
from counterpoint.core.memory import Queue
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.token_lessons import Mask, nst_loss, real_tokens, token_contrastive_loss, token_crd_loss
from counterpoint.core.world import over_group
from counterpoint.encoders.clips import ClipEncoder
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.language_teachers import LanguageTeacherConfig, LanguageTeacherLearner

# ------------------------------------------------------------------------------------------------- stage 1: the teacher


@over_group
@full_precision(keep=("mask",))
def paired_hinge_loss(
    lang: Float[Tensor, "n tokens dim"],
    video: Float[Tensor, "n dim"] | Float[Tensor, "n tokens dim"],
    mask: Mask | None = None,
    margin: float = 1.0,
    position: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    r"""Compare each token with the video of its text and that of one other text: hinges, averaged over tokens (Sec. 3.1).

    Text i of the batch's first half and text i of its second half are each other's negatives. Of an odd batch the last text
    counts twice. With e' the other text's video, a token's term is

        max(0, margin - <lang, e> + <lang, e'>)

    Args:
        lang: tokens of n texts, unit vectors, which this function does not normalise.
        video: the video of each text, or one for each token; unit vectors.
        mask: not 0 at tokens, 0 at padding; default: all are tokens.
        margin: any number, by default 1.
        position: place of each text in the batch of all processes; default: the processes' texts one after another.

    Without any token the loss is 0. A single text is its own negative, and the loss is the margin. Raises ValueError for shapes
    that do not fit, an empty batch and types that differ.

    >>> e = torch.eye(2)
    >>> paired_hinge_loss(e[:, None], e)
    tensor(0.)
    """
    need_rows(lang=lang)
    if lang.ndim != 3 or video.shape not in (lang.shape, (lang.shape[0], lang.shape[2])) or lang.dtype != video.dtype:
        raise ValueError(
            f"video must be [n, dim] or [n, tokens, dim] of lang's type, got {shapes(lang=lang, video=video)}"
        )
    lang, video = wide(lang), wide(video)
    real = real_tokens(mask, lang).to(lang.dtype)
    at = place(len(lang), lang.device)
    half = (at.total + 1) // 2
    if position is None:
        position = torch.arange(at.offset, at.offset + at.rows, device=lang.device)
    row_of = gather_rows(position).argsort()  # of each place in the batch, the row among those of all processes
    places = torch.arange(2 * half, device=lang.device)
    text, other = (row_of[p.clamp(max=at.total - 1)] for p in (places, (places + half) % (2 * half)))
    mine = (text >= at.offset) & (text < at.offset + at.rows)
    own, against = text[mine] - at.offset, gather_rows(video)[other[mine]]
    difference = against - video[own]
    difference = difference[:, None] if video.ndim == 2 else difference
    terms = F.relu(margin + (lang[own] * difference).sum(-1)) * real[own]
    count = gather_rows(real[own].sum()[None]).sum()
    return mean_of_total(terms.sum(), max(1, int(count)))


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class VidLanKDConfig(LanguageTeacherConfig):
    """Settings of VidLanKD. Defaults are the paper's for Wikipedia: BERT-base, 256 texts in a batch."""

    optimizer: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    schedule: Literal["epoch", "step"] = "step"
    teacher: str = "video"
    """The teacher: video (trained first, on texts with clips), text (the same without clips), none, run:RUN, or hf:NAME."""
    video_weight: float = 1.0
    """Weight of the hinge between tokens and clips, beside masked words, at least 0."""
    margin: float = 1.0
    """Margin of the hinge, in units of the cosine."""
    frozen_video: bool = False
    """Keep the video encoder at its random start, as the authors' code does."""
    video_layers: int = 12
    """Number of layers of the video encoder, which is as wide as the teacher; at least 1."""
    video_hidden: int = 1024
    """Width between the two linear maps of a clip's rows, at least 1."""
    video_dropout: float = 0.3
    """Dropout probability in the video encoder's last MLP, 0 to 1."""
    seconds: int = 384
    """Maximum length of a clip in seconds, at least 1; the rest is cut."""
    nst: bool = True
    """Compare neurons by their activations (NST)."""
    contrast: Literal["batch", "bank", "none"] = "batch"
    """Contrast tokens within the batch (NT-Xent), with a bank of earlier tokens (CRD), or not."""
    heads: bool = True
    """Use a head of its own for each of the two losses; off: compare the student's states."""
    ratio: float = 1.0
    """Weight of both losses, beside masked words, at least 0."""
    nst_reduction: Literal["sum", "mean"] = "sum"
    """Sum NST over the sentences of a batch, as the code does, or average it."""
    temperature: float = 1.0
    """Temperature of the contrast within the batch, > 0."""
    bank: int = 16384
    """Number of tokens of earlier batches in the bank, at least 1."""
    negatives: int = 4096
    """Number of tokens of the bank that are drawn as negatives at each step, 1 to `bank`."""
    bank_temperature: float = 0.07
    """Temperature of the contrast with the bank, > 0."""

    trained: ClassVar[tuple[str, ...]] = ("video", "text")
    counts: ClassVar[tuple[str, ...]] = (
        *LanguageTeacherConfig.counts, "video_layers", "video_hidden", "seconds", "bank", "negatives"
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature", "bank_temperature")
        self.need_share("video_dropout")
        if min(self.video_weight, self.ratio) < 0:
            raise CounterpointError(
                f"video_weight and ratio must not be negative, got {self.video_weight} and {self.ratio}"
            )
        if self.negatives > self.bank:
            raise CounterpointError(f"negatives ({self.negatives}) must not exceed bank ({self.bank})")
        if self.taught and not self.nst and self.contrast == "none":
            raise CounterpointError("nst is off and contrast is none: turn one on, or use --teacher none")


class VidLanKD(LanguageTeacherLearner):
    """A student, its two heads, and a teacher: trained first beside a video encoder, or finished elsewhere."""

    config: VidLanKDConfig

    def __init__(self, config: VidLanKDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.video: ClipEncoder | None = None
        own, width = self.model.dim, self.teacher_dim
        if config.teacher == "video":
            self.video = ClipEncoder(
                data.clip_dim,
                width,
                width=width,
                depth=config.video_layers,
                heads=max(1, width // 64),
                length=config.seconds,
                hidden=config.video_hidden,
                dropout=config.dropout,
                head_dropout=config.video_dropout,
            )
        self.bank: Queue | None = None
        if config.taught:
            self.nst_head, self.contrast_head = self._head(width), self._head(width)
            if config.contrast == "bank":
                self.bank = Queue(config.bank, width, seed=torch.Generator().manual_seed(seed))
            if not config.heads and config.contrast != "none" and width != own:
                raise CounterpointError(
                    f"the teacher is {width} wide and the student {own}: without heads the contrast needs equal widths; use "
                    "--heads, or --contrast none"
                )

    def _head(self, width: int) -> nn.Module:
        own = self.model.dim
        if not self.config.heads:
            return nn.Identity()
        return nn.Sequential(nn.Linear(own, own), nn.GELU(), nn.LayerNorm(own), nn.Linear(own, width))

    def of_teacher(self) -> list[nn.Module]:
        more = [] if self.video is None or self.config.frozen_video else [self.video]
        return [*super().of_teacher(), *more]

    def of_student(self) -> list[nn.Module]:
        return [self.model, *([self.nst_head, self.contrast_head] if self.config.taught else [])]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        video = [(self.video, "forward")] if self.at_teacher and self.video is not None else []
        return [*super().row_wise(), *video]

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        if self.bank is not None and not self.at_teacher:
            drawn = torch.randperm(self.config.bank, generator=generator)[: self.config.negatives]
            batch["negatives"] = drawn.to(self.device)
        return batch

    def teacher_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute masked words and the hinge of a batch of texts with clips."""
        assert self.teacher is not None
        states = self.teacher(batch["masked"], batch["mask"])
        terms = {"teacher_words": self.teacher.word_loss(states, batch["labels"])}
        if self.video is not None:
            with torch.set_grad_enabled(not self.config.frozen_video and torch.is_grad_enabled()):
                video = self.see(batch)
            at = place(len(video), self.device)
            position = batch_order(at.total)[at.offset : at.offset + at.rows].to(self.device)
            hinge = paired_hinge_loss(unit(states), video, batch["mask"], self.config.margin, position)
            terms["hinge"] = self.config.video_weight * hinge
        return {"loss": torch.stack(list(terms.values())).sum()} | terms

    def see(self, batch: dict[str, Any]) -> Float[Tensor, "n dim"]:
        """Encode the clips of a batch, of which the first `seconds` count."""
        assert self.video is not None
        seen: Tensor = self.video(*(batch[name][:, : self.config.seconds] for name in ("clip", "clip_mask")))
        return seen

    def student_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute masked words, and both losses towards the teacher's states on the same masked texts."""
        config, ids, mask = self.config, batch["masked"], batch["mask"]
        states = self.model(ids, mask)
        terms = {"words": self.model.word_loss(states, batch["labels"])}
        if config.taught:
            target = self.instruct(ids, mask)
            if config.nst:
                terms["nst"] = config.ratio * nst_loss(self.nst_head(states), target, mask, config.nst_reduction)
            if config.contrast == "batch":
                own = self.contrast_head(states)
                terms["contrast"] = config.ratio * token_contrastive_loss(own, target, config.temperature, mask)
            elif self.bank is not None:
                own, negatives = self.contrast_head(states), self.bank.rows[batch["negatives"]]
                loss = token_crd_loss(own, target, negatives, config.bank_temperature, config.bank, mask)
                terms["contrast"] = config.ratio * loss
                self.bank.write(target[mask])
        return {"loss": torch.stack(list(terms.values())).sum()} | terms

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Return the share of texts that are nearer to their own clip than to another text's."""
        teacher = self.teacher
        if teacher is None or self.video is None or self.survey is None or survey.split(split).clips is None:
            return {}

        def seen(batch: dict[str, Any]) -> Tensor:
            words = unit(teacher(batch["ids"], batch["mask"])).sum(1)
            return torch.cat([words, self.see(batch)], 1)

        words, clips = survey.over(split, seen).chunk(2, 1)
        other = clips.roll(len(clips) // 2 or 1, 0)
        return {"teacher_pair_accuracy": float(((words * clips).sum(1) > (words * other).sum(1)).float().mean())}


# Settings for a small corpus on a few cores, which replace the paper's.
LAPTOP: dict[str, Any] = {
    "encoder": "text-64-2-4",
    "vocabulary": 2000,
    "context": 32,
    "dropout": 0.0,
    "batch_size": 32,
    "epochs": 4,
    "teacher_epochs": 8,
    "lr": 8e-3,
    "teacher_lr": 8e-3,
    "warmup": 0.1,
    "video_weight": 5.0,
    "video_layers": 1,
    "video_hidden": 64,
    "video_dropout": 0.0,
    "bank": 4096,
    "negatives": 1024,
}

SYSTEM = System(
    slug="vidlankd",
    task="tokens",
    config=VidLanKDConfig,
    learner=VidLanKD,
    data="moving-objects",
    recipe=LAPTOP,
)
