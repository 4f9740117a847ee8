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

Departures: prototypes start with the main stage, after the frozen epochs. The graph has similarities, where the authors' script has
distances. In the last stage each process mixes its own images. By default texts are bags of words, not a language model's rows.
Not built: several labels a picture (the rule is `core.noisy_labels.judged_tags`), and measures of an open set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.distributed import batch_order, gather_rows, global_mean, mean_where, place
from counterpoint.core.memory import Queue
from counterpoint.core.mixing import draw_mix, mix
from counterpoint.core.noisy_labels import bootstrap_target, judged_labels
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.teacher import EMATeacher
from counterpoint.core.world import over_group
from counterpoint.data.images import ImageData
from counterpoint.data.shown import png
from counterpoint.encoders.text import check_text_encoder
from counterpoint.engine.loading import Batches, ChosenBatches
from counterpoint.engine.optim import optimisers
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.labelled import LAPTOP, LabelledConfig, LabelledLearner
from counterpoint.tasks.web_texts import embedded_texts, trusted_by_text, with_texts

SHOWN = 8  # pictures of the page

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
    if (
        queue.ndim != 2
        or len(queue) != low[1]
        or any(x is not None and x.shape != low for x in (prototypes, classifier_low))
    ):
        held = {"queue": queue, "classifier_low": classifier_low} | (
            {} if prototypes is None else {"prototypes": prototypes}
        )
        raise ValueError(
            f"queue must be [{low[1]}, keys], prototypes and classifier_low {list(low)}, got {shapes(**held)}"
        )

    # Instance contrast, with the queue before this batch enters.
    z_key, older = z_key.detach(), queue.detach().to(z.dtype)
    inst_logits = torch.cat([(z * z_key).sum(1, keepdim=True), z @ older], 1) / temperature
    loss_inst = global_mean(inst_logits.logsumexp(1) - inst_logits[:, 0])
    new = gather_rows(z_key)[-queue.shape[1] :]
    newer = torch.cat([new.T, older[:, len(new) :]], 1)

    # Labels.
    label, kept = labels, torch.ones_like(labels, dtype=torch.bool)
    g = None if prototypes is None else z @ prototypes.detach().to(z.dtype).T / temperature
    if clean and g is not None:
        score = alpha * logits.detach().softmax(1) + (1 - alpha) * g.detach().softmax(1)
        kept, label = judged_labels(score, labels, threshold, trusted.bool() if keep_trusted else None)

    # Terms of kept rows, with their corrected labels.
    cross = F.cross_entropy(logits_low, label, ignore_index=-1, reduction="none")
    target = None
    if prototypes is not None:
        keys, weight = newer.T, classifier_low.detach().to(z.dtype)
        of_prototypes = (keys @ prototypes.detach().to(z.dtype).T / temperature).softmax(1)
        soft = alpha * (keys @ weight.T).softmax(1) + (1 - alpha) * of_prototypes
        target = bootstrap_target(z.detach(), keys, soft)
        cross = (1 - beta) * cross - beta * (target * logits_low.log_softmax(1)).sum(1)
    losses = {
        "loss_cls": mean_where(F.cross_entropy(logits, label, ignore_index=-1, reduction="none"), kept),
        "loss_inst": loss_inst,
        "loss_lowdim": mean_where(cross, kept),
        "loss_reconstruct": mean_where(((reconstructed - feature.detach()) ** 2).mean(1), kept),
        "loss_proto": logits.new_zeros(()),
    }
    if g is not None:
        losses["loss_proto"] = mean_where(F.cross_entropy(g, label, ignore_index=-1, reduction="none"), kept)
    return losses | {
        "loss": torch.stack(list(losses.values())).sum(),
        "kept": kept,
        "new_label": label,
        "proto_logits_kept": None if g is None else g[kept],
        "bootstrap_target_kept": None if target is None else target[kept],
        "inst_logits": inst_logits,
        "prototypes_after": None
        if prototypes is None
        else moved_prototypes(prototypes, z, label, proto_momentum, order),
        "queue_after": newer.detach().to(queue.dtype),
    }


