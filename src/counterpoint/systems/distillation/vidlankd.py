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
2. Student: masked words on texts alone, and two losses towards t. NST compares neurons, by their activations over the positions
   of a sentence. The contrast compares, at each position, the sentences of the batch.

Video encoder, teacher and heads are discarded. The student's encoder remains.

- Of the paper, not of the code: both encoders of stage 1 train. The code's optimiser lacks the video encoder, which stays at its
  random start; `--frozen-video` has that behaviour. The paper's CRD has a bank of negatives. The code replaces it by NT-Xent in
  the batch, which is the default here; `--contrast bank` is CRD.
- Of the code: scales of the losses (NST is a sum over sentences; NT-Xent is divided by the number of rows once more), margin 1, one
  negative, temperature 1, rates and clipping.
- Chosen: padding enters no loss. Without padding the values are the code's. Blocks normalise before attention, not after. A head
  is applied at once to all tokens. `--teacher text` trains the same teacher without videos, `run:RUN` and `hf:NAME` give
  a finished one.

Not built: half precision of its own (`--precision` has it for all systems), and the fine-tuning on GLUE, SQuAD and SWAG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_rows, shapes
from counterpoint.core.contrast import pair_softplus, softplus
from counterpoint.core.distributed import batch_order, gather_rows, global_mean, mean_of_total, place
from counterpoint.core.memory import Queue
from counterpoint.core.nt_xent import nt_xent
from counterpoint.core.operands import EPS, positive_similarity, scaled, unit, with_bias
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import alone, over_group, world
from counterpoint.encoders.clips import ClipEncoder
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.language_teachers import LanguageTeacherConfig, LanguageTeacherLearner

FEW = 256  # rows of a position up to which one product of matrices is faster than the kernel

Mask = Bool[Tensor, "n tokens"] | Int[Tensor, "n tokens"] | Float[Tensor, "n tokens"]


def _real(mask: Mask | None, tokens: Tensor) -> Bool[Tensor, "n tokens"]:
    """Return the mask as bool; None: all tokens."""
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"mask must be [n, tokens] = {list(tokens.shape[:2])}, got {shapes(mask=mask)}")
    return mask != 0


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
    real = _real(mask, lang).to(lang.dtype)
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


# ------------------------------------------------------------------------------------------------- stage 2: the student


def _neurons(tokens: Tensor, real: Tensor) -> Float[Tensor, "n tokens dim"]:
    """Normalise tokens, then each neuron over the positions of its sentence; padding is 0."""
    return F.normalize(unit(tokens) * real[..., None], dim=1, eps=EPS)


@over_group
@full_precision(keep=("mask",))
def nst_loss(
    student_tokens: Float[Tensor, "n tokens dim"],
    teacher_tokens: Float[Tensor, "n tokens teacher_dim"],
    mask: Mask | None = None,
    reduction: str = "sum",
) -> Float[Tensor, ""]:
    r"""Compare neurons by their activations over a sentence: a maximum mean discrepancy with a kernel of degree 2 (Eq. 4).

    Let S and R have a row of length 1 for each neuron of student and teacher, over positions. A sentence's term is

        mean_{d,d'} (S_d . S_d')^2 - 2 mean_{d,d'} (S_d . R_d')^2

    divided by its number of tokens. The teacher's own term is constant and left out, so values may be negative.

    Args:
        student_tokens: of any norm; tokens are normalised here.
        teacher_tokens: likewise, of any width; no gradient.
        mask: not 0 at tokens, 0 at padding; default: all are tokens.
        reduction: "sum" over sentences (the authors', default) or "mean".

    Memory is O(n m^2), m being the smaller of positions and width. A sentence without tokens and a neuron without activation
    count 0. Raises ValueError for shapes that do not fit, an empty batch and an unknown reduction.
    Source of the distance: NST, arXiv 1707.01219.

    >>> x = torch.eye(2)[None]
    >>> nst_loss(x, x)
    tensor(-0.2500)
    """
    _need_tokens(student_tokens, teacher_tokens)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    real = _real(mask, student_tokens)
    s = _neurons(wide(student_tokens), real)
    r = _neurons(wide(teacher_tokens.detach()), real).to(s.dtype)
    d, of_teacher = s.shape[2], r.shape[2]
    # sum_{d,d'} (S_d . R_d')^2 = <S^T S, R^T R>, whichever of positions and neurons is fewer.
    if s.shape[1] <= min(d, of_teacher):
        own = s @ s.mT
        values = (own * (own / d**2 - r @ r.mT * (2 / (d * of_teacher)))).sum((1, 2))
    else:
        values = (s.mT @ s).square().sum((1, 2)) / d**2 - (s.mT @ r).square().sum((1, 2)) * (2 / (d * of_teacher))
    values = values / real.sum(1).clamp(min=1)
    return global_mean(values) if reduction == "mean" else mean_of_total(values.sum(), 1)


