"""OBoW: from small crops, predict the bag of visual words that a moving-average teacher sees in the whole picture.

Gidaris, Bursuc, Puy, Komodakis, Cord, Perez: "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised Learning",
CVPR 2021, arXiv 2012.11552.

    symbol    here                shape           meaning
    F         feature_map         [B, C_l, h, w]  the teacher's map of level l; its border of one location is left out
    V         dictionary          [K, C_l]        K visual words, a queue of the teacher's local features
    d                             [B, hw, K]      squared distance of a location and a word; never stored as a whole
    m         min_dist_mean       [1]             running mean of the distance to the nearest word
    beta      inv_delta           number          m / beta is the temperature of a location's soft code over the words
    t         bow                 [B, K]          pooled codes of a picture, which sum to 1
    W = G(V)  generators          [K, C]          the student's weights, generated from the words
    kappa     kappa               number          scale of the student's logits kappa f W^T, f its pooled features
    alpha     momentum_teacher    number          momentum of the teacher

`core.codes` computes t, m and the new words, without the matrix of distances. One step reads the vocabulary and makes the
student's features. It moves the teacher, makes the targets of the whole pictures, and then writes new words. Both targets and
head of a step therefore use the words of earlier steps.

Differences from the authors' code:

- The learning rate ends at 0, not at 3e-5, and warms up by epochs (`--schedule step`: by steps).
- The vocabulary need not be a multiple of the batch; its queue wraps around.
- m has a floor of 1e-12, so equal features give finite codes.

The encoder needs feature maps: not mlp-s, no vision transformer. Not built: probes on Places and VOC, few-shot episodes. The
claim shows no gain of five points over a learned head, and none of online words over static ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.codes import FLOOR, Update, bow_targets, inner, local_words, perplexity
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import global_mean
from counterpoint.core.memory import Queue
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.teacher import EMATeacher, cosine_momentum
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group
from counterpoint.encoders.images import need_size
from counterpoint.encoders.simple import LearnedWeights
from counterpoint.encoders.taps import recorded
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.images import ImagesConfig
from counterpoint.tasks.labelled import cross_entropy
from counterpoint.tasks.views import BARE, ViewsLearner
from counterpoint.tasks.words import word_gallery
from counterpoint.views.images.patches import CropGroups


class WordGenerator(nn.Module):
    """Generate the weight of each word from the word: unit length, linear, batch normalisation, ReLU, linear, unit length.

    Args:
        dim: width C_l of a word.
        width: width C of the student's features; the hidden layer has 2 C.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * width, bias=False)
        self.bn = nn.BatchNorm1d(2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, words: Float[Tensor, "words dim"]) -> Float[Tensor, "words width"]:
        return unit(self.fc2(F.relu(self.bn(self.fc1(unit(words))))))


def _weights(generator: Any, words: Tensor) -> Tensor:
    """Call a generator, or build its result from the tensors of a `WordGenerator`, by name."""
    if not isinstance(generator, Mapping):
        return wide(generator(words))
    of = {name: wide(value) for name, value in generator.items()}
    hidden = F.linear(unit(words), of["fc1_weight"])
    hidden = F.relu(F.batch_norm(hidden, None, None, of["bn_weight"], of["bn_bias"], training=True))
    return unit(F.linear(hidden, of["fc2_weight"], of["fc2_bias"]))


class ObowOutput(NamedTuple):
    loss: Float[Tensor, ""]
    per_group_losses: list[Float[Tensor, ""]]


