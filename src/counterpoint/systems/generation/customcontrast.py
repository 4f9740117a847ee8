r"""CustomContrast: contrast subjects and views at two levels, for subject-driven generation of pictures.

Chen, Huang, Chen, Zheng, Zhang, Mao: "CustomContrast: A Multilevel Contrastive Perspective For Subject-Driven Text-to-Image
Customization", AAAI 2025, arXiv 2409.05606. No code of the authors is public.

An encoder of reference pictures conditions a diffusion model on a subject. Training that reconstructs the reference lets
view, place and ground into the subject's code. So similarity and control by text trade off. Here reference, positive and target are
three frames of the subject, and its codes contrast with those of other subjects.

    x_i, x_i+, y_i   reference, positive and target of subject i
    v_i, u_i         V_cls and T_cls of x_i, unit rows                         (encoders/injection.py)
    a_il, p_il       pseudo-words s_l of x_i and of x_i+ in layer l, unit rows
    r_ij             max(0, cosine) of a frozen encoder's features of the segmented x_i and x_j, 1 for one subject; w_ij = 1 - r_ij

    L_CSCL = 1/2 mean_i [ CE of v_i . u_j / tau_c over j + CE of u_i . v_j / tau_c over j ]
    L_MACL = 1/L sum_l mean_i -log [ e^{a_il.p_il/tau_m} / ( e^{a_il.p_il/tau_m} + sum_{j!=i} w_ij e^{a_il.a_jl/tau_m} ) ]
    L      = L_diffusion(y_i | caption, x_i) + cscl_weight L_CSCL + macl_weight L_MACL

So subjects that look alike are hardly pushed apart, and unlike ones fully. A subject with one frame has no L_MACL of its own.

Choices where the paper's print was not available: the form of L_MACL, its temperature, the symmetric L_CSCL and the weights. So
are the mask of the subject's place, and T_cls as the mean over layers. Features for r are centred by their mean, because those
of untrained networks point one way. The Textual-Qformer's text is the subject's word alone, so the codes do not depend on the
caption. Several references are averaged.

Left out: the bases SD 1.5 and SDXL, which need downloads; the U-Net is trained here, in a first stage. Segmentation finds pixels
unlike a plain ground. The matching form of L_MACL and measures by CLIP, DINO and ImageReward are left out, too. Options:
`scaling` False sets w = 1, `frames` "self" reconstructs the reference, weights of 0 drop a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_rows, shapes
from counterpoint.core.distributed import batch_logsumexp, batch_pair_loss, gather_rows, global_mean, mean_where, place
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Block, Diagonal
from counterpoint.core.world import over_group, world
from counterpoint.encoders.injection import Subject
from counterpoint.systems.base import System
from counterpoint.tasks.diffusion import DiffusionConfig, DiffusionLearner

FEW = 256**2  # pairs of codes up to which the whole matrix is faster than the kernel
FEW_WORDS = 2**20  # pairs of pseudo-words of all layers, likewise

# --------------------------------------------------------------------------------------------------------------- equations


@over_group
@full_precision
def cscl(
    visual: Float[Tensor, "n dim"], textual: Float[Tensor, "n dim"], temperature: float = 0.07
) -> Float[Tensor, ""]:
    """Compute L_CSCL: the visual and the textual code of a subject agree, and differ from those of other subjects.

    Args:
        visual, textual: codes of the same subjects in the same order, which this function normalises.
        temperature: > 0, divides cosines; by default 0.07.

    Memory is linear in the rows. A batch of one subject gives 0.

    Raises ValueError for shapes that do not fit, an empty batch, and a temperature that is not positive and finite.

    >>> cscl(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.5514)
    """
    need_alike("n dim", visual=visual, textual=textual)
    need_positive(temperature=temperature)
    if len(visual) ** 2 <= FEW and world()[1] == 1:
        s = unit(visual, 1 / temperature) @ unit(textual).T
        return -(s.log_softmax(0).diagonal() + s.log_softmax(1).diagonal()).mean() / 2
    return batch_pair_loss(scaled(unit(visual), temperature), unit(textual))


@over_group
@full_precision
def macl(
    anchors: Float[Tensor, "layers n dim"],
    positives: Float[Tensor, "layers n dim"],
    similarity: Float[Tensor, "n total"] | Block,
    temperature: float = 0.07,
    paired: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Compute L_MACL: pseudo-words of a subject's frames agree in each layer; other subjects repel by their real difference.

    Args:
        anchors, positives: pseudo-words of one frame and of another, which this function normalises.
        similarity: real similarity of the anchors' subjects, clipped to 0..1; 1 never repels. Rows are this process's, columns
            those of all processes in rank order. Or a function of a tile's rows and columns (see `subject_similarity`), with which
            memory is linear in the rows. No gradient.
        temperature: > 0, divides cosines; by default 0.07.
        paired: whether a row has a positive. The others are negatives only. Default: all have one.

    Returns the mean over layers and paired rows, 0 without any.

    Raises ValueError for shapes that do not fit, an empty batch, and a temperature that is not positive and finite. Raises it too
    where positives are the anchors themselves.

    >>> x = torch.eye(3)[None]
    >>> macl(x, x.clone(), torch.zeros(3, 3), temperature=1.0)  # CE of the unit matrix
    tensor(0.5514)
    """
    if anchors.ndim != 3 or anchors.shape != positives.shape or not len(anchors):
        raise ValueError(
            f"anchors and positives must be [layers, n, dim], got {shapes(anchors=anchors, positives=positives)}"
        )
    if anchors is positives:
        raise ValueError("positives are the anchors; they must come from other frames")
    rows = anchors.shape[1]
    need_rows(anchors=anchors[0], positives=positives[0])
    need_positive(temperature=temperature)
    here = place(rows, anchors.device)
    if isinstance(similarity, Tensor) and similarity.shape != (rows, here.total):
        raise ValueError(f"similarity must be [{rows}, {here.total}], got {list(similarity.shape)}")
    if paired is not None and paired.shape != (rows,):
        raise ValueError(f"paired must be [{rows}], got {list(paired.shape)}")

    def weight(r: slice, c: slice) -> Tensor:
        """Return w of a tile of the whole batch."""
        if isinstance(similarity, Tensor):
            found = similarity[r.start - here.offset : r.stop - here.offset, c]
        else:
            found = similarity(r, c)
        return (1 - found.detach().clamp(0, 1)).to(anchors.dtype)

    if len(anchors) * rows**2 <= FEW_WORDS and world()[1] == 1:
        (a, p), whole = unit(torch.stack((anchors, positives))), slice(0, rows)
        log_w = weight(whole, whole).fill_diagonal_(0).log_()
        others = torch.baddbmm(log_w[None], a, a.transpose(1, 2), alpha=1 / temperature)
        own = (a * p).sum(2, keepdim=True) / temperature
        losses = -torch.cat((others, own), 2).log_softmax(2)[..., -1].mean(0)
    else:
        losses = anchors.new_zeros(rows)
        for one, p in zip(anchors, positives, strict=True):
            x, key = scaled(unit(one), temperature), unit(one)
            others = batch_logsumexp(x, key, exclude=Diagonal(), weight=weight).rows
            losses = losses + F.softplus(others - positive_similarity(x, unit(p)))
        losses = losses / len(anchors)
    return global_mean(losses) if paired is None else mean_where(losses, paired)