@torch.no_grad()
def moved_prototypes(
    prototypes: Float[Tensor, "classes low"],
    rows: Float[Tensor, "n low"],
    labels: Int[Tensor, " n"],
    momentum: float,
    order: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, "classes low"]:
    """Move prototypes by the rows of their classes, one after another, then normalise them.

    Args:
        prototypes: unit rows.
        rows, labels: rows in order, of all processes in rank order, and their classes; -1 for none.
        momentum: share of the prototype that stays at each row, 0 to 1.
        order: the gathered rows in the order to take. None (default): rank order.

    >>> moved_prototypes(torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.5)
    tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]])
    """
    rows, labels = gather_rows(rows.detach().to(prototypes.dtype)), gather_rows(labels)
    if order is not None:
        rows, labels = rows[order], labels[order]
    own = labels[:, None] == torch.arange(len(prototypes), device=labels.device)
    later = own.flip(0).cumsum(0).flip(0) - 1  # rows of this class that follow
    share = torch.where(own, (1 - momentum) * momentum ** later.clamp(min=0).to(rows.dtype), 0)
    stays = momentum ** own.sum(0).to(rows.dtype)
    return unit(stays[:, None] * prototypes + share.T @ rows)


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class CAProConfig(LabelledConfig):
    """Settings of CAPro. Defaults are those of the published code for WebVision1k."""

    epochs: int = 60
    """Passes of the main stage over the training images, those with a frozen encoder included."""
    warm_epochs: int = 120
    """Passes of the stage before it, without prototypes; at least 0."""
    frozen_epochs: int = 5
    """First passes of the main stage, with a frozen encoder and without prototypes; at least 0, below epochs."""
    clean_after: int = 10
    """Passes of the main stage before labels are judged, at least 0."""
    finetune_epochs: int = 15
    """Passes of the last stage, over the kept images under their corrected labels; 0: without it."""
    finetune_lr: float = 1e-4
    """Learning rate of the last stage at a batch of 256, > 0."""
    lr: float = 0.1
    recipe: str = "moco-v2"
    texts: str = ""
    """CSV with the columns file and text: the text of each training image. Default: those that come with the data."""
    definitions: str = ""
    """File of the classes' definitions: JSON {class: definition}, or a line for each class. Default: the data's, or names."""
    text_encoder: str = "words"
    """Embedding of texts: words (weighted by rarity), minilm, or hf:NAME."""
    objective: Literal["capro", "cross-entropy"] = "capro"
    """All terms, or the cross-entropy of the web labels alone, the baseline of the claim."""
    prototypes: Literal["text", "labels"] = "text"
    """Images that start the prototypes: those chosen by text, or all images of the class."""
    trusted: int = 50
    """Number of images of each class that texts choose."""
    graph_neighbours: int = 20
    """Visual neighbours that are ranked again, the image itself included."""
    graph_kept: int = 5
    """Neighbours of them that smooth a text, the image itself included."""
    self_weight: float = 0.0
    """Weight of an image's own text in its smoothed text, at least 0."""
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
    threshold: float = 0.6
    """Smallest score that corrects a label, 0 to 1."""
    proto_momentum: float = 0.999
    """Share of a prototype that stays at each image of its class, 0 to 1."""
    momentum_teacher: float = 0.999
    """Momentum of the key encoder at each step, 0 to 1."""
    mixup: float = 0.8
    """Both parameters of the Beta distribution of mixtures in the last stage, at least 0; 0: no mixtures."""

    counts: ClassVar[tuple[str, ...]] = (
        *LabelledConfig.counts, "trusted", "graph_neighbours", "graph_kept", "projection", "hidden", "queue",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.warm_epochs, self.frozen_epochs, self.clean_after, self.finetune_epochs) < 0:
            raise CounterpointError("warm_epochs, frozen_epochs, clean_after and finetune_epochs must not be negative")
        if self.frozen_epochs >= self.epochs:
            raise CounterpointError(f"frozen_epochs ({self.frozen_epochs}) must be below epochs ({self.epochs})")
        if self.queue < self.batch_size:
            raise CounterpointError(f"queue ({self.queue}) must not be smaller than batch_size ({self.batch_size})")
        for name in ("alpha", "beta", "threshold", "proto_momentum", "momentum_teacher"):
            if not 0 <= getattr(self, name) <= 1:
                raise CounterpointError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not (self.temperature > 0 and self.finetune_lr > 0 and self.self_weight >= 0 and self.mixup >= 0):
            raise CounterpointError(
                "temperature and finetune_lr must be > 0, self_weight and mixup at least 0, got "
                f"{self.temperature}, {self.finetune_lr}, {self.self_weight} and {self.mixup}"
            )
        if self.prototypes not in ("text", "labels"):
            raise CounterpointError(f"prototypes must be text or labels, got {self.prototypes!r}")
        if self.objective not in ("capro", "cross-entropy"):
            raise CounterpointError(f"objective must be capro or cross-entropy, got {self.objective!r}")

    def check(self) -> None:
        super().check()
        if self.text_encoder != "words":
            check_text_encoder(self.text_encoder)

    def facts(self, data: ImageData) -> dict[str, Any]:
        if self.prototypes == "text" and data.texts is None:
            raise DataError(
                f"{data.name} has no texts; give --texts FILE (CSV with the columns file and text), or use --prototypes labels"
            )
        return super().facts(data)


