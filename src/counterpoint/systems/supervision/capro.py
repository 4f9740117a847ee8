r"""CAPro: learn classes from web pictures, whose labels are often wrong, with prototypes that texts choose.

Qin, Chen, Chen, Shen et al.: "CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes", NeurIPS 2023, arXiv
2310.09761. Code: github.com/yuleiqin/capro (no licence).

    q, z, z'       features of the encoder; unit rows of projector P; unit rows of the momentum encoder and P, of another view
    A, A', R       classifier of q; classifier of z; reconstruction of q from z
    Q, c_k         queue of keys z'; unit prototype of class k; T: temperature

    L_cls   = CE(A(q), y)                      L_inst = -log softmax([z . z', z . Q] / T)_0, with Q before this batch enters
    L_low   = (1 - beta) CE(A'(z), y) - beta sum_k b_k log softmax(A'(z))_k
    b       = mean over u in Q, this batch included, of a softmax(A'(u)) + (1 - a) softmax(u . c / T), weighted by max(z . u, 0)
    L_proto = CE(z . c / T, y)                 L_rec  = mean (R(z) - q)^2
    s       = a softmax(A(q)) + (1 - a) softmax(z . c / T): keeps, corrects or removes y (`core.noisy_labels.judged_labels`)
    c_y    <- m c_y + (1 - m) z for each kept row in order; then unit rows

Rows that are removed count in L_inst alone. Texts enter once, before the main stage: each picture's text is averaged over its
visual neighbours (`core.neighbours`). The pictures whose text is nearest to their class's definition start the prototypes.

Where a picture may have several labels, each class has its own projector of z, and two prototypes
(`core.tag_prototypes.capro_tags_step`).

Departures: prototypes start with the main stage, after the frozen epochs. The graph has similarities, where the authors' script has
distances. In the last stage each process mixes its own images. By default texts are bags of words, not a language model's rows.
With several labels, the authors also trust the pictures whose texts are farthest from a definition. Here these are not trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.distributed import batch_order, gather_rows, global_mean, mean_where, place
from counterpoint.core.memory import Queue
from counterpoint.core.noisy_labels import bootstrap_target, class_scores, judged_labels
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.prototypes import moved_prototypes
from counterpoint.core.tag_prototypes import TagHeads, capro_tags_step, queue_contrast, tag_losses, tag_scores, tag_sums
from counterpoint.core.teacher import EMATeacher
from counterpoint.core.world import over_group
from counterpoint.encoders.simple import start_layer
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.judged import JudgedConfig, JudgedLearner
from counterpoint.tasks.labelled import LAPTOP
from counterpoint.tasks.web_texts import with_found

# ------------------------------------------------------------------------------------------------------------ the equations


@over_group
@full_precision(keep=("queue", "prototypes"))
def capro_step(
    logits: Float[Tensor, "n classes"],
    z: Float[Tensor, "n low"],
    z_key: Float[Tensor, "n low"],
    logits_low: Float[Tensor, "n classes"],
    feature: Float[Tensor, "n dim"],
    reconstructed: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    trusted: Bool[Tensor, " n"] | Int[Tensor, " n"],
    queue: Float[Tensor, "low keys"],
    prototypes: Float[Tensor, "classes low"] | None,
    classifier_low: Float[Tensor, "classes low"],
    alpha: float = 0.5,
    threshold: float = 0.6,
    beta: float = 0.1,
    temperature: float = 0.1,
    proto_momentum: float = 0.999,
    clean: bool = True,
    keep_trusted: bool = True,
    order: Int[Tensor, " rows"] | None = None,
) -> dict[str, Any]:
    r"""Compute the losses of a step, judge its labels, and move queue and prototypes, by the module's equations.

    Args:
        logits: A(q).
        z, z_key: unit rows of the two views, the second without gradient.
        logits_low: A'(z).
        feature, reconstructed: q, which gets no gradient here, and R(z).
        labels: web labels, 0 to classes - 1.
        trusted: True or 1 where the text chose the row for its class.
        queue: older keys as unit columns, the oldest first.
        prototypes: unit rows; a class without a prototype is a row of zeros. None: warm-up, without L_proto and soft labels.
        classifier_low: weights of A', for the queue's soft labels; no gradient.
        alpha: share a of the classifier beside the prototypes, 0 to 1, by default 0.5.
        threshold: smallest score that corrects a label, 0 to 1, by default 0.6.
        beta: share of the soft labels in L_low, 0 to 1, by default 0.1.
        temperature: T > 0, by default 0.1.
        proto_momentum: m, 0 to 1, by default 0.999.
        clean: whether labels are judged (default); False: all rows are kept.
        keep_trusted: whether trusted rows always keep their label (default).
        order: across processes, the gathered rows in the order in which they move prototypes. None (default): rank order.

    Returns the losses `loss_cls`, `loss_inst`, `loss_lowdim`, `loss_reconstruct`, `loss_proto` and `loss`, their sum; `kept`
    [n] and `new_label` [n], -1 where removed; `proto_logits_kept` and `bootstrap_target_kept`, of kept rows; `inst_logits`
    [n, 1 + keys]; `prototypes_after` and `queue_after`. In warm-up the prototypes' entries are None, and L_proto is 0.

    Means run over the kept rows of all processes; a mean of no row is 0. Prototypes move by the rows of all processes.
    Raises ValueError for shapes that do not fit, an empty batch and numbers out of range.
    """
    need_alike("n low", z=z, z_key=z_key)
    need_alike("n classes", logits=logits, logits_low=logits_low)
    need_alike("n dim", feature=feature, reconstructed=reconstructed)
    need_positive(temperature=temperature)
    need_within(0, 1, alpha=alpha, threshold=threshold, beta=beta, proto_momentum=proto_momentum)
    n, classes = logits.shape
    if any(len(rows) != n for rows in (z, feature, labels, trusted)) or labels.ndim != 1 or trusted.ndim != 1:
        given = {"logits": logits, "z": z, "feature": feature, "labels": labels, "trusted": trusted}
        raise ValueError(f"every row needs z, feature, label and trusted, got {shapes(**given)}")
    low = (classes, z.shape[1])
    held = {"classifier_low": classifier_low} | ({} if prototypes is None else {"prototypes": prototypes})
    if queue.ndim != 2 or len(queue) != low[1] or any(x.shape != low for x in held.values()):
        said = shapes(queue=queue, **held)
        raise ValueError(f"queue must be [{low[1]}, keys], prototypes and classifier_low {list(low)}, got {said}")

    loss_inst, inst_logits, newer = queue_contrast(z, z_key, queue, temperature)

    # Labels.
    label, kept = labels, torch.ones_like(labels, dtype=torch.bool)
    g = None if prototypes is None else z @ prototypes.detach().to(z.dtype).T / temperature
    if clean and g is not None:
        score = class_scores(logits.detach(), g.detach(), alpha)
        kept, label = judged_labels(score, labels, threshold, trusted.bool() if keep_trusted else None)

    # Terms of kept rows, with their corrected labels.
    log_low = logits_low.log_softmax(1)
    cross = F.nll_loss(log_low, label, ignore_index=-1, reduction="none")
    target, after, proto = None, None, torch.zeros_like(cross)
    if prototypes is not None and g is not None:
        keys, weight = newer.T, classifier_low.detach().to(z.dtype)
        of_prototypes = (keys @ (prototypes.detach().to(z.dtype).T / temperature)).softmax(1)
        soft = (keys @ weight.T).softmax(1).mul_(alpha).add_(of_prototypes, alpha=1 - alpha)
        target = bootstrap_target(z.detach(), keys, soft)
        cross = (1 - beta) * cross - beta * (target * log_low).sum(1)
        proto = F.cross_entropy(g, label, ignore_index=-1, reduction="none")
        after = moved_prototypes(prototypes, z, label, proto_momentum, order)
    losses = {
        "loss_cls": mean_where(F.cross_entropy(logits, label, ignore_index=-1, reduction="none"), kept),
        "loss_inst": loss_inst,
        "loss_lowdim": mean_where(cross, kept),
        "loss_reconstruct": mean_where(((reconstructed - feature.detach()) ** 2).mean(1), kept),
        "loss_proto": mean_where(proto, kept),
    }
    return losses | {
        "loss": torch.stack(list(losses.values())).sum(),
        "kept": kept,
        "new_label": label,
        "proto_logits_kept": None if g is None else g[kept],
        "bootstrap_target_kept": None if target is None else target[kept],
        "inst_logits": inst_logits,
        "prototypes_after": after,
        "queue_after": newer.to(queue.dtype),
    }


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class CAProConfig(JudgedConfig):
    """Settings of CAPro. Defaults are those of the published code for WebVision1k."""

    warm_epochs: int = 120
    """Passes of the stage before the main one, without prototypes; at least 0."""
    objective: Literal["capro", "cross-entropy"] = "capro"
    """capro: all terms. cross-entropy: that of the web labels alone, the baseline of the claim."""
    prototypes: Literal["text", "labels"] = "text"
    """Images that start the prototypes. text: those that texts choose. labels: all images of the class."""
    projection: int = 128
    """Width of z."""
    hidden: int = 2048
    """Width of the hidden layers of projector and reconstructor."""
    queue: int = 8192
    """Number of keys of earlier batches, at least batch_size."""
    temperature: float = 0.1
    """Temperature of both contrasts, > 0."""
    alpha: float = 0.5
    """Share of the classifier beside the prototypes in scores and soft labels, 0 to 1."""
    beta: float = 0.1
    """Share of the soft labels in the loss of the low-dimensional classifier, 0 to 1."""
    proto_momentum: float = 0.999
    """Share of a prototype that stays at each image of its class, 0 to 1."""
    momentum_teacher: float = 0.999
    """Momentum of the key encoder at each step, 0 to 1."""

    counts: ClassVar[tuple[str, ...]] = (*JudgedConfig.counts, "projection", "hidden", "queue")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_weight("warm_epochs")
        if self.queue < self.batch_size:
            raise CounterpointError(f"queue ({self.queue}) must not be smaller than batch_size ({self.batch_size})")
        self.need_share("alpha", "beta", "proto_momentum", "momentum_teacher")
        self.need_positive("temperature")

    @property
    def needs_texts(self) -> bool:
        return self.prototypes == "text"


# ------------------------------------------------------------------------------------------------------------- the learner


class CAPro(JudgedLearner):
    """An encoder with its momentum copy, two classifiers, prototypes, and a table of judged labels by position."""

    config: CAProConfig
    prototype_rows: Float[Tensor, "classes ... low"]

    def __init__(self, config: CAProConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        dim, low, classes = self.encoder.dim, config.projection, data.classes
        self.classifier = nn.Linear(dim, classes, bias=False)
        self.classifier_low: Any = TagHeads(low, classes) if self.several else nn.Linear(low, classes, bias=False)
        self.projector, self.reconstructor = (
            nn.Sequential(nn.Linear(a, config.hidden), nn.ReLU(), nn.Linear(config.hidden, b))
            for a, b in ((dim, low), (low, dim))
        )
        for head in (self.classifier, self.classifier_low, self.projector, self.reconstructor):
            head.apply(start_layer)
        self.teacher = EMATeacher(self.encoder)
        self.queue = Queue(config.queue, low, seed=seed)
        self.register_buffer("prototype_rows", torch.zeros(*((classes, 2) if self.several else (classes,)), low))
        self.register_buffer("present_weight", torch.ones(classes))
        self.present_weight: Tensor

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.several:
            present = 1 + self.given(survey).sum(0)  # the authors count one more, so that no weight is infinite
            self.present_weight.copy_(((survey.examples - present).clamp(min=0) / present).sqrt())

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        main = config.epochs - config.frozen_epochs
        rest = [self.classifier, self.classifier_low, self.projector, self.reconstructor]
        last: dict[str, Any] = {"turns": self.fine_turns, "batches": self.kept_batches, "enter": self.judge}
        found = [
            Stage("warm-up", config.warm_epochs),
            Stage("frozen encoder", config.frozen_epochs, trains=lambda: rest),
            Stage("main", main, enter=self._match),
            Stage("fine-tuning", config.finetune_epochs, **last),
        ]
        return [stage for stage in found if stage.epochs]

    def _match(self, survey: Survey) -> None:
        """Choose images by text, and start the prototypes with the mean of their keys."""
        labels = self.given(survey)
        first = self.trust(survey) if self.config.prototypes == "text" else labels >= 0
        keys = survey.over("train", lambda batch: unit(self.projector(self.teacher(batch["image"])))).float()
        if self.several:
            total = tag_sums(self.classifier_low, keys, first, labels)
        else:
            total = torch.zeros(self.prototype_rows.shape).index_add_(0, labels[first], keys[first])
        self.prototype_rows.copy_(unit(total))

    def score(self, batch: dict[str, Any]) -> Tensor:
        config, feature = self.config, self.encoder(batch["image"])
        z, logits = unit(self.projector(feature)), self.classifier(feature)
        if self.several:
            near = torch.einsum("nkl,ktl->nkt", self.classifier_low.project(z), self.prototype_rows)
            return tag_scores(logits, near / config.temperature, config.alpha)
        return class_scores(logits, z @ self.prototype_rows.T / config.temperature, config.alpha)

    # --- a step

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, stage, index, (weak, strong) = self.config, self.stage_name, batch["index"], batch["views"]
        if stage == "fine-tuning":
            return {"loss": self.mixed_loss(weak, self.judged[index], batch["mix"])}
        main, plain = stage == "main", config.objective == "cross-entropy"
        if stage != "frozen encoder":
            self.teacher.update(self.encoder, config.momentum_teacher)
        feature = self.encoder(weak)
        z = unit(self.projector(feature))
        with torch.no_grad():
            z_key = unit(self.projector(self.teacher(strong)))
        common: dict[str, Any] = {
            "logits": self.classifier(feature),
            "z": z,
            "z_key": z_key,
            "feature": feature,
            "reconstructed": self.reconstructor(z.detach() if main else z),
            "trusted": self.trusted[index],
            "queue": self.queue.rows.roll(-int(self.queue.pointer), 0).T,
            "prototypes": self.prototype_rows.clone() if main else None,  # moved below, before the backward pass
            "clean": main and not plain and self.position.epoch + config.frozen_epochs >= config.clean_after,
            "order": batch_order(place(len(z), z.device).total).argsort().to(z.device),
        } | {name: getattr(config, name) for name in ("alpha", "threshold", "beta", "temperature", "proto_momentum")}
        if self.several:
            assert self.survey is not None
            tags = self.given(self.survey)[index.cpu()].to(z.device)
            step = capro_tags_step(tags=tags, heads=self.classifier_low, present_weight=self.present_weight, **common)
        else:
            weight = self.classifier_low.weight
            step = capro_step(labels=batch["label"], logits_low=self.classifier_low(z), classifier_low=weight, **common)
        self.queue.write(z_key)
        if main:
            self.prototype_rows.copy_(step["prototypes_after"])
            self.judged[gather_rows(index)] = gather_rows(step["new_label"])
        losses = {name: value for name, value in step.items() if name.startswith("loss")}
        losses |= {"kept": global_mean(step["kept"].to(z.dtype))}
        return losses | ({"loss": losses["loss_cls"]} if plain else {})

    def each_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.several:
            return super().each_loss(logits, labels)
        return torch.where(labels >= 0, tag_losses(logits, labels, self.present_weight), 0).mean(1)


# Settings for a small set of small pictures on a few cores.
SMALL: dict[str, Any] = LAPTOP | {
    "recipe": "weak",
    "lr": 0.1,
    "warm_epochs": 10,
    "epochs": 20,
    "frozen_epochs": 0,
    "clean_after": 2,
    "finetune_epochs": 5,
    "finetune_lr": 0.01,
    "projection": 32,
    "hidden": 128,
    "queue": 512,
    "trusted": 15,
    "proto_momentum": 0.99,
    "momentum_teacher": 0.99,
    "self_weight": 1.0,
}

SYSTEM = System(
    slug="capro",
    task="labelled",
    config=CAProConfig,
    learner=CAPro,
    data="query-digits",
    recipes={
        "query-digits": SMALL | {"encoder": "mlp-s", "recipe": "digits-plain"},
        "query-canvases": SMALL | {"encoder": "conv-fine", "recipe": "obow-canvases", "threshold": 0.9},
    },
    recipe=SMALL,
    source=with_found,
)