@over_group
@full_precision
def ntxent_pair(a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"], temperature: float = 1.0) -> Float[Tensor, ""]:
    r"""Compute NT-Xent of n pairs, divided by the number of rows 2n once more, as the authors' code.

    Args:
        a, b: paired rows of any norm; normalised here.
        temperature: > 0, by default 1.

    One pair has no negatives, and its loss is 0. Raises ValueError for shapes that do not fit and an empty batch.
    Relations: SimCLR's `nt_xent`, divided by 2n.

    >>> ntxent_pair(torch.eye(2), torch.eye(2))
    tensor(0.1379)
    """
    need_alike("n dim", a=a, b=b)
    total = place(len(a), a.device).total
    return nt_xent(a, b, temperature) / (2 * total)


def _contrasts(
    a: Float[Tensor, "positions n dim"],
    b: Float[Tensor, "positions n dim"],
    real: Bool[Tensor, "positions n"],
    temperature: float,
) -> Float[Tensor, " positions"]:
    """Compute `ntxent_pair` at each position, over its real rows; 0 where there is none."""
    if 2 * a.shape[1] > FEW:
        with alone():
            found = [
                ntxent_pair(x[r], y[r], temperature) if bool(r.any()) else x.sum() * 0
                for x, y, r in zip(a, b, real, strict=True)
            ]
        return torch.stack(found) if found else a.sum((1, 2))
    z = torch.cat([unit(a), unit(b)], 1)
    there = torch.cat([real, real], 1)
    s = (z @ z.mT) / temperature
    # A row is never its own key, and padding is never a key. Padding keeps one key, so that nothing becomes NaN.
    hidden = ~there[:, None] | torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    positive = s.diagonal(a.shape[1], 1, 2).repeat(1, 2)
    rows = torch.where(there, s.masked_fill(hidden & there[..., None], -torch.inf).logsumexp(2) - positive, 0)
    return rows.sum(1) / there.sum(1).clamp(min=1).square()


@over_group
@full_precision(keep=("mask",))
def token_contrastive_loss(
    student_tokens: Float[Tensor, "n tokens dim"],
    teacher_tokens: Float[Tensor, "n tokens dim"],
    temperature: float = 1.0,
    mask: Mask | None = None,
) -> Float[Tensor, ""]:
    r"""Contrast the sentences of a batch at each position, and average `ntxent_pair` over positions (the code's CRD).

    Args:
        student_tokens: of any norm; normalised here.
        teacher_tokens: of the same width; no gradient.
        temperature: > 0, by default 1.
        mask: not 0 at tokens, 0 at padding; default: all are tokens. A position compares the sentences that reach it.

    A position without tokens is left out of the mean. A batch of one sentence has no negatives, and its loss is 0. Equal
    sentences are false negatives of each other. Up to 128 sentences the products of a position are one matrix; larger
    batches take the kernel, whose memory is linear. Processes share the positions. Raises ValueError for shapes that do
    not fit, an empty batch and a temperature that is not positive.

    >>> x = torch.eye(2)[:, None]
    >>> token_contrastive_loss(x, x)
    tensor(0.1379)
    """
    _need_tokens(student_tokens, teacher_tokens)
    need_alike("n tokens dim", student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    need_positive(temperature=temperature)
    real = gather_rows(_real(mask, student_tokens))
    a, b = gather_rows(wide(student_tokens)), gather_rows(wide(teacher_tokens.detach()))
    rank, size = world()
    used = real.any(0)
    mine = slice(rank, None, size)
    found = _contrasts(a.transpose(0, 1)[mine], b.to(a.dtype).transpose(0, 1)[mine], real.T[mine], temperature)
    return mean_of_total(found.sum(), max(1, int(used.sum())))


@over_group
@full_precision(keep=("mask", "bank"))
def token_crd_loss(
    student_tokens: Float[Tensor, "n tokens dim"],
    teacher_tokens: Float[Tensor, "n tokens dim"],
    bank: Float[Tensor, "negatives dim"],
    temperature: float = 0.07,
    size: int | None = None,
    mask: Mask | None = None,
) -> Float[Tensor, ""]:
    r"""Tell a token's teacher from negatives of a memory bank, one by one: the paper's contrast (CRD), averaged over tokens.

    Let s be the cosine divided by the temperature. With n negatives of M rows, and p(s) = e^s / (e^s + n / M):

        -log p(s_positive) - sum_k log (1 - p(s_k))

    Args:
        student_tokens, teacher_tokens: of any norm and one width; normalised here. The teacher's get no gradient.
        bank: rows of the bank that serve as negatives, of any norm; no gradient.
        temperature: > 0, by default 0.07.
        size: M, number of rows of the whole bank; default: all rows are negatives.
        mask: not 0 at tokens, 0 at padding; default: all are tokens.

    Without any token the loss is 0. Memory is linear in tokens and negatives. Raises ValueError for shapes that do not fit.
    Raises it too for an empty batch or bank, and a size below the number of negatives.
    Source: CRD, arXiv 1910.10699, Eq. 17 and 18.

    >>> x = torch.eye(2)[None]
    >>> token_crd_loss(x, x, torch.eye(2), temperature=1.0)
    tensor(2.3197)
    """
    _need_tokens(student_tokens, teacher_tokens)
    need_alike("n tokens dim", student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    need_rows(bank=bank)
    need_positive(temperature=temperature)
    if bank.ndim != 2 or bank.shape[1] != student_tokens.shape[2]:
        raise ValueError(f"bank must be [negatives, {student_tokens.shape[2]}], got {shapes(bank=bank)}")
    if size is not None and size < len(bank):
        raise ValueError(f"size must be at least the number of negatives {len(bank)}, got {size}")
    real = _real(mask, student_tokens)
    a, b = unit(wide(student_tokens)[real]), unit(wide(teacher_tokens.detach())[real])
    shift = torch.full((len(a),), math.log(len(bank) / (size or len(bank))), dtype=a.dtype, device=a.device)
    query = scaled(a, temperature)
    own = positive_similarity(query, b.to(a.dtype)) - shift
    query, key = with_bias(query, unit(wide(bank.detach())).to(a.dtype), row=-shift)
    return global_mean(softplus(-own) + pair_softplus(query, key))


def _need_tokens(student_tokens: Tensor, teacher_tokens: Tensor) -> None:
    need_rows(student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    if student_tokens.ndim != 3 or teacher_tokens.ndim != 3 or student_tokens.shape[:2] != teacher_tokens.shape[:2]:
        raise ValueError(
            "student_tokens and teacher_tokens must be [n, tokens, dim] of the same n and tokens, got "
            + shapes(student_tokens=student_tokens, teacher_tokens=teacher_tokens)
        )


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
    """Weight of the hinge between tokens and clips, beside masked words."""
    margin: float = 1.0
    """Margin of the hinge."""
    frozen_video: bool = False
    """Keep the video encoder at its random start, as the authors' code does."""
    video_layers: int = 12
    """Layers of the video encoder, as wide as the teacher."""
    video_hidden: int = 1024
    """Width between the two linear maps of a clip's rows."""
    video_dropout: float = 0.3
    """Dropout probability in the video encoder's last MLP."""
    seconds: int = 384
    """Maximum length of a clip in seconds; the rest is cut."""
    nst: bool = True
    """Compare neurons by their activations (NST)."""
    contrast: Literal["batch", "bank", "none"] = "batch"
    """Contrast tokens within the batch (NT-Xent), with a bank of earlier tokens (CRD), or not."""
    heads: bool = True
    """Use a head of its own for each of the two losses; off: compare the student's states."""
    ratio: float = 1.0
    """Weight of both losses, beside masked words."""
    nst_reduction: Literal["sum", "mean"] = "sum"
    """Sum NST over the sentences of a batch, as the code does, or average it."""
    temperature: float = 1.0
    """Temperature of the contrast within the batch."""
    bank: int = 16384
    """Tokens of earlier batches in the bank."""
    negatives: int = 4096
    """Tokens of the bank that are drawn as negatives at each step."""
    bank_temperature: float = 0.07
    """Temperature of the contrast with the bank."""

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
        for name, known in (("contrast", ("batch", "bank", "none")), ("nst_reduction", ("sum", "mean"))):
            if getattr(self, name) not in known:
                raise unknown(name.replace("_", " "), getattr(self, name), known)
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
                    f"the teacher is {width} wide and the student {own}: without heads the contrast needs equal widths"
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