@over_group
@full_precision
def obow_loss(
    student_feats: Sequence[Float[Tensor, "_ width"]],
    dictionaries: Sequence[Float[Tensor, "words _"]],
    bows: Sequence[Float[Tensor, "n words"]],
    generators: Sequence[Callable[[Tensor], Tensor] | Mapping[str, Tensor]],
    kappa: float | Tensor | Sequence[float | Tensor] = 8.0,
) -> ObowOutput:
    r"""Compute KL(t || softmax(kappa f G(V)^T)), the mean over crops and levels, summed over groups of crops (Sec. 3.4).

    Args:
        student_feats: for each group the features f of n times as many crops, all crops of a picture in adjacent rows.
        dictionaries: for each level the words V, no gradient.
        bows: for each level the targets t of the n pictures, no gradient.
        generators: for each level a `WordGenerator`, or another function from words to weights [words, width]. Also the
            tensors fc1_weight, bn_weight, bn_bias, fc2_weight and fc2_bias by name.
        kappa: scale of the logits, by default 8; one number, or one for each level.

    Returns the loss and those of the groups. Logits are never stored as a whole: a crop needs log Z (`pair_logsumexp`) and its
    product with t W. Raises ValueError for shapes that do not fit and an empty batch.

    >>> head = nn.Linear(2, 3).requires_grad_(False)
    >>> obow_loss([torch.zeros(4, 3)], [torch.eye(2)], [torch.full((2, 2), 0.5)], [head]).loss.abs()
    tensor(0.)
    """
    levels = len(dictionaries)
    if not student_feats or not levels or len(bows) != levels or len(generators) != levels:
        raise ValueError(
            f"dictionaries, bows and generators need one entry for each level, and student_feats one for each group; got "
            f"{levels}, {len(bows)}, {len(generators)} and {len(student_feats)}"
        )
    kappas: list[Any] = list(kappa) if isinstance(kappa, list | tuple) else [kappa] * levels
    if len(kappas) != levels or any(holds(torch.as_tensor(~(torch.as_tensor(k) > 0))) for k in kappas):
        raise ValueError(f"kappa must be positive, one number or one for each of {levels} levels, got {kappa}")
    n = len(bows[0])
    need_rows(bows=bows[0])
    for group in student_feats:
        if group.ndim != 2 or (n and (not len(group) or len(group) % n)) or group.shape[1] != student_feats[0].shape[1]:
            raise ValueError(f"student_feats must be [crops of {n} pictures, width] alike, got {shapes(group=group)}")
    counts = [len(group) // max(n, 1) for group in student_feats]
    feats = torch.cat(list(student_feats))
    losses: list[list[Tensor]] = [[] for _ in student_feats]
    for words, bow, generator, scale in zip(dictionaries, bows, generators, kappas, strict=True):
        if bow.ndim != 2 or bow.shape != (n, len(words)):
            raise ValueError(f"bows must be [{n}, words] alike, got {shapes(bows=bow, dictionaries=words)}")
        t = bow.detach()
        weights = _weights(generator, words.detach())
        if weights.shape != (len(words), feats.shape[1]):
            raise ValueError(f"generators must give [words, {feats.shape[1]}], got {shapes(weights=weights)}")
        query = feats * scale
        log_z = pair_logsumexp(query, weights).rows
        towards, negative_entropy = t @ weights, torch.xlogy(t, t).sum(1)
        start = 0
        for found, many in zip(losses, counts, strict=True):
            rows = slice(start, start := start + n * many)
            own = (query[rows].unflatten(0, (-1, max(many, 1))) * towards[:, None]).sum(2)
            found.append(global_mean((log_z[rows].view_as(own) - own).mean(1) + negative_entropy))
    per_group = [torch.stack(found).mean() for found in losses]
    return ObowOutput(torch.stack(per_group).sum(), per_group)


@dataclass
class OBoWConfig(ImagesConfig):
    """Settings of OBoW. Defaults are the paper's full model for ResNet-50 on ImageNet (Sec. 4 and Appendix)."""

    recipe: str = "obow"
    warmup_epochs: int = 10
    levels: tuple[str, ...] = ("layer3", "layer4")
    """The teacher's layers whose maps give bags, by the network's names; the last one alone is the vanilla model."""
    words: int = 8192
    """Number of visual words of each level."""
    inv_delta: float = 15.0
    """Beta: the temperature of the codes is the mean distance to the nearest word, divided by it. 0: hard codes."""
    pool: Literal["max", "average"] = "max"
    """Pooling of a picture's codes over its locations."""
    update: Update = "local_average"
    """New words: the mean of 3 x 3 locations, one location, or the mean of all locations."""
    update_steps: int = 0
    """Number of first steps that write words; 0: all. A static vocabulary needs about 2 words / batch_size steps."""
    border: int = 1
    """Locations at each side of a map to leave out, at least 0."""
    start_distance: float = 0.5
    """Mean distance to the nearest word before the first step; 0: that of the first batch."""
    head: Literal["generated", "learned"] = "generated"
    """Weights of the prediction: generated from the words, or learned for each place of the vocabulary (the claim's control)."""
    kappa: float = 8.0
    """Scale of the student's logits, > 0."""
    learn_kappa: bool = False
    """Learn the scale, one for each level."""
    momentum_teacher: float = 0.99
    """Momentum of the teacher, 0 to 1, at the first step; 1: a frozen teacher."""
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """Raise the teacher's momentum to 1 on half a cosine, or keep it constant."""
    large_crops: int = 2
    """Number of crops in the first group, at least 0."""
    large_size: int = 0
    """Height and width of these crops in pixels; 0: 5/7 of the images' (160 of 224)."""
    patches: int = 5
    """Number of patches in the second group, 0 to 9; 0: no such group."""
    patch_size: int = 0
    """Height and width of patches in pixels; 0: 3/7 of the images' (96 of 224)."""
    monitor: bool = False
    """Train a linear classifier on the teacher's features, for monitoring; no gradient reaches the networks."""

    counts: ClassVar[tuple[str, ...]] = (*ImagesConfig.counts, "words")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("kappa")
        self.need_share("momentum_teacher")
        self.need_weight(
            "inv_delta", "update_steps", "border", "start_distance", "large_crops", "large_size", "patch_size"
        )
        if not 0 <= self.patches <= 9 or self.large_crops + self.patches < 1:
            raise CounterpointError(
                f"patches must lie in 0..9, and there must be a crop to predict from; got patches {self.patches} and "
                f"large_crops {self.large_crops}"
            )
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise CounterpointError(f"levels must name at least one layer, each once, got {list(self.levels)}")


class OBoW(ViewsLearner):
    """A student of small crops, and a teacher of whole pictures with a vocabulary for each level."""

    compares = False
    views: Any
    projector: nn.ModuleList
    kappa: Tensor
    distance: Tensor

    def __init__(self, config: OBoWConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher = EMATeacher(self.encoder)
        queues = (Queue(config.words, dim, seed=seed + n, normalize=False) for n, dim in enumerate(self.channels))
        self.vocabularies: Sequence[Queue] = cast(Any, nn.ModuleList(queues))
        self.register_buffer("distance", torch.full((len(config.levels),), config.start_distance))
        kappa = torch.full((len(config.levels),), config.kappa)
        if config.learn_kappa:
            self.kappa = nn.Parameter(kappa)
        else:
            self.register_buffer("kappa", kappa)
        self.monitor = nn.Linear(self.encoder.dim, data.classes) if config.monitor and data.classes else None

    def build_projector(self, dim: int) -> nn.ModuleList:
        """Build the head of each level, from the width of the teacher's maps on a black picture."""
        config, images = self.config, torch.zeros(1, 3, self.size, self.size)
        with torch.no_grad(), recorded(self.encoder.eval(), config.levels) as seen:
            self.encoder(images)
        self.encoder.train()
        for level in config.levels:
            try:
                inner(seen[level], config.border, 3 if config.update == "local_average" else 1)
            except ValueError as error:
                raise CounterpointError(
                    f"levels: {level} of {config.encoder} does not fit: {error}. Choose other levels or larger pictures, or set "
                    "--border 0 or --update no_averaging"
                ) from error
        self.channels = [seen[level].shape[1] for level in config.levels]
        if config.head == "learned":
            return nn.ModuleList(LearnedWeights(config.words, dim) for _ in config.levels)
        return nn.ModuleList(WordGenerator(channels, dim) for channels in self.channels)

    def build_views(self) -> Any:
        config = self.config
        crops = (config.large_crops, config.large_size, config.patches, config.patch_size)
        views = CropGroups(self.size, config.recipe, *crops)
        for size in views.sizes:
            need_size(self.encoder, config.encoder, size)
        return views

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config, size = self.config, self.config.batch_size
        written = min(config.epochs * (survey.examples // size), config.update_steps or config.words) * size
        if written < config.words:
            self.warnings.append(f"{written} of {config.words} words are written, others stay random; lower --words")

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Draw the groups of crops, the teacher's whole pictures, and the places of new words."""
        total, mine = self.share(len(batch["image"]))
        drawn = self.views.draw((total, *batch["image"].shape[1:]), generator).take(mine)
        crops, whole = self.views.apply(batch["image"], drawn)
        random = torch.rand(total, len(self.config.levels), generator=generator)[mine]
        return batch | {"crops": crops, "whole": whole, "random": random}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, step = self.config, self.position.step
        dictionaries = [queue.read() for queue in self.vocabularies]
        student = [self.encoder(crops) for crops in batch["crops"]]
        share = config.momentum_teacher
        share = cosine_momentum(step, self.total_steps, share) if config.momentum_schedule == "cosine" else share
        self.teacher.update(self.encoder, share)
        with recorded(self.teacher.module, config.levels) as seen:
            feature = self.teacher(batch["whole"])
        momentum = 0.0 if step == 0 and config.start_distance == 0 else 0.99
        bows: list[Tensor] = []
        found: dict[str, Tensor] = {}
        for n, (level, words) in enumerate(zip(config.levels, dictionaries, strict=True)):
            target = bow_targets(
                *(seen[level], words, self.distance[n], config.inv_delta or None, config.pool, True),
                border=config.border, momentum=momentum,
            )  # fmt: skip
            self.distance[n] = target.min_dist_mean
            if not config.update_steps or step < config.update_steps:
                new = local_words(seen[level], batch["random"][:, n], config.update, border=config.border)
                self.vocabularies[n].write(new)
            bows.append(target.bow)
            name = "" if n == len(config.levels) - 1 else f"{level}_"
            used = perplexity(target.bow)
            found |= {
                f"{name}batch_perplexity": used.batch, f"{name}image_perplexity": used.image,
                f"{name}distance": self.distance[n].clone(),
            }  # fmt: skip
        loss, groups = obow_loss(student, dictionaries, bows, list(self.projector), list(self.kappa.unbind()))
        names = ["crops"] * bool(config.large_crops) + ["patches"] * bool(config.patches)
        found |= {f"{name}_loss": group.detach() for name, group in zip(names, groups, strict=True)}
        if self.monitor is not None and batch["label"] is not None:
            known = batch["label"] >= 0
            found["monitor"] = cross_entropy(self.monitor(feature[known]), batch["label"][known])
            loss = loss + found["monitor"]
        return {"loss": loss} | found

    @torch.no_grad()
    def frozen_head(self) -> nn.Linear:
        """Freeze the last level's weights, times kappa, into a layer from the student's features to the logits of words."""
        weight = self.kappa[-1] * self.projector[-1](self.vocabularies[-1].read())
        layer = nn.Linear(weight.shape[1], len(weight), bias=False)
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        return layer

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the last level's words by the patches of pictures that they stand for."""
        config, words = self.config, self.vocabularies[-1].read().cpu()
        sharpness = (config.inv_delta or 1e6) / float(self.distance[-1].clamp(min=FLOOR))
        return word_gallery(survey, self.teacher.module, config.levels[-1], words, sharpness, config.border)


SYSTEM = System(
    slug="obow",
    task="views",
    config=OBoWConfig,
    learner=OBoW,
    data="cifar10",
    recipe=BARE
    | {
        "recipe": "obow-cifar",
        "levels": ("layer2", "layer3"),
        "border": 0,
        "words": 2048,
        "inv_delta": 10.0,
        "kappa": 5.0,
        "start_distance": 0.0,
        "patch_size": 12,
    },
)
