"""COCONUT: learn spoken intents class after class; old classes are pulled to where the previous network had them.

Cappellazzo, Fini, Yang, Falavigna, Brutti, Raj: "Continual Contrastive Spoken Language Understanding", Findings of ACL 2024,
arXiv 2310.02699. The authors published no code.

    a_k, b_k    [dim] unit embeddings of sound k by the network (student), and by its frozen copy of the phase before (teacher)
    t_k         [dim] unit embedding of the transcript of sound k: the mean of its tokens' vectors, projected
    I, I_R, I_C items of the batch, those from the memory, those of the current phase
    P(k)        items of I_R with the class of k, with k itself
    Q(k)        items of I_C with the class of k, with k itself

In the order of a step:

1. NSPT (negative-student positive-teacher), anchors k in I_R:

       -1/|P(k)| sum_{p in P(k)} log[ exp(a_k b_p / tau) / sum_{i in I, i != k} exp(a_k a_i / tau) ]

   The teacher knows old classes, so it gives the positives. It never saw the new ones, so the student gives the negatives.
   The positive is not in the denominator, so the loss can be negative.
2. MM (multi-modal), anchors k in I_C: CLIP's loss of sounds and transcripts, with the mean over Q(k) outside the logarithm.
3. The task: cross-entropy of the tokens `intent, separator, transcript`, or of the class alone (`--head classifier`).
4. The sum, with weights 1 for the task, lambda_MM, and lambda_NSPT = old classes / (old + new classes).

In the first phase there is no teacher and no NSPT. Each phase begins with a new optimiser.

- Alternatives for comparison: `--roles ntpt` takes negatives from the teacher, too; `--roles scl` is SupCon of the whole batch;
  `--roles none --mm-weight 0` is plain rehearsal, and with `--memory 0` plain continued training.
- Chosen where the paper is not explicit: k is in P(k) and not in its denominator; means over anchors; MM in all phases, on new
  items; Q(k) by class, as equal transcripts must not be negatives (`--positives pair`: Q(k) = {k}).

Not built: decoding by beams, distillation of sequences or tokens (S-KD, T-KD), slots in the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_word
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, place
from counterpoint.core.operands import class_similarity, positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Listed
from counterpoint.core.world import over_group, world
from counterpoint.encoders.audio import mean_state
from counterpoint.encoders.text import Tokenizer
from counterpoint.encoders.transcribers import IntentWriter, TokenMean
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import first_two
from counterpoint.tasks.class_streams import ClassStreamConfig, ClassStreamLearner
from counterpoint.tasks.measures.transcripts import transcript_figures

FEW = 2048  # rows up to which a whole matrix is faster
FEWER = 128  # rows up to which that of all rows is faster than that of the anchors


@over_group
@full_precision
def coconut_nspt(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    rehearsal: Bool[Tensor, " n"],
    temperature: float = 0.1,
    roles: Literal["nspt", "ntpt", "scl"] = "nspt",
    own_positive: bool = True,
) -> Float[Tensor, ""]:
    """Compute the contrast of rehearsed items with roles for student and teacher, the mean over its anchors (step 1).

    Args:
        student, teacher: embeddings of the same items, of any norm; normalised here. The teacher gets no gradient.
        labels: class of each item.
        rehearsal: True for items from the memory.
        temperature: > 0, by default 0.1.
        roles: "nspt" (default): positives of the teacher, negatives of the student; "ntpt": both of the teacher; "scl": both of
            the student, every item of the batch an anchor and a positive of its class, which is SupCon.
        own_positive: count an anchor's own teacher row among its positives (default); never for "scl".

    The value is 0 without an anchor and for a single row. An anchor without a positive has loss 0. Across processes, each
    anchor meets the rows of all processes. Raises ValueError for shapes that do not fit, an empty batch and unknown roles. The
    temperature must be positive and finite.

    >>> x = torch.eye(2)
    >>> coconut_nspt(x, x, torch.tensor([0, 1]), torch.tensor([True, True]))
    tensor(-10.)
    """
    need_alike("n dim", student=student, teacher=teacher)
    for name, found in (("labels", labels), ("rehearsal", rehearsal)):
        if found.shape != student.shape[:1]:
            raise ValueError(f"{name} must be [n] with n = {len(student)}, got {list(found.shape)}")
    need_positive(temperature=temperature)
    need_word(("nspt", "ntpt", "scl"), roles=roles)
    a = unit(student)
    b = a if roles == "scl" else unit(teacher.detach()).to(a.dtype)
    own, negative = own_positive and roles != "scl", b if roles == "ntpt" else a
    anchor = torch.ones_like(rehearsal) if roles == "scl" else rehearsal
    if world()[1] == 1 and len(a) <= FEW:
        return _of_matrix(a, b, negative, labels, anchor, temperature, own)
    rows, at = anchor.nonzero().squeeze(1), place(len(a), a.device)
    if at.total < 2 or not place(len(rows), a.device).total:
        return (a * 0).sum()
    query, positive, mine = scaled(a[rows], temperature), b[rows], labels[rows]
    index = gather_rows(at.offset + rows)[:, None]
    log_sum = batch_logsumexp(query, negative, exclude=Listed(index)).rows
    similarity, count = class_similarity(query, gather_rows(positive), mine, gather_rows(mine))
    if not own:
        similarity, count = similarity - (query * positive).sum(1), count - 1
    return global_mean(torch.where(count > 0, log_sum - similarity / count.clamp(min=1), 0.0))


def _of_matrix(
    query: Tensor, positive: Tensor, negative: Tensor, labels: Tensor, anchor: Tensor, temperature: float, own: bool
) -> Tensor:
    """Compute the contrast of a small batch by its matrix, which is faster than without it."""
    same = (labels[:, None] == labels) & anchor
    if not own:
        same.fill_diagonal_(False)
    if len(query) > FEWER:
        rows = anchor.nonzero().squeeze(1)
        query, same, anchor = query[rows], same[rows], anchor[rows]
        itself = query.new_zeros(same.shape).scatter_(1, rows[:, None], -torch.inf)
    else:
        itself = query.new_zeros(same.shape).fill_diagonal_(-torch.inf)
    if len(negative) < 2 or not len(query):
        return (query * 0).sum()
    among = same.to(query.dtype)
    count = among.sum(1)
    weight = anchor.to(query.dtype)
    weight = weight / weight.sum().clamp(min=1)
    if not own:
        weight = weight * (count > 0)  # an anchor without a positive
    target = among @ positive * (weight / (count.clamp(min=1) * temperature))[:, None]
    logits = torch.addmm(itself, query, negative.T, alpha=1 / temperature)
    return torch.dot(logits.logsumexp(1), weight) - (query * target).sum()


@over_group
@full_precision
def coconut_mm(
    audio: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"] | None = None,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Compute the contrast of sounds and transcripts in both directions, the mean over both (step 2).

    Args:
        audio, text: embeddings of n pairs, of any norm; normalised here.
        labels: class of each pair; pairs of one class are positives of each other. None (default): its own alone.
        temperature: > 0, by default 0.1.

    A single pair has loss 0. Across processes, each row meets the rows of all processes. Raises ValueError for shapes that do
    not fit, an empty batch and a temperature that is not positive and finite.

    >>> x = torch.eye(2)
    >>> coconut_mm(x, x, torch.tensor([0, 0]), temperature=1.0)
    tensor(0.8133)
    """
    need_alike("n dim", audio=audio, text=text)
    need_positive(temperature=temperature)
    if labels is not None and labels.shape != audio.shape[:1]:
        raise ValueError(f"labels must be [n] with n = {len(audio)}, got {list(labels.shape)}")
    a, t = scaled(unit(audio), temperature), unit(text)
    if world()[1] == 1 and len(a) <= FEW:
        logits = a @ t.T
        both = logits.log_softmax(0) + logits.log_softmax(1)
        if labels is None:
            return -both.diagonal().mean() / 2
        same = (labels[:, None] == labels).to(a.dtype)  # symmetric: its rows and columns have equal sums
        return -(both * (same / same.sum(1))).sum() / (2 * len(a))
    found = batch_logsumexp(a, t, columns=True)
    assert found.columns is not None
    if labels is None:
        return global_mean((found.rows + found.columns) / 2 - positive_similarity(a, t))
    every = gather_rows(labels)
    similarity, count = class_similarity(a, gather_rows(t), labels, every)
    back, _ = class_similarity(t, gather_rows(a), labels, every)
    return global_mean((found.rows + found.columns) / 2 - (similarity + back) / (2 * count))


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class CoconutConfig(ClassStreamConfig):
    """Settings of COCONUT. Defaults are the paper's for six groups of the intents of Fluent Speech Commands."""

    epochs: int = 10
    batch_size: int = 32
    audio_encoder: str = "hf:ntu-spml/distilhubert"
    embedding: int = 768
    optimizer: str = "adamw"
    lr: float = 5e-4 * 256 / 32
    weight_decay: float = 0.1
    warmup_epochs: int = 1
    recipe: str = "none"
    head: Literal["decoder", "classifier"] = "decoder"
    """Write intent and transcript (decoder), or predict the class alone (classifier)."""
    roles: Literal["nspt", "ntpt", "scl", "none"] = "nspt"
    """Contrast of rehearsed items: nspt, ntpt (negatives of the teacher), scl (no teacher), or none."""
    nspt_weight: float = 1.0
    """Factor of the contrast of rehearsed items, at least 0; its weight is this times old classes / (old + new classes)."""
    mm_weight: float = 0.1
    """Weight of the contrast of sounds and transcripts, at least 0; 0: none."""
    positives: Literal["class", "pair"] = "class"
    """Positives of the contrast of sounds and transcripts: all pairs of an item's class, or its own pair alone."""
    temperature: float = 0.1
    """Temperature of both contrasts, > 0."""
    text_width: int = 768
    """Width of the vectors of tokens; a transcript is their mean."""
    decoder_width: int = 768
    """Width of the decoder, a multiple of its heads."""
    decoder_depth: int = 6
    """Number of layers of the decoder."""
    decoder_heads: int = 8
    """Number of attention heads of the decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        self.need_weight("nspt_weight", "mm_weight")
        self.need_count("text_width", "decoder_width", "decoder_depth", "decoder_heads")
        if self.decoder_width % self.decoder_heads:
            raise CounterpointError(
                f"decoder_width must be a multiple of decoder_heads, got {self.decoder_width} and {self.decoder_heads}"
            )


class CoconutLearner(ClassStreamLearner):
    """Encoders of sounds and transcripts with heads for the contrasts, and a decoder or a classifier."""

    config: CoconutConfig

    def __init__(self, config: CoconutConfig, data: Any, seed: int = 0) -> None:
        sound, words = first_two(data.modalities)
        if data.modalities[sound]["kind"] == "text":
            sound, words = words, sound
        self.sound, self.words = sound, words
        super().__init__(config, data, sound, seed)
        classes = len(self.class_names)
        encoder: Any = self.encoders[sound]
        dim: int = encoder.dim
        if (frontend := getattr(getattr(encoder, "model", None), "feature_extractor", None)) is not None:
            frontend.requires_grad_(False)  # the convolutions of a pretrained network stay as they are
        if config.head == "classifier":
            self.task_head: nn.Linear | IntentWriter = nn.Linear(dim, classes)
            return
        if self.kinds[words] != "text":
            raise CounterpointError(
                f"the decoder writes texts, and {words} is a {self.kinds[words]}; use --head classifier"
            )
        tokenizer = Tokenizer.from_json(data.tokenizers[words])
        sizes = config.decoder_width, config.decoder_depth, config.decoder_heads
        self.task_head = IntentWriter(tokenizer, classes, dim, config.context, *sizes)

    def build_encoder(self, spec: Any, tokenizer: str | None) -> nn.Module:
        if spec["kind"] == "text" and tokenizer is not None:
            return TokenMean(Tokenizer.from_json(tokenizer).vocabulary, self.config.text_width)
        return super().build_encoder(spec, tokenizer)

    def heard(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [n, dim] of the sounds, their states [n, time, dim], and where the sound is [n, time]."""
        encoder: Any = self.encoders[self.sound]
        values = batch["inputs"][self.sound]
        if not isinstance(self.task_head, IntentWriter) or not hasattr(encoder, "states"):
            features = self.features(self.sound, values)
            return features, features[:, None], torch.ones(len(features), 1, dtype=torch.bool, device=features.device)
        states, there = encoder.states(values)
        return mean_state(states, there), states, there

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, labels = self.config, batch["label"]
        features, states, there = self.heard(batch)
        found = {"task": self.task_loss(batch, features, states, there)}
        rehearsal = self.is_rehearsal(labels)
        embedded = self.heads[self.sound](features)
        if config.mm_weight:
            rows = (~rehearsal & batch["present"][self.words]).nonzero().squeeze(1)
            text = self.projected(self.words, batch["inputs"][self.words])[rows]
            if place(len(rows), self.device).total:
                same = labels[rows] if config.positives == "class" else None
                found["mm"] = coconut_mm(embedded[rows], text, same, config.temperature)
        if config.roles != "none" and config.nspt_weight and self.phase and not config.joint:
            # SupCon takes no teacher.
            teacher = embedded.detach() if config.roles == "scl" else self.taught(batch)
            found["nspt"] = coconut_nspt(embedded, teacher, labels, rehearsal, config.temperature, config.roles)
        loss = found["task"] + config.mm_weight * found.get("mm", 0.0) + self.nspt_share() * found.get("nspt", 0.0)
        return {"loss": loss} | found

    def nspt_share(self) -> float:
        """Return the weight of NSPT: the share of old classes among the classes seen so far, times the setting (step 4)."""
        old = float((self.phase_of_class < self.reached).sum())
        return self.config.nspt_weight * old / float(self.seen.sum())

    def task_loss(self, batch: dict[str, Any], features: Tensor, states: Tensor, there: Tensor) -> Float[Tensor, ""]:
        """Compute the cross-entropy of the classes seen so far, or that of intents and transcripts (step 3)."""
        if not isinstance(self.task_head, IntentWriter):
            return global_mean(F.cross_entropy(self.class_logits(features), batch["label"], reduction="none"))
        (ids, mask), known = batch["inputs"][self.words], batch["present"][self.words]
        tokens, wanted, counted = self.task_head.targets(ids, mask, batch["label"], known)
        logits = self.task_head(tokens, states, there)
        return global_mean(F.cross_entropy(logits[counted], wanted[counted], reduction="none"))

    def class_logits(self, features: Tensor) -> Float[Tensor, "n classes"]:
        """Compute the logits of all classes; -inf for those not seen so far."""
        logits: Tensor = self.task_head(features)
        return logits.masked_fill(~self.seen, -torch.inf)

    def classified(self, batch: dict[str, Any]) -> Int[Tensor, " n"]:
        if isinstance(self.task_head, IntentWriter):
            return self.task_head.intents(self.task_head.written(*self.heard(batch)[1:]))
        return self.class_logits(self.sound_features(batch)).argmax(1)

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Add the errors of transcripts, of items of the classes seen so far."""
        found, writer = super().measures(survey, split), self.task_head
        if not isinstance(writer, IntentWriter):
            return found
        part, labels = survey.split(split), torch.from_numpy(self._labels(survey, split))
        known = torch.from_numpy(part.present(self.words, np.arange(len(part)))) & (labels >= 0)
        rows = (known & self.seen.cpu()[labels]).nonzero().squeeze(1).numpy()
        texts = [str(text) for text in part.column(self.words, rows)]
        if not texts:
            return found
        written = survey.over(split, lambda batch: writer.written(*self.heard(batch)[1:]), rows)
        return found | transcript_figures(writer.as_written(texts), writer.texts(written))

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [] if isinstance(self.task_head, IntentWriter) else super().row_wise()


# Settings for short sounds and few items, which replace the paper's.
LAPTOP: dict[str, Any] = {
    "phases": 5, "epochs": 15, "batch_size": 16, "lr": 1e-3 * 256 / 32, "weight_decay": 0.01, "warmup_epochs": 0, "memory": 4,
    "audio_encoder": "frames-s", "image_encoder": "mlp-s", "vector_encoder": "relu-128-128", "embedding": 64, "context": 16,
    "vocabulary": 300, "text_width": 64, "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4,
}  # fmt: skip

SYSTEM = System(
    slug="coconut", task="aligned", config=CoconutConfig, learner=CoconutLearner, data="spoken-words", recipe=LAPTOP
)