def subject_similarity(features: Float[Tensor, "n dim"], subjects: Int[Tensor, " n"]) -> Block:
    """Return r as a function of a tile: max(0, cosine) of features, 1 within a subject. It covers the batch of all processes.

    Args:
        features: rows of a frozen encoder for this process's subjects.
        subjects: their numbers; those below 0 are subjects of their own.
    """
    every, numbers = gather_rows(unit(features.detach())), gather_rows(subjects)

    def similarity(rows: slice, columns: slice) -> Tensor:
        same = (numbers[rows, None] == numbers[columns]) & (numbers[rows, None] >= 0)
        return (every[rows] @ every[columns].T).clamp(0, 1).masked_fill(same, 1.0)

    return similarity


# ------------------------------------------------------------------------------------------------------------- the learner


@dataclass
class CustomContrastConfig(DiffusionConfig):
    """Settings of CustomContrast."""

    temperature: float = 0.07
    """Temperature of both contrasts, > 0."""
    cscl_weight: float = 0.1
    """Weight of L_CSCL, the contrast of the modalities' codes, at least 0; 0: without it."""
    macl_weight: float = 0.1
    """Weight of L_MACL, the contrast of the pseudo-words, at least 0; 0: without it."""
    scaling: bool = True
    """Scale negatives by how unlike the real subjects are; False: all negatives of other subjects count fully."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        self.need_weight("cscl_weight", "macl_weight")


class CustomContrast(DiffusionLearner):
    """A diffusion model whose encoder of subjects learns from three frames of each subject."""

    config: CustomContrastConfig

    def customization_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute L."""
        config, n = self.config, len(batch["index"])
        pictures = batch["reference"]
        places = batch["places"][:, :3]
        if config.macl_weight:
            pictures, places = torch.cat([pictures, batch["positive"]]), torch.cat([places, batch["places"][:, 3:]])
        # Self-reconstruction sees the reference where it stands.
        patches = self.seen(pictures, places if config.frames == "cross" else None)
        both = self.subject(patches, batch["steps"].repeat(len(pictures) // n))
        subject = Subject(both.visual[:n], both.textual[:n], both.words[:, :n], both.fused[:, :n])
        found = {"diffusion": self.diffusion_loss(batch, subject)}
        loss = found["diffusion"]
        if config.cscl_weight:
            found["cscl"] = cscl(subject.visual, subject.textual, config.temperature)
            loss = loss + config.cscl_weight * found["cscl"]
        if config.macl_weight:
            features = self.real(batch["reference"])
            if not config.scaling:
                features = torch.zeros_like(features)
            similarity = subject_similarity(features, batch["subject"])
            words = both.words
            found["macl"] = macl(words[:, :n], words[:, n:], similarity, config.temperature, batch["paired"])
            loss = loss + config.macl_weight * found["macl"]
        return {"loss": loss} | {name: value.detach() for name, value in found.items()}


LAPTOP: dict[str, Any] = {
    "encoder": "conv-cells",
    "pretrained": False,
    "tune": True,
    "embedding": 48,
    "width": 24,
    "depth": 1,
    "tokens": 4,
    "sampling": 15,
    "batch_size": 32,
    "pretrain_epochs": 20,
    "pretrain_lr": 2e-3 * 8,
    "epochs": 20,
    "lr": 2e-3 * 8,
    "evaluate_every": 20,
}

SYSTEM = System(
    slug="customcontrast",
    task="generation",
    config=CustomContrastConfig,
    learner=CustomContrast,
    data="digit-subjects",
    recipe=LAPTOP,
)
