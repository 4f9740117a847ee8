"""WSCoL: adapt a classifier of regions to a new domain without source data; weak views label the contrast of strong views.

Yang, Tang, Zhang, Li, Ye, Zhang, Zhu: "Rethinking Weak-to-Strong Augmentation in Source-Free Domain Adaptive Object
Detection", arXiv 2410.05557 (version 1; version 3 names the method WSCo).

    symbol      here               meaning
    M, m, z     mapper             network that maps region features to the shared space: m(x), and z(x) for the contrast
    g           pooled             spatial mean of a region's feature map
    P           probabilities      softmax of the teacher's logits over C classes and the background (number C)
    p_c         prototypes         mean of z over the memory of class c, moved by eta at each step
    rho         progress           share of the first epoch that is done
    H           hard_positive      far positives: alike in label, but not among the nearest in the weak view
    U           uncertainty        variance of the number of proposals that survive NMS, over its thresholds
    tau         temperature        0.07

Stage `source` trains encoder and classifier on labelled regions. Stage `adapt` sees regions of the target without their labels:
the student learns on strong views what its moving average, the teacher, predicts on weak views. The clustering is in
core/centroids.py, contrast, H and U are in core/proposals.py, L_grad is in core/gradients.py.

Differences from the authors' code: the detector's proposals, RPN loss and box loss are not built. Proposals come with the
data, and the detection loss is the classification of all of a picture's proposals. Each region is cropped from its picture,
then encoded. The frozen batch normalisation of the mapping network is the identity, and left out. With several pictures in a
batch all of them enter the memory before the prototypes move. Means over an empty set are 0, not NaN. Region features of a
detector of torchvision are not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.centroids import plain_clustering, prototype_clustering
from counterpoint.core.distributed import gather_rows, global_mean, mean_of_total
from counterpoint.core.gradients import gradient_discrepancy
from counterpoint.core.operands import unit
from counterpoint.core.proposals import (
    Pseudo,
    hard_positive_mask,
    proposal_distillation,
    proposal_variance,
    pseudo_boxes,
    weak_guided_contrast,
)
from counterpoint.encoders.regions import drawn_regions
from counterpoint.engine.survey import Survey
from counterpoint.systems.base import System
from counterpoint.tasks.measures import cosine_between_classes
from counterpoint.tasks.source_free import SourceFreeConfig, SourceFreeLearner
from counterpoint.views.images import normalise

# ---------------------------------------------------------------------------------------------------------- the learner


@dataclass
class WSCoLConfig(SourceFreeConfig):
    """Settings of WSCoL. Defaults are those of the authors' script for ResNet-50."""

    pseudo_threshold: float = 0.9
    """Least probability of a pseudo box, 0 to 1; pictures without a pseudo box are skipped."""
    contrast: Literal["none", "teacher", "clusters", "truth"] = "clusters"
    """Labels of the contrast: teacher (its classes), clusters (the method), or truth (the target's true classes, an upper bound
    that uses labels). none: no contrast, a mean teacher."""
    contrast_weight: float = 0.5
    """Weight of the contrast, at least 0."""
    temperature: float = 0.07
    """Temperature of the contrast, > 0."""
    hard_positives: bool = True
    """Leave far positives, alike in label but not among the nearest in the weak view, to a loss of weight `alpha`."""
    alpha: float = 0.0
    """Weight of the far positives' own loss, 0 to 1."""
    rounds: int = 4
    """Rounds of the clustering around prototypes, at least 1."""
    plain_rounds: int = 2
    """Rounds of the plain clustering in the first epoch, from which labels slide over to prototypes; 0: prototypes alone."""
    eta: float = 0.4
    """Share of a prototype that a step replaces, 0 to 1."""
    memory: int = 10
    """Regions of each class in the memory, at least 1."""
    uncertainty: float = 20.0
    """Greatest variance U of the proposals with which the background joins the contrast, at least 0."""
    distil_weight: float = 1.0
    """Weight of the divergence from the teacher, at least 0."""
    instance_weight: float = 0.01
    """Weight of L_inst, the contrast of a region's weak and strong view, at least 0."""
    gradient_weight: float = 0.1
    """Weight of L_grad, the agreement of gradients of both views, at least 0."""

    counts = (*SourceFreeConfig.counts, "rounds", "memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        self.need_share("pseudo_threshold", "alpha", "eta")
        self.need_weight(
            "contrast_weight", "distil_weight", "instance_weight", "gradient_weight", "uncertainty", "plain_rounds"
        )


class WSCoL(SourceFreeLearner):
    """A student, its teacher, the memory of regions and the prototypes."""

    bank: Tensor
    filled: Tensor
    prototypes: Tensor
    seen: Tensor

    def __init__(self, config: WSCoLConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        config = self.config
        encoder = self.student.encoder
        maps = torch.zeros(self.classes, config.memory, encoder.dim, encoder.side, encoder.side)
        self.register_buffer("bank", maps)  # teacher features at pseudo boxes, the oldest first
        self.register_buffer("filled", torch.zeros(self.classes, dtype=torch.long))
        self.register_buffer("prototypes", torch.zeros(self.classes, config.projection))
        self.register_buffer("seen", torch.zeros(self.classes, dtype=torch.bool))

    # --- a step

    def on_target(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the sum of all losses, the mean over the pictures with a pseudo box."""
        config, student, teacher = self.config, self.student, self.taught
        student.encoder.eval()  # the detector's batch normalisation is frozen
        pictures, count = batch["label"].shape
        weak_views, strong_views = batch["views"]
        with torch.no_grad():
            weak = teacher.encoder(weak_views)
            logits = teacher.logits(weak)
        maps = student.encoder(strong_views)
        own = None
        if config.instance_weight or config.gradient_weight:
            own = student.encoder(weak_views).unflatten(0, (pictures, count))
        weak, maps, logits = (part.unflatten(0, (pictures, count)) for part in (weak, maps, logits))
        pseudo = [pseudo_boxes(logits[n], batch["boxes"][n], config.pseudo_threshold) for n in range(pictures)]
        if config.contrast == "clusters":
            self.remember(weak, pseudo)
        names = ("detection", "distil", "contrast", "instance", "gradient")
        weights = (1.0, config.distil_weight, config.contrast_weight, config.instance_weight, config.gradient_weight)
        sums = [maps.sum() * 0.0] * len(names)
        used = 0
        for n, found in enumerate(pseudo):
            if not len(found.boxes):
                continue
            used += 1
            guess = student.logits(maps[n])
            target = torch.full((count,), self.classes, device=guess.device)
            target[found.fg_index] = found.fg_labels
            # The losses of a picture are its process's own: none of them gathers rows.
            parts = [F.cross_entropy(guess, target), proposal_distillation(guess, logits[n])]
            parts.append(self.contrast(n, batch, weak[n], maps[n], logits[n], found))
            parts += self.aligned(None if own is None else own[n], maps[n], found)
            sums = [a + b for a, b in zip(sums, parts, strict=True)]
        whole = int(gather_rows(torch.tensor([used], device=self.device)).sum())
        means = [mean_of_total(total, max(1, whole)) for total in sums]
        loss = torch.stack([weight * mean for weight, mean in zip(weights, means, strict=True)]).sum()
        rows = torch.tensor([float(len(found.boxes)) for found in pseudo], device=self.device)
        told = {name: mean.detach() for name, mean in zip(names, means, strict=True)}
        return {"loss": loss, **told, "pseudo_boxes": global_mean(rows)}

    @torch.no_grad()
    def remember(self, weak: Float[Tensor, "pictures n dim h w"], pseudo: Sequence[Pseudo]) -> None:
        """Append the teacher's features at the pseudo boxes of all processes to the memory, and move the prototypes."""
        classes = torch.full(weak.shape[:2], -1, device=weak.device)
        for n, found in enumerate(pseudo):
            classes[n, found.boxes] = found.classes
        weak, classes = self.whole(weak).flatten(0, 1), self.whole(classes).flatten()
        length = self.config.memory
        for c in range(self.classes):
            new = weak[classes == c]
            if len(new):
                kept = torch.cat([self.bank[c, : self.filled[c]], new])[-length:]
                self.bank[c, : len(kept)] = kept
                self.filled[c] = len(kept)
        stored, owner = self.stored()
        if not len(stored):
            return
        z = self.student.mapper(stored)
        for c in owner.unique().tolist():
            mean = z[owner == c].mean(0)
            eta = self.config.eta if self.seen[c] else 1.0
            self.prototypes[c] = (1 - eta) * self.prototypes[c] + eta * mean
            self.seen[c] = True

    def stored(self) -> tuple[Float[Tensor, "rows dim h w"], Int[Tensor, " rows"]]:
        """Return the maps of the memory and their classes."""
        there = torch.arange(self.bank.shape[1], device=self.bank.device) < self.filled[:, None]
        return self.bank[there], there.nonzero()[:, 0]

    @torch.no_grad()
    def clusters(self, weak: Tensor, logits: Tensor, found: Pseudo) -> Int[Tensor, " n"]:
        """Return the labels of a picture's regions: plain clustering, sliding over to prototypes in the first epoch."""
        config = self.config
        given = (found.fg_index, found.fg_labels)
        guided = prototype_clustering(
            self.student.mapper(weak), logits, self.prototypes, *given, config.rounds, bool(self.seen.all())
        )
        labels, distance = guided.labels, guided.distance
        if self.position.epoch == 0 and config.plain_rounds:
            stored, _ = self.stored()
            teacher = self.taught
            rows = teacher.pooled(torch.cat([weak, stored]))
            both = torch.cat([logits, teacher.logits(stored)])
            plain = plain_clustering(rows, both, *given, config.plain_rounds)
            if torch.equal(plain.label_set, guided.label_set):
                progress = self.position.step / max(1, self.steps_per_epoch)
                distance = (1 - progress) * plain.distance[: len(weak)] + progress * distance
                labels = guided.label_set[distance.argmin(1)]
        labels = labels.clone()
        labels[found.fg_index] = found.fg_labels
        return labels

    def contrast(
        self, n: int, batch: dict[str, Any], weak: Tensor, maps: Tensor, logits: Tensor, found: Pseudo
    ) -> Float[Tensor, ""]:
        """Compute the weak-guided contrast of picture n; 0 with two foreground regions or fewer."""
        config, none = self.config, maps.sum() * 0.0
        if config.contrast == "none" or not config.contrast_weight:
            return none
        if config.contrast == "clusters":
            labels = self.clusters(weak, logits, found)
        elif config.contrast == "truth":
            labels = torch.where(batch["label"][n] >= 0, batch["label"][n], self.classes)
        else:
            labels = logits.argmax(1)
            labels[found.fg_index] = found.fg_labels
        foreground = labels != self.classes
        if int(foreground.sum()) <= 2:
            return none
        uncertain = proposal_variance(batch["boxes"][n], batch["score"][n]) > config.uncertainty
        rows = foreground if uncertain else torch.ones_like(foreground)
        far = None
        if config.hard_positives:
            with torch.no_grad():
                z_weak = self.student.mapper(weak[rows])
            far = hard_positive_mask(z_weak, labels[rows], self.classes)
        z = self.student.mapper(maps[rows])
        return weak_guided_contrast(z, labels[rows], config.temperature, far, config.alpha)

    def aligned(self, weak: Tensor | None, strong: Tensor, found: Pseudo) -> list[Tensor]:
        """Compute L_inst and L_grad of a picture from the student's features of both views."""
        config, student = self.config, self.student
        losses = [strong.sum() * 0.0] * 2
        if weak is None:
            return losses
        if config.instance_weight:
            both = student.mapper(torch.cat([weak, strong]))
            losses[0] = weak_guided_contrast(both, found.owner.repeat(2), config.temperature)
        if config.gradient_weight and torch.is_grad_enabled():
            frozen = student.classifier.weight.detach(), student.classifier.bias.detach()
            rows = [student.mapper.m(part[found.fg_index]) for part in (weak, strong)]
            parts = [F.cross_entropy(F.linear(row, *frozen), found.fg_labels) for row in rows]
            inner = [*student.mapper.convolutions.parameters(), *student.mapper.linear.parameters()]
            losses[1] = gradient_discrepancy(parts[0], parts[1], inner)
        return losses

    # --- what it learned

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the mean cosine of the student's strong features between classes; lower is better."""

        def strong(batch: dict[str, Any]) -> Tensor:
            crops = drawn_regions(batch["image"], batch["boxes"], self.config.crop).unflatten(0, batch["label"].shape)
            views = []
            for regions, number in zip(crops, batch["index"].tolist(), strict=True):  # a picture's draws are its own
                drawn = self.erased(regions.shape, torch.Generator().manual_seed(1000 * self.seed + number))
                views += self.pipeline.apply(regions, [drawn])
            rows = unit(self.student.pooled(self.student.encoder(torch.cat(views))).float())
            return torch.cat([rows, batch["label"].flatten()[:, None].to(rows.dtype)], 1)

        found = survey.over(split, strong)
        cosine = cosine_between_classes(found[:, :-1], found[:, -1].long(), self.classes)
        return {} if cosine is None else {"class_cosine": cosine}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Add the clusters of the valid pictures."""
        return super().figures(survey) | self._clustered(survey)

    def _clustered(self, survey: Survey) -> dict[str, Any]:
        """Count the labels that the clustering gives the regions of the valid pictures, by true class."""
        if not self.adapted or self.config.contrast != "clusters" or not self.seen.any():
            return {}
        table = np.zeros((self.classes + 1, self.classes + 1), np.int64)

        def cluster(batch: dict[str, Any]) -> Tensor:
            teacher = self.taught
            views = normalise(drawn_regions(batch["image"], batch["boxes"], self.config.crop))
            maps = teacher.encoder(views).unflatten(0, batch["label"].shape)
            labels = []
            for n, weak in enumerate(maps):
                logits = teacher.logits(weak)
                found = pseudo_boxes(logits, batch["boxes"][n], self.config.pseudo_threshold)
                labels.append(self.clusters(weak, logits, found))
            return torch.stack([torch.stack(labels), batch["label"]], -1)

        for given, true in survey.over("valid", cluster).flatten(0, 1).tolist():
            if true >= 0:
                table[true, given] += 1
        names = [*survey.classes, "background"]
        return {
            "Clusters of the teacher's weak features": {
                "kind": "table",
                "columns": ["true class", *names],
                "rows": [[name, *map(str, row)] for name, row in zip(names, table.tolist(), strict=True)],
                "caption": "Numbers of proposals of the valid pictures, by true class (rows) and cluster label (columns).",
            }
        }


SYSTEM = System(
    slug="wscol",
    task="regions",
    config=WSCoLConfig,
    learner=WSCoL,
    data="shifted-shapes",
    recipe={
        "encoder": "conv-cells",
        "layer": "",
        "crop": 16,
        "source_epochs": 10,
        "source_batch": 2,
        "source_lr": 0.2,  # 1.6e-3 for a batch of 2
        "pseudo_threshold": 0.5,  # its probabilities are lower than a detector's
        "epochs": 2,
        "optimizer": "adam",
        "lr": 0.0128,  # 5e-5 for a batch of 1
        "weight_decay": 0.0,
        "teacher_every": 20,
        "hidden": 64,
        "projection": 64,
        "evaluate_every": 2,
    },
)
