r"""KD3: distil a classifier with unlabelled pictures of another distribution, such as pictures from the web.

Tang, Chen, Niu, Sugiyama, Gong: "Distribution Shift Matters for Knowledge Distillation with Webly Collected Images", ICCV 2023,
arXiv 2307.11469.

    symbol      here               shape           meaning
    l_T, l_S    teacher_logits     [n, K]          logits of the frozen teacher and of the student
    alpha_e     alpha              0..1            the teacher's share of the combined prediction in epoch e
    p_0         cutoff             0..1            threshold of the most frequent class
    F_T, F_S    feat_teacher       [B, Ct, h, w]   last maps of both networks; p_T, p_S: their means over positions
    G           projector                          maps F_S to the teacher's channels; it stays with the student
    w           weights            [B]             weight of a picture in the alignment of features
    x'          mixed              [B, 3, H, W]    a picture with mixed statistics (MixDistribution)
    E_S, E_T    embed_student      C -> 128        linear maps to unit rows; not used after training

Each epoch begins with a selection of web pictures by the combined prediction of both networks. A class that is predicted often
faces a high threshold, a rare class a low one (core/noisy_labels.py). MixDistribution is in core/mixing.py. The student has no
classifier of its own: l_S is the teacher's classifier, frozen, on the mean of G(F_S). The loss is

    L = mean_i w_i (G(F_S) - F_T)^2 + mu [ NT-Xent(E_S p_S(x), E_S p_S(x')) + NT-Xent(E_T p_T(x), E_T p_T(x')) ].

No label of any picture enters. The last term trains E_T alone, because the teacher is frozen.

Controls: `--no-select` aligns on all web pictures, and `--no-weighted` has equal weights. `--contrast-weight 0` mixes nothing.
`--classifier own` trains a classifier of the student by KD. The first three together are SimKD.

Choices where the paper and its code say nothing:

- If no picture passes, the last selection stays. Before there is one, the most confident tenth is selected.
- With other than 240 epochs, the schedule of alpha is scaled.
- A teacher's map must average to the input of its classifier. Where it does not, as in a vision transformer, the vector serves
  as a map of one position.

Differences from the authors' code: biases and normalisation layers have no weight decay. The figure after the last epoch
counts, not the best one on the test split. Not built: generators of pictures (DAFL, DFQ, CMI), the search for web pictures
(DFND). The claim is in claims/kd3.toml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, shapes
from counterpoint.core.distil import kd
from counterpoint.core.distributed import global_mean
from counterpoint.core.mixing import draw_mix, mix_distribution, picture_statistics
from counterpoint.core.noisy_labels import combination_weight, combined_logits, dynamic_selection
from counterpoint.core.nt_xent import nt_xent
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group, world
from counterpoint.encoders.maps import MapProjector, has_map, vector_and_map
from counterpoint.engine.stepper import seed_of
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.web import LAPTOP, WebConfig, WebLearner, at_one_size, with_web
from counterpoint.tasks.web_figures import selection_figures, sizes
from counterpoint.views.images import denormalise

PAPER_EPOCHS = 240

# ---------------------------------------------------------------------------------------------- weighted feature alignment


@full_precision
def disagreement_weights(
    logit_student: Float[Tensor, "n classes"], logit_teacher: Float[Tensor, "n classes"]
) -> Float[Tensor, " n"]:
    """Compute w_i = sigmoid(||l_S - l_T + 1e-6||), at least 0.5 and below 1, without gradient.

    Args:
        logit_student, logit_teacher: logits of the same pictures. Distances above about 10 all give a weight of nearly 1.

    Raises ValueError for shapes that differ and an empty batch.

    >>> disagreement_weights(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor([0.9933])
    """
    need_alike("n classes", logit_student=logit_student, logit_teacher=logit_teacher)
    distance = (wide(logit_student.detach()) - wide(logit_teacher.detach()) + 1e-6).norm(dim=1)
    return distance.sigmoid()


@over_group
@full_precision
def weighted_feature_loss(
    feat_student: Float[Tensor, "n channels height width"],
    feat_teacher: Float[Tensor, "n channels height width"],
    logit_student: Float[Tensor, "n classes"],
    logit_teacher: Float[Tensor, "n classes"],
) -> Float[Tensor, ""]:
    """Compute the mean over pictures, channels and positions of w_i (G(F_S) - F_T)^2, w = `disagreement_weights`.

    Args:
        feat_student: the student's maps after the projector.
        feat_teacher: the teacher's maps of the same shape; no gradient.
        logit_student, logit_teacher: logits of the same pictures; no gradient.

    Raises ValueError for shapes that do not fit and an empty batch.

    >>> weighted_feature_loss(torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(1, 3), torch.zeros(1, 3))
    tensor(0.5000)
    """
    need_alike("n channels height width", feat_student=feat_student, feat_teacher=feat_teacher)
    weights = disagreement_weights(logit_student, logit_teacher)
    if len(weights) != len(feat_student):
        raise ValueError(f"logits and maps must have as many rows, got {shapes(feat_student=feat_student)} and "
                         f"{shapes(logit_student=logit_student)}")  # fmt: skip
    squares = F.mse_loss(wide(feat_student), wide(feat_teacher.detach()), reduction="none")
    return global_mean(weights * squares.flatten(1).mean(1))


# --------------------------------------------------------------------------------------------------------------- networks


class Embed(nn.Linear):
    """E: a linear map to unit rows."""

    def forward(self, pooled: Float[Tensor, "n channels"]) -> Float[Tensor, "n dim"]:
        return unit(super().forward(pooled))


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class KD3Config(WebConfig):
    """Settings of KD3. Defaults are the authors' for CIFAR, ResNet-34 to ResNet-18."""

    epochs: int = 240
    batch_size: int = 1024
    encoder: str = "torchvision:resnet18"
    recipe: str = "supervised"
    lr: float = 0.0125
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256 (0.05 at 1024)."""
    weight_decay: float = 5e-4
    select: bool = True
    """Select web pictures at the start of each epoch; False: use all of them."""
    cutoff: float = 0.95
    """p_0, threshold on the confidence for the most frequent class, 0 to 1."""
    vote_until: float = 120
    """Epoch of 240 from which the student alone selects; with other numbers of epochs it is scaled."""
    vote_horizon: float = 160
    """Epoch of 240 that the fall of the teacher's share is measured against, > 0; it is scaled likewise."""
    select_views: bool = True
    """Select by augmented pictures, as the authors do; False: by unchanged pictures."""
    when_empty: Literal["keep", "error"] = "keep"
    """If no picture passes: keep the last selection (before there is one, the most confident tenth), or raise an error."""
    classifier: Literal["teacher", "own"] = "teacher"
    """The student's classifier: the teacher's, frozen, behind the projector; or its own, trained by KD."""
    feature_weight: float = 1.0
    """Weight of the alignment of features, at least 0."""
    weighted: bool = True
    """Weigh pictures in the alignment by the disagreement of both networks; False: equal weights of 1."""
    contrast_weight: float = 0.001
    """mu, weight of the contrast of pictures and their mixed copies, at least 0; 0: no copies are made."""
    temperature: float = 0.3
    """Temperature of the contrast, > 0."""
    embedding: int = 128
    """Width of the embeddings that the contrast compares, at least 1."""
    mix_alpha: float = 0.1
    """Both parameters of the Beta distribution of a picture's own share in MixDistribution, > 0."""
    mix_probability: float = 1.0
    """Probability that a picture is mixed, 0 to 1."""
    kd_weight: float = 1.0
    """Weight of KD of the student's own classifier (--classifier own), at least 0."""
    kd_temperature: float = 4.0
    """Temperature of this KD, > 0."""

    counts: ClassVar[tuple[str, ...]] = (*WebConfig.counts, "embedding")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("vote_horizon", "temperature", "mix_alpha", "kd_temperature")
        self.need_share("cutoff", "mix_probability")
        self.need_weight("vote_until", "feature_weight", "contrast_weight", "kd_weight")
        if self.feature_weight == 0 and (self.classifier == "teacher" or self.kd_weight == 0):
            raise CounterpointError(
                "feature_weight 0 trains no prediction: set --feature-weight, or --classifier own with --kd-weight"
            )


# ----------------------------------------------------------------------------------------------------------- the learner


class KD3(WebLearner):
    """A student with a projector behind which the teacher's classifier works, and two embeddings for the contrast."""

    config: KD3Config
    confidence: Tensor
    predicted: Tensor
    passed: Tensor
    unkept: ClassVar[tuple[str, ...]] = (*WebLearner.unkept, "confidence", "predicted", "passed")

    def __init__(self, config: KD3Config, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        _, channels, height, width = self._map(torch.zeros(2, data.channels, data.size, data.size))[1].shape
        taught = self.teacher_map[0]
        self.single = [min(height, self.teacher_map[1]), min(width, self.teacher_map[2])] == [1, 1]
        self.projector: nn.Module = MapProjector(channels, taught)
        own = config.classifier == "own"
        self.classifier = nn.Linear(self.encoder.dim if own else taught, data.classes)
        self.embed_student = Embed(self.encoder.dim, config.embedding)
        self.embed_teacher = Embed(taught, config.embedding)
        self.register_buffer("confidence", torch.zeros(self.web))
        self.register_buffer("predicted", torch.zeros(self.web, dtype=torch.int64))
        self.register_buffer("passed", torch.ones(()))

    def enter_student(self, survey: Survey) -> None:
        """Copy the teacher's classifier: a finished student works without its teacher."""
        if self.config.classifier == "teacher":
            self.classifier.load_state_dict(self.instructing.classifier.state_dict())

    def student_parts(self) -> list[nn.Module]:
        parts = [self.encoder, self.projector, self.embed_student, self.embed_teacher]
        return [*parts, self.classifier] if self.config.classifier == "own" else parts

    # --- the student

    def _map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's vector p_S and map F_S; an encoder without a map gives its vector as one position."""
        if has_map(self.encoder):
            return vector_and_map(self.encoder, images)
        vector = self.encoder(images)
        return vector, vector[:, :, None, None]

    def project(self, feature_map: Tensor) -> Tensor:
        """Return G(F_S), at the teacher's size if the student's map is larger."""
        if self.training and self.single and len(feature_map) == 1 and world()[1] == 1:
            raise CounterpointError(
                "one picture was selected, and its map has one position: batch normalisation needs two values; lower --cutoff, "
                "or name an --encoder and a teacher with larger maps"
            )
        return self.projector(at_one_size(feature_map, self.teacher_map)[0])

    def answer(self, vector: Tensor, projected: Tensor) -> Tensor:
        """Return the student's logits."""
        return self.classifier(vector if self.config.classifier == "own" else projected.mean((2, 3)))

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().predict(batch)
        if self.at_teacher:
            return found
        vector, feature_map = self._map(batch["image"])
        return found | {"logits": self.answer(vector, self.project(feature_map))}

    # --- 1. selection

    def select(self, survey: Survey) -> Bool[Tensor, " web"]:
        config = self.config
        if not config.select:
            return super().select(survey)
        epoch = 1 + self.position.epoch * PAPER_EPOCHS / config.epochs  # in the authors' count
        alpha = combination_weight(epoch, config.vote_until, config.vote_horizon)
        views = None
        if config.select_views:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.position.epoch, 2307))
            views = self.views.draw((self.web, self.channels, self.size, self.size), generator)

        def both(batch: dict[str, Any]) -> Tensor:
            images = batch["image"]
            if views is not None:
                rows = batch["index"].cpu() - self.first
                (images,) = self.views.apply(denormalise(images), [view.take(rows) for view in views])
            vector, feature_map = self._map(images)
            return torch.stack([self.instruct(images).logits, self.answer(vector, self.project(feature_map))], 1)

        logits = survey.over("train", both, self.positions)
        for name, part in zip(("teacher", "student"), logits.unbind(1), strict=True):
            if not bool(part.isfinite().all()):
                remedy = "name another teacher" if name == "teacher" else "lower --lr"
                raise CounterpointError(f"the {name}'s logits of web pictures are NaN or infinite; {remedy}")
        mask = dynamic_selection(logits[:, 0], logits[:, 1], alpha, config.cutoff)
        confidence, predicted = combined_logits(logits[:, 0], logits[:, 1], alpha)
        self.confidence.copy_(confidence)
        self.predicted.copy_(predicted)
        self.passed.fill_(float(mask.float().mean()))
        if bool(mask.any()):
            return mask
        if config.when_empty == "error":
            raise CounterpointError(
                f"no web picture passes the selection of epoch {self.position.epoch + 1}: the largest confidence is "
                f"{float(confidence.max()):.3f}, --cutoff is {config.cutoff}; lower it, or use --when-empty keep"
            )
        if bool(self.selected.any()):
            return self.selected.cpu()
        return torch.zeros_like(mask).index_fill(0, confidence.topk(max(1, self.web // 10)).indices, True)

    # --- 2. and 3. a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch, config = super().prepare(batch, generator), self.config
        if self.at_teacher or not config.contrast_weight:
            return batch
        # Partners are drawn for the whole batch, as views are; each process takes its share.
        (view,), (total, mine) = batch["views"], self.share(len(batch["image"]))
        mix = draw_mix(total, config.mix_alpha, generator, per_sample=True, probability=config.mix_probability)
        lam, perm = mix.lam[mine].to(view.device), mix.permutation[mine].to(view.device)
        statistics = self.whole(picture_statistics(view)) if world()[1] > 1 else None
        return batch | {"mixed": mix_distribution(view, lam, perm, statistics=statistics)}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.at_teacher:
            return self.teacher_loss(batch)
        config, (view,) = self.config, batch["views"]
        vector, feature_map = self._map(view)
        taught = self.instruct(view)
        projected = self.project(feature_map)
        answer = self.answer(vector, projected)
        terms: dict[str, Tensor] = {}
        if config.feature_weight:
            target = at_one_size(projected, taught.map)[1]
            assert target is not None
            own = answer if config.weighted else taught.logits  # equal logits: equal weights of 1/2
            feature = weighted_feature_loss(projected, target, own, taught.logits)
            terms["feature"] = config.feature_weight * (feature if config.weighted else 2 * feature)
        if config.contrast_weight:
            mixed = batch["mixed"]
            copy, shown = self._map(mixed)[0], self.instruct(mixed).pooled
            pairs = ((self.embed_student, vector, copy), (self.embed_teacher, taught.pooled, shown))
            contrast = [nt_xent(embed(a), embed(b), config.temperature) for embed, a, b in pairs]
            terms["contrast"] = config.contrast_weight * torch.stack(contrast).sum()
        if config.classifier == "own" and config.kd_weight:
            terms["kd"] = config.kd_weight * kd(answer, taught.logits, config.kd_temperature)
        found = {"loss": torch.stack(list(terms.values())).sum()} | terms
        if config.select:
            found |= {"selected": self.selected.float().mean(), "passed": self.passed.clone()}
        return found

    # --- the page

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show the last selection, pictures and counts of classes, and the sizes of both networks."""
        student = [self.encoder, *([] if self.config.classifier == "own" else [self.projector]), self.classifier]
        return (selection_figures(self, survey) if self.config.select else {}) | sizes(student, self.instructing)


SYSTEM = System(
    slug="kd3",
    task="labelled",
    config=KD3Config,
    learner=KD3,
    data="web-digits",
    recipes={"web-digits": LAPTOP | {"recipe": "digits-moved"}},
    recipe=LAPTOP,
    source=with_web,
)