# ------------------------------------------------------------------------------------------------------------- the learner


def start_layer(module: nn.Module) -> None:
    """Draw a linear layer's weights by He et al. (arXiv 1502.01852), and set its biases to 0.01, as the authors do.

    PyTorch's own smaller weights leave all z nearly parallel for hundreds of steps, and prototypes then judge no label.
    """
    if isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight)
        if module.bias is not None:
            nn.init.constant_(module.bias, 0.01)


class CAPro(LabelledLearner):
    """An encoder with its momentum copy, two classifiers, prototypes, and a table of judged labels by position."""

    crops: ClassVar[int] = 2
    config: CAProConfig
    prototype_rows: Float[Tensor, "classes low"]
    trusted: Bool[Tensor, " examples"]
    judged: Int[Tensor, " examples"]
    history: Int[Tensor, "epochs 4"]

    def __init__(self, config: CAProConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        dim, low, classes = self.encoder.dim, config.projection, data.classes
        self.classifier = nn.Linear(dim, classes, bias=False)
        self.classifier_low = nn.Linear(low, classes, bias=False)
        self.projector, self.reconstructor = (
            nn.Sequential(nn.Linear(a, config.hidden), nn.ReLU(), nn.Linear(config.hidden, b))
            for a, b in ((dim, low), (low, dim))
        )
        for head in (self.classifier, self.classifier_low, self.projector, self.reconstructor):
            head.apply(start_layer)
        self.teacher = EMATeacher(self.encoder)
        self.queue = Queue(config.queue, low, seed=seed)
        self.register_buffer("prototype_rows", torch.zeros(classes, low))
        self.register_buffer("trusted", torch.zeros(data.examples, dtype=torch.bool))
        # The last judgement of each image: a class, -1 removed, -2 not judged yet.
        self.register_buffer("judged", torch.full((data.examples,), -2))
        # Numbers of images kept, corrected, removed, and under a true label, after each epoch of the main stage.
        self.register_buffer("history", torch.full((config.epochs, 4), -1))

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        main = config.epochs - config.frozen_epochs
        rest = [self.classifier, self.classifier_low, self.projector, self.reconstructor]
        found = [
            Stage("warm-up", config.warm_epochs),
            Stage("frozen encoder", config.frozen_epochs, trains=lambda: rest),
            Stage("main", main, enter=self._match),
            Stage("fine-tuning", config.finetune_epochs, turns=self._fine_turns, batches=self._kept, enter=self._clean),
        ]
        return [stage for stage in found if stage.epochs]

    @property
    def stage(self) -> str:
        """Name of the current stage."""
        return self.stages()[self.position.stage].name

    def _match(self, survey: Survey) -> None:
        """Choose images by text, and start the prototypes with the mean of their keys."""
        config, labels = self.config, survey.labels
        assert labels is not None
        if config.prototypes == "text":
            texts = survey.texts
            rows = embedded_texts(config.text_encoder, [*texts.train, *texts.definitions])
            features = survey.over("train", lambda batch: self.encoder(batch["image"]))
            chosen = trusted_by_text(
                features.float(), rows[: len(features)], rows[len(features) :], labels,
                top=config.trusted, neighbours=config.graph_neighbours, kept=config.graph_kept,
                self_weight=config.self_weight,
            )  # fmt: skip
            self.trusted.copy_(chosen)
            first = chosen
        else:
            first = labels >= 0
        keys = survey.over("train", lambda batch: unit(self.projector(self.teacher(batch["image"])))).float()
        total = torch.zeros(self.prototype_rows.shape).index_add_(0, labels[first], keys[first])
        self.prototype_rows.copy_(unit(total))

    def _clean(self, survey: Survey) -> None:
        """Judge the labels of all images once, for the last stage."""
        labels = survey.labels
        assert labels is not None
        score = survey.over("train", self._score)
        if self.config.objective == "cross-entropy":
            self.judged.copy_(labels)
            return
        known = labels >= 0
        found = torch.full_like(labels, -1)
        found[known] = judged_labels(
            score[known], labels[known], self.config.threshold, self.trusted.cpu()[known]
        ).label
        if not (found >= 0).any():
            self.warnings.append("no label is kept, so the last stage has all labels; lower --threshold")
            found = labels
        self.judged.copy_(found)

    def _score(self, batch: dict[str, Any]) -> Tensor:
        config, feature = self.config, self.encoder(batch["image"])
        near = unit(self.projector(feature)) @ self.prototype_rows.T / config.temperature
        return config.alpha * self.classifier(feature).softmax(1) + (1 - config.alpha) * near.softmax(1)

    def _kept(self, survey: Survey) -> Batches:
        rows = np.flatnonzero(self.judged.cpu().numpy()[survey.rows] >= 0)
        return ChosenBatches(rows, self.config.batch_size, max(1, len(rows) // self.config.batch_size))

    def _fine_turns(self) -> list[Turn]:
        config, trained = self.config, [self.encoder, self.classifier]
        given = trained, self.epochs, config.batch_size
        return [optimisers(config, *given, steps_per_epoch=self.steps_per_epoch, rate=config.finetune_lr / config.lr)]

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        found = super().prepare(batch, generator)
        if self.stage != "fine-tuning":
            return found
        # A process mixes its own images; the share is the same on all.
        draw = draw_mix(len(batch["image"]), self.config.mixup, generator)
        return found | {"mix": draw}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, stage, (weak, strong) = self.config, self.stage, batch["views"]
        if stage == "fine-tuning":
            return {"loss": self._mixed_loss(weak, self.judged[batch["index"]], batch["mix"])}
        main, plain = stage == "main", config.objective == "cross-entropy"
        if stage != "frozen encoder":
            self.teacher.update(self.encoder, config.momentum_teacher)
        feature = self.encoder(weak)
        z = unit(self.projector(feature))
        with torch.no_grad():
            z_key = unit(self.projector(self.teacher(strong)))
        step = capro_step(
            self.classifier(feature),
            z,
            z_key,
            self.classifier_low(z),
            feature,
            self.reconstructor(z.detach() if main else z),
            batch["label"],
            self.trusted[batch["index"]],
            self.queue.rows.roll(-int(self.queue.pointer), 0).T,
            self.prototype_rows.clone() if main else None,  # moved below, before the backward pass
            self.classifier_low.weight,
            config.alpha,
            config.threshold,
            config.beta,
            config.temperature,
            config.proto_momentum,
            main and not plain and self.position.epoch + config.frozen_epochs >= config.clean_after,
            order=batch_order(place(len(z), z.device).total).argsort().to(z.device),
        )
        self.queue.write(z_key)
        if main:
            self.prototype_rows.copy_(step["prototypes_after"])
            self.judged[gather_rows(batch["index"])] = gather_rows(step["new_label"])
        kept = global_mean(step["kept"].to(z.dtype))
        losses = {name: value for name, value in step.items() if name.startswith("loss")} | {"kept": kept}
        return losses | ({"loss": losses["loss_cls"]} if plain else {})

    def _mixed_loss(self, images: Tensor, labels: Tensor, drawn: Any) -> Tensor:
        """Compute the cross-entropy of mixtures of two images."""
        logits = self.classifier(
            self.encoder(mix(images, drawn.permutation.to(images.device), drawn.lam.to(images.device)))
        )
        share = drawn.lam.to(images.device)
        partner = labels[drawn.permutation.to(images.device)]
        own, other = (F.cross_entropy(logits, label, reduction="none") for label in (labels, partner))
        return global_mean(share * own + (1 - share) * other)

    def end_epoch(self, epoch: int) -> None:
        """Count the judgements of the main stage."""
        assert self.survey is not None
        labels = self.survey.labels
        if self.stage == "main" and labels is not None:
            judged, truth = self.judged.cpu(), self.survey.known("train").get("truth", torch.full_like(labels, -2))
            seen = judged > -2
            kept, same = seen & (judged >= 0), judged == labels
            parts = (kept & same, kept & ~same, seen & ~kept, kept & (judged == truth))
            self.history[epoch + self.config.frozen_epochs] = torch.tensor([int(part.sum()) for part in parts])

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the judged labels where the true classes of training images are known."""
        truth, labels, judged = survey.known("train").get("truth"), survey.labels, self.judged.cpu()
        kept = judged >= 0
        if truth is None or labels is None or not kept.any():
            return {}  # before the main stage
        first = self.trusted.cpu() if self.config.prototypes == "text" else labels >= 0
        precision = {"label_precision": (judged == truth)[kept], "start_precision": (labels == truth)[first]}
        found = {name: float(right.double().mean()) for name, right in precision.items()}
        return found | {"kept_share": float(kept.double().mean())}

    # --- the page

    @torch.no_grad()
    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show what became of the labels over the epochs, and pictures whose labels changed."""
        labels, history, truth = survey.labels, self.history.cpu(), survey.known("train").get("truth")
        at = (history[:, 0] >= 0).nonzero()[:, 0]
        if labels is None or not len(at):
            return super().figures(survey)
        names = ("kept", "corrected", "removed", *(("kept or corrected, and right",) if truth is not None else ()))
        total = history[at, :3].sum(1).clamp(min=1)
        series = {name: [(at + 1).tolist(), (history[at, n] / total).tolist()] for n, name in enumerate(names)}
        caption = (
            "Share of the training images by the last judgement of their label, after each epoch of the main stage."
        )
        curves = {"kind": "curves", "series": series, "xlabel": "epoch", "caption": caption}
        judged, split, classes = self.judged.cpu(), survey.split("train"), survey.classes
        rows = []
        for chosen in ((judged >= 0) & (judged != labels), judged == -1):
            some = chosen.nonzero()[:, 0][:SHOWN].numpy()
            cells = []
            for n, picture in zip(some.tolist(), split.images(some), strict=True):
                became = classes[judged[n]] if judged[n] >= 0 else "removed"
                real = "" if truth is None else f"; true: {classes[truth[n]] if truth[n] >= 0 else 'none'}"
                larger = -(-48 // len(picture))
                cells.append(
                    {
                        "png": png(picture.repeat(larger, 0).repeat(larger, 1)),
                        "text": f"{classes[labels[n]]}: {became}{real}",
                    }
                )
            if cells:
                rows.append({"cells": cells})
        seen = {
            "kind": "captioned",
            "rows": rows,
            "caption": "Web label and judgement; corrected labels first, then removed ones.",
        }
        return super().figures(survey) | {"Labels over the epochs": curves} | ({"Judged labels": seen} if rows else {})


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
    recipes={"query-digits": SMALL | {"encoder": "mlp-s", "recipe": "digits-plain"}},
    recipe=SMALL,
    source=with_texts,
)
