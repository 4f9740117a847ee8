"""ALBEF: align image and text by a momentum contrast before a fusion encoder reads both, and learn from a slow copy.

Li, Selvaraju, Gotmare, Joty, Xiong, Hoi: "Align before Fuse: Vision and Language Representation Learning with Momentum
Distillation", NeurIPS 2021, arXiv 2107.07651.

There are three networks: an image transformer, the lower layers of a BERT for text, and its upper layers (fusion). These have
cross-attention to the image's tokens. Three losses are added with weight 1. ITC contrasts the two uni-modal embeddings with
queues of the momentum copy's keys. ITM classifies with the fusion encoder whether image and text match; ITC's similarity
draws the negatives. MLM predicts masked words from text and image. Captions of the web are noisy. So targets of ITC and
MLM are mixed with the predictions of the networks' momentum copy (`alpha`).

This file has pre-training and the loss of fine-tuning for retrieval (`same_text`). `tasks/fused.py` has the networks, re-ranking
by ITM and maps of words in the picture; `encoders/albef_weights.py` reads the authors' checkpoints. Differences: a clean
warm-up and cosine replace the code's schedule, which jumps. ITC's in-batch keys are those of all processes, so that its
value does not depend on their number. (ITM's negatives come from each process's own batch, as in the code.) The temperature is
bounded in retrieval too. Not supported: the heads of VQA, SNLI-VE and NLVR2, RefCOCO+, and of the paper's views RandAugment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.masking import IGNORED, mask_tokens
from counterpoint.core.memory import Queue
from counterpoint.core.operands import class_similarity, positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rows import token_numbers
from counterpoint.core.teacher import EMATeacher
from counterpoint.core.transforms import holds, need_fixed, once
from counterpoint.core.world import over_group
from counterpoint.encoders.albef_weights import load_albef_checkpoint
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, diverged
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP, whole_items
from counterpoint.tasks.fused import FusedConfig, FusedLearner
from counterpoint.words import counted

NOBODY = -100  # the identity of an empty slot of a queue
TEMPERATURES = (0.001, 0.5)  # bounds of the temperature


# ---------------------------------------------------------------------------------------------------- momentum contrast


@over_group
@full_precision(keep=("image_queue", "text_queue"))
def momentum_contrast_soft(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    image_emb_m: Float[Tensor, "n dim"],
    text_emb_m: Float[Tensor, "n dim"],
    image_queue: Float[Tensor, "dim queue"],
    text_queue: Float[Tensor, "dim queue"],
    temperature: float | Float[Tensor, ""],
    alpha: float,
    idx: Int[Tensor, " n"] | None = None,
    idx_queue: Int[Tensor, " queue"] | None = None,
) -> Float[Tensor, ""]:
    r"""Compute ITC with momentum distillation (Eq. 6): the mean of image-to-text and text-to-image.

    Let A_t = [g_t ; text queue]; the student has s = f_v A_t^T / tau, the teacher q = g_v A_t^T / tau. Image to text is
    mean_b -sum_j y_bj log softmax(s)_bj, with y = alpha softmax(q) + (1 - alpha) Y. Y has a 1 at the row's own pair. With
    `idx` it has equal shares at all keys of the row's identity. Text to image is the same with both modalities exchanged.

    Args:
        image_emb, text_emb: the student's embeddings (f), a pair in each row; normalised here.
        image_emb_m, text_emb_m: the momentum copy's (g); normalised here, no gradient.
        image_queue, text_queue: older keys of the copy in unit columns, as the authors store them; may be empty.
        temperature: tau, a divisor > 0, a number or a learnable scalar (the teacher's similarities give it no gradient).
        alpha: weight of the soft targets, 0 (hard targets, the copy only makes keys) to 1.
        idx, idx_queue: identities of the pairs and of the queue's slots, for several captions of an image; -100 marks an
            empty slot. Pass both or neither.

    Memory is linear in n + queue: similarities are computed in blocks of rows of at most 2^23 numbers (or one row).
    Across processes the in-batch keys are those of all processes. Raises ValueError for shapes that do not fit, an empty
    batch, and an alpha or temperature out of range. Differentiating twice raises RuntimeError, except for alpha 0.
    Source: models/model_pretrain.py and model_retrieval.py of the authors' code.

    >>> x = torch.ones(4, 3)
    >>> momentum_contrast_soft(x, x, x, x, torch.ones(3, 4) / 3**0.5, torch.ones(3, 4) / 3**0.5, 0.07, 0.4)   # log(4 + 4)
    tensor(2.0794)
    """
    need_alike("n dim", image_emb=image_emb, text_emb=text_emb, image_emb_m=image_emb_m, text_emb_m=text_emb_m)
    for name, queue in (("image_queue", image_queue), ("text_queue", text_queue)):
        if queue.ndim != 2 or len(queue) != image_emb.shape[1]:
            raise ValueError(f"{name} must be [dim, queue], got {shapes(image_emb=image_emb, **{name: queue})}")
    need_within(0, 1, alpha=alpha)
    need_positive(temperature=temperature)
    if (idx is None) != (idx_queue is None):
        raise ValueError("idx and idx_queue go together: give both or neither")
    ids = None
    if idx is not None and idx_queue is not None:
        if idx.shape != image_emb.shape[:1] or idx_queue.shape != image_queue.shape[1:]:
            raise ValueError(
                "idx and idx_queue must be a number for each row and each column of the queues, got "
                + shapes(idx=idx, idx_queue=idx_queue)
            )
        if holds((idx == NOBODY).any()):
            raise ValueError(f"idx holds {NOBODY}, which marks an empty slot of a queue; use other identities")
        ids = idx, torch.cat([gather_rows(idx), idx_queue])
    f_v, f_t = unit(image_emb), unit(text_emb)
    g_v, g_t = unit(image_emb_m.detach()).to(f_v.dtype), unit(text_emb_m.detach()).to(f_v.dtype)
    to_text = _direction(f_v, g_v, g_t, text_queue, temperature, alpha, ids)
    to_image = _direction(f_t, g_t, g_v, image_queue, temperature, alpha, ids)
    return (global_mean(to_text) + global_mean(to_image)) / 2


def _direction(
    query: Tensor,
    teacher: Tensor,
    own: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    alpha: float,
    ids: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Compute the cross-entropy of each row in one direction."""
    mine, older = gather_rows(own), queue.detach().to(own.dtype)
    # Copied in the queue's memory layout, columns or rows: transposing it takes as long as a product with it.
    key = torch.cat([mine.T, older], 1).T if older.is_contiguous() else torch.cat([mine, older.T])
    q = scaled(query, temperature)
    if ids is None:
        positive = positive_similarity(q, own)
    else:
        total, count = class_similarity(q, key, *ids)
        positive = total / count  # the row's own pair is among them
    if alpha == 0:
        return pair_logsumexp(q, key).rows - positive
    taught = scaled(teacher, temperature.detach() if isinstance(temperature, Tensor) else temperature)
    soft = pair_cross_entropy(once(q, "momentum_contrast_soft"), key, taught, key, share=alpha, entropy=False).rows
    return soft - (1 - alpha) * positive


class HardNegativeWeights(NamedTuple):
    """Row b has the weights of drawing an image for text b, and a text for image b; 0 where it must not be drawn."""

    image_weights: Float[Tensor, "n n"]
    text_weights: Float[Tensor, "n n"]


@full_precision
@torch.no_grad()
def hard_negative_weights(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    text_key: Float[Tensor, "n dim"],
    image_key: Float[Tensor, "n dim"],
    temperature: float | Float[Tensor, ""],
    idx: Int[Tensor, " n"] | None = None,
) -> HardNegativeWeights:
    """Compute ITM's weights of drawing each in-batch negative (Sec. 3.2): the softmax of ITC's similarities, else 0.

    Args:
        image_emb, text_emb: the student's embeddings; normalised here.
        text_key, image_key: the momentum copy's of the same pairs; normalised here.
        temperature: divisor, > 0.
        idx: identities; pairs of one identity are no negatives of each other. None: each pair is an identity.

    Rows do not sum to 1, because other entries than negatives become 0 after the softmax. A peaked softmax may leave no
    negative a probability. Such a row gets the softmax over its negatives alone, which has the same proportions. (The authors'
    repair, 1e-4 on the logits, has no effect; BLIP's, 1e-4 on the probabilities, changes the distribution.) No gradient.
    Raises ValueError for shapes that do not fit and numbers that are not finite. Raises it too where a row has no
    negative: for one pair, or pairs of one identity only.

    >>> x = torch.eye(2)
    >>> hard_negative_weights(x, x, x, x, 1.0).text_weights
    tensor([[0.0000, 0.2689],
            [0.2689, 0.0000]])
    """
    need_alike("n dim", image_emb=image_emb, text_emb=text_emb, text_key=text_key, image_key=image_key)
    need_positive(temperature=temperature)
    n = len(image_emb)
    if idx is not None and idx.shape != (n,):
        raise ValueError(f"idx must be a number for each row, got {shapes(image_emb=image_emb, idx=idx)}")
    if n < 2:
        raise ValueError("image_emb is one row: a hard negative needs another pair in the batch")
    forbidden = torch.eye(n, dtype=torch.bool, device=image_emb.device) if idx is None else idx[:, None] == idx
    if holds(forbidden.all()):
        raise ValueError("idx holds one identity only: there is no negative in the batch")

    def weights(names: str, query: Tensor, key: Tensor) -> Tensor:
        logits = scaled(unit(query), temperature) @ unit(key).to(wide(query).dtype).T
        if holds(~logits.isfinite().all()):
            raise ValueError(f"{names} hold numbers that are not finite")
        found = logits.softmax(1).masked_fill(forbidden, 0.0)
        among = logits.masked_fill(forbidden, -torch.inf).softmax(1)
        # Below this the weights are subnormal and have lost their proportions.
        info = torch.finfo(found.dtype)
        return torch.where(found.sum(1, keepdim=True) < info.tiny / info.eps, among, found)

    return HardNegativeWeights(
        weights("text_emb and image_key", text_emb, image_key), weights("image_emb and text_key", image_emb, text_key)
    )


# --------------------------------------------------------------------------------------------------------- masked words


@over_group
@full_precision
def mlm_distill(
    logits: Float[Tensor, "*places vocabulary"],
    logits_m: Float[Tensor, "*places vocabulary"],
    labels: Int[Tensor, "*places"],
    alpha: float,
) -> Float[Tensor, ""]:
    """Compute masked language modelling with momentum distillation (Eq. 7): (1 - alpha) CE + alpha KD, means over masked places.

    CE is -log softmax(logits)[label], KD is -sum_v softmax(logits_m)_v log softmax(logits)_v.

    Args:
        logits, logits_m: those of the student, and of the momentum copy on the same masked text (no gradient).
        labels: token numbers; -100 at places that are not masked.
        alpha: weight of the soft targets, 0..1.

    Without a masked place the loss is 0, with a gradient of 0. Across processes the mean is over all processes' places. Raises
    ValueError for shapes that do not fit, labels that are no token, and an alpha outside 0..1.

    >>> mlm_distill(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[1, -100]]), 0.4)   # log 4
    tensor(1.3863)
    """
    if logits.shape != logits_m.shape or logits.shape[:-1] != labels.shape or logits.ndim < 1:
        raise ValueError(
            "logits and logits_m must be [..., vocabulary] alike and labels [...], got "
            + shapes(logits=logits, logits_m=logits_m, labels=labels)
        )
    need_within(0, 1, alpha=alpha)
    need_fixed("mlm_distill", labels=labels)
    where = labels != IGNORED
    targets = labels[where]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise ValueError(
            f"labels must be {IGNORED} or lie in 0..{logits.shape[-1] - 1}, got {int(targets.min())}..{int(targets.max())}"
        )
    log_p = wide(logits[where]).log_softmax(-1)
    taught = wide(logits_m[where].detach()).softmax(-1).to(log_p.dtype)
    hard = log_p.gather(-1, targets[:, None]).squeeze(-1)
    return global_mean(-(1 - alpha) * hard - alpha * (taught * log_p).sum(-1))


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class ALBEFConfig(FusedConfig):
    """Settings of ALBEF. Defaults are the paper's for pre-training; its rate falls to a tenth, ours to 0."""

    epochs: int = 30
    batch_size: int = 512
    image_encoder: str = "timm:deit_base_patch16_224"
    text_encoder: str = "hf:bert-base-uncased"
    pretrained: bool = True
    embedding: int = 256
    context: int = 25
    recipe: str = "mae"
    optimizer: str = "adamw"
    lr: float = 1e-4 * 256 / 512
    weight_decay: float = 0.02
    warmup_epochs: int = 1
    alpha: float = 0.4
    """Weight of the momentum copy's soft targets, 0 to 1; 0 is plain ITC and MLM."""
    alpha_ramp: float = 1.0
    """Epochs over which alpha rises from 0; 0: it has its full value from the first step."""
    momentum_teacher: float = 0.995
    """Share of the momentum copy that stays at each step."""
    queue: int = 65536
    """Keys of earlier batches that ITC contrasts with; a multiple of batch_size."""
    temperature: float = 0.07
    """Initial value of the learnt temperature; it stays within 0.001 and 0.5."""
    mlm_probability: float = 0.15
    """Share of a text's tokens that are masked."""
    use_itc: bool = True
    """Contrast embeddings of image and text."""
    use_itm: bool = True
    """Tell pairs that belong together from pairs that do not, by the fusion encoder."""
    use_mlm: bool = True
    """Predict masked words from text and image."""
    hard_negatives: bool = True
    """Draw ITM's negatives by ITC's similarity; off, or without ITC, all are equally likely."""
    same_text: bool = False
    """Items with identical words have one identity, in ITC's targets and ITM's negatives (the paper's retrieval loss)."""
    checkpoint: str = ""
    """Initial weights: path of a file of the authors' code. Default: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("alpha", "momentum_teacher", "mlm_probability")
        if self.alpha_ramp < 0:
            raise CounterpointError(f"alpha_ramp must not be negative, got {self.alpha_ramp}")
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            raise CounterpointError(f"temperature must lie in {low}..{high}, got {self.temperature}")
        if not (self.use_itc or self.use_itm or self.use_mlm):
            raise CounterpointError("use_itc, use_itm and use_mlm are all off: turn on at least one of them")
        if self.queue < 1 or self.queue % self.batch_size:
            near = max(1, round(self.queue / self.batch_size)) * self.batch_size
            raise CounterpointError(
                f"queue ({self.queue}) must be a multiple of batch_size ({self.batch_size}); use --queue {near}"
            )

    @property
    def scores_pairs(self) -> bool:
        return self.use_itm

    @property
    def predicts_words(self) -> bool:
        return self.use_mlm


class ALBEF(FusedLearner):
    """Image encoder, text encoder, fusion encoder, their momentum copy and two queues of its keys.

    Without ITM and MLM there is no fusion, and any two modalities are possible, for instance vectors.
    """

    slug: ClassVar[str] = "albef"
    queue_ids: Int[Tensor, " queue"]
    student: nn.ModuleDict

    def __init__(self, config: ALBEFConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        if config.same_text and self.kinds[self.text] != "text":
            raise CounterpointError("same_text compares the words of items, but the data has no text: --no-same-text")
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)), requires_grad=config.use_itc)
        if not config.use_itc:
            self.heads.requires_grad_(False)
        # A view of modules that are registered already, so it is not registered again.
        self.__dict__["student"] = nn.ModuleDict(self.networks())
        self.teacher = EMATeacher(self.student)
        generator = torch.Generator().manual_seed(seed)
        self.queues = nn.ModuleDict(
            {name: Queue(config.queue, config.embedding, seed=generator) for name in (self.image, self.text)}
        )
        self.register_buffer("queue_ids", torch.full((config.queue if config.same_text else 0,), NOBODY))

    def build_head(self, dim: int) -> nn.Module:
        return nn.Linear(dim, self.config.embedding)

    def begin(self, survey: Survey) -> None:
        if self.config.checkpoint:
            self.load_state_dict(load_albef_checkpoint(Path(self.config.checkpoint), self))

    @property
    def alpha(self) -> float:
        """Weight of the soft targets at this step: it rises linearly from 0 at the first step."""
        ramp = self.config.alpha_ramp * self.steps_per_epoch
        return self.config.alpha * (min(1.0, self.position.step / ramp) if ramp else 1.0)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, image, text = self.config, self.image, self.text
        count, inputs = whole_items(batch, (image, text))
        if count < (2 if config.use_itm else 1):
            raise CounterpointError(
                f"a batch has {counted(count, 'item')} with {image} and {text}"
                + (", ITM needs two: use a larger batch, or switch use_itm off" if config.use_itm else "")
            )
        alpha = self.alpha
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURES)
        v, w = (self.see(self.student, name, inputs[name], fused=config.fuses) for name in (image, text))
        f_v, f_t = self.heads[image](v.vector), self.heads[text](w.vector)
        self.teacher.update(self.student, config.momentum_teacher)
        copy: Any = self.teacher.module
        with torch.no_grad():
            v_m, w_m = (self.see(copy, name, inputs[name], fused=config.fuses) for name in (image, text))
            g_v, g_t = unit(copy["heads"][image](v_m.vector)), unit(copy["heads"][text](w_m.vector))
        ids = token_numbers(*inputs[text]) if config.same_text else None

        terms: dict[str, Tensor] = {}
        if config.use_itc:
            of_v, of_t = (cast(Queue, self.queues[name]) for name in (image, text))
            # The loss reads the queues without a copy; its backward pass keeps no view of them.
            terms["itc"] = momentum_contrast_soft(
                *(f_v, f_t, g_v, g_t, of_v.rows.T, of_t.rows.T),
                temperature=self.temperature,
                alpha=alpha,
                idx=ids,
                idx_queue=None if ids is None else self.queue_ids,
            )
            if not bool(terms["itc"].isfinite()):
                raise diverged("the contrastive loss is not finite")
            if ids is not None:
                self._write_ids(gather_rows(ids), int(of_v.pointer))
            of_v.write(g_v)
            of_t.write(g_t)
        if config.use_itm:
            terms["itm"] = self._itm(v.tokens, w.tokens, inputs[text][1], (f_v, f_t, g_t, g_v), ids)
        if config.use_mlm:
            terms["mlm"] = self._mlm(inputs[text], v.tokens, v_m.tokens, alpha)
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss, **terms, "temperature": self.temperature.detach(), "alpha": loss.new_tensor(alpha)}

    @torch.no_grad()
    def _write_ids(self, ids: Tensor, pointer: int) -> None:
        """Write identities to the slots that the queues write the keys of these items to."""
        length = len(self.queue_ids)
        places = torch.arange(max(len(ids) - length, 0), len(ids), device=ids.device)
        self.queue_ids[(pointer + places) % length] = ids[places]

    def _itm(
        self, v: Any, w: Any, mask: Tensor, embeddings: tuple[Tensor, Tensor, Tensor, Tensor], ids: Tensor | None
    ) -> Tensor:
        """Compute the cross-entropy of matching: n pairs, n texts with a drawn image, n images with a drawn text."""
        n, hard = len(v), self.config.hard_negatives and self.config.use_itc
        try:
            # For equally likely negatives, temperature 1 prevents an underflow of the softmax.
            weights = hard_negative_weights(*embeddings, temperature=self.temperature if hard else 1.0, idx=ids)
        except ValueError as error:
            raise CounterpointError(f"ITM finds no negatives: {error}") from error
        if not hard:
            weights = HardNegativeWeights(*((rows > 0).float() for rows in weights))
        image_at, text_at = (torch.multinomial(rows, 1).squeeze(1) for rows in weights)
        states = self.fusion(
            torch.cat([w, w, w[text_at]]), torch.cat([mask, mask, mask[text_at]]), torch.cat([v, v[image_at], v])
        )
        labels = torch.cat([mask.new_ones(n), mask.new_zeros(2 * n)]).long()
        return global_mean(F.cross_entropy(self.itm_head(states[:, 0]), labels, reduction="none"))

    def _mlm(self, text: tuple[Tensor, Tensor], v: Any, v_m: Any, alpha: float) -> Tensor:
        """Compute the loss of masked words; logits are computed only for masked tokens."""
        ids, mask = text
        first = torch.arange(ids.shape[1], device=ids.device) == 0
        new, labels = mask_tokens(
            ids, mask & ~first, self.mask_token, self.size.vocabulary, self.config.mlm_probability
        )
        where = labels != IGNORED

        def logits(networks: Any, image: Tensor) -> Tensor:
            encoder = networks["encoders"][self.text]
            states = networks["fusion"](encoder.tokens(new, mask), mask, image)
            return networks["fusion"].words(states[where], encoder.embeddings.word.weight)

        with torch.no_grad():
            taught = logits(self.teacher.module, v_m)
        return mlm_distill(logits(self.student, v), taught, labels[where], alpha)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the embeddings of the student and of the momentum copy."""
        return {"embedding": self.embed(batch), "teacher_embedding": self.embedded(self.teacher.module, batch)}


# -------------------------------------------------------------------------------------------------------------- settings

# Small networks for pictures and captions, from random weights. At first all their embeddings are similar. A faster copy
# or a long queue makes the networks distinguish keys by age, not by content. Soft targets of an untrained
# copy reinforce that. Hence the paper's momentum, a short queue and a long ramp.
_SMALL: dict[str, Any] = {
    "image_encoder": "vit-s",
    "pretrained": False,
    "depth": 4,
    "width": 128,
    "heads": 4,
    "fusion_layers": 2,
    "dropout": 0.0,
    "rerank": 16,
}


SYSTEM = System(
    slug="albef",
    task="aligned",
    config=ALBEFConfig,
    learner=ALBEF,
    data="digit-pairs",
    recipes={
        "digit-pairs": LAPTOP
        | _SMALL
        | {
            "epochs": 40,
            "batch_size": 64,
            "queue": 64,
            "alpha_ramp": 20.0,
            "recipe": "none",
            "lr": 1e-3 * 256 / 64,
            "vocabulary": 300,
            "context": 8,
        }
    },
    recipe=LAPTOP | _SMALL | {"queue": 256, "alpha_ramp": 5.0, "recipe": "weak"},
)
