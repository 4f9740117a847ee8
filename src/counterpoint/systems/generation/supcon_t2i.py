r"""SupCon-T2I: label-guided supervised contrast in both phases of text-to-image GANs, by two branches with shared parameters.

Liu, Zhang, Zhang, Li, Pan: "A Framework For Image Synthesis Using Supervised Contrastive Learning", ICPR 2024, arXiv 2412.03957.
No code of the authors is public. It builds on AttnGAN (arXiv 1711.10485) and GALIP (arXiv 2301.12959).

A text-to-image GAN learns to match pictures and captions first, then to generate. The match knows only which caption belongs to
which picture. Here both phases see two pairs of each class, one in each branch. They pull all pictures and captions of a class
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

Chosen, because the paper's text was not available: the form of the sums, weights of 1, tau = 1 / gamma3. In pilots on small
data, smaller weights gave a lower Fréchet distance; the recipe has them. The masking of DAMSM's negatives of the same class stays
on (`mask_same_class`). A phase without labels has one branch of all pictures, so every arm sees as many pictures in a step. Each
pair without a class is a class of its own.

Left out: DM-GAN and SSA-GAN as backbones, labels with several classes, and real pictures among the candidates of sup(F, F). The
compared UniCL and cross-entropy guidance are left out, too. So are the Inception score and CLIP's text encoder for galip-s.
Regions are the last map of E_I with 4 cells a side or more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, mean_where
from counterpoint.core.operands import class_similarity, positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Diagonal
from counterpoint.core.world import over_group, world
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.adversarial import AdversarialConfig, AdversarialLearner
from counterpoint.tasks.branches import Partners, joined
from counterpoint.tasks.generation import signed

FEW = 256**2  # pairs of rows up to which a whole matrix is faster than the kernel

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
    if len(anchors) * len(candidates) <= FEW and world()[1] == 1:
        s = scaled(unit(anchors), temperature) @ unit(candidates).T
        own = labels_a[:, None] == labels_c
        if exclude_self:  # a finite number stands for -inf: its product with 0 is 0
            itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
            s, own = s.masked_fill(itself, torch.finfo(s.dtype).min / 2), own & ~itself
        count = own.sum(1)
        share = own / count.clamp(min=1)[:, None]
        return (s.log_softmax(1) * share).sum() / -(count > 0).sum().clamp(min=1)
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
class SupConT2IConfig(AdversarialConfig):
    """Settings of SupCon-T2I. Defaults of the networks are AttnGAN's for CUB, with two branches of its batches."""

    labels: Labels = "both"
    """Phases with the label-guided contrast and two branches: both, pretraining or none."""
    shuffle_labels: bool = False
    """Give classes to training pairs at random, as a control. The judges keep the true ones."""
    temperature: float = 0.1
    """Temperature of the label-guided contrast, > 0."""
    inter_weight: float = 1.0
    """Weight of the contrast between pictures and captions, at least 0."""
    inner_weight: float = 1.0
    """Weight of the contrast among pictures and among captions, at least 0."""
    sup_weight: float = 1.0
    """Weight of the contrast of generated pictures, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        self.need_weight("inter_weight", "inner_weight", "sup_weight")


class SupConT2I(AdversarialLearner):
    """A generator and its encoders, which learn from two pairs of each class in a step."""

    config: SupConT2IConfig

    def __init__(self, config: SupConT2IConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        if config.labels != "none" and data.classes < 2:
            raise CounterpointError(
                f"the label-guided contrast needs classes, and the data have {data.classes}; name a column of labels, or set "
                "--labels none"
            )
        self.partners = Partners(torch.zeros(1, dtype=torch.int64))  # of the training pairs, from `begin` on

    @property
    def branches(self) -> int:
        """Number of branches of the current stage."""
        return 2 if self.config.labels in (("both", "pretraining") if self.pretraining else ("both",)) else 1

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

    def contrast(self, label: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum of sup(A, C) over pairs of anchors and candidates, divided by 2."""
        tau = self.config.temperature
        return torch.stack([label_guided_contrast(a, c, label, label, tau, a is c) for a, c in pairs]).sum() / 2

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

    def generator_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute L_G."""
        found = super().generator_loss(batch)
        if self.branches == 2:
            code, sentence = batch["code"], batch["sentence"]
            found["sup"] = self.contrast(batch["label"], (code, sentence), (code, code))
            found["loss"] = found["loss"] + self.config.sup_weight * found["sup"]
        return found


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
    "inter_weight": 0.5,
    "inner_weight": 0.5,
    "sup_weight": 0.1,
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
