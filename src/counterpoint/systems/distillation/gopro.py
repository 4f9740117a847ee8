"""GOPro: prompts of a frozen CLIP, made from each picture's content and style, agree between views of the picture.

Singha, Jha, Banerjee: "GOPro: Generate and Optimize Prompts in CLIP using Self-Supervised Learning", BMVC 2023, arXiv 2308.11605.

    symbol     here                meaning
    Z_l        layer_features      tokens of block l of the frozen image encoder
    mu, sd                         mean and standard deviation over a picture's tokens
    A_l, C_l   style, content      linear layers of block l, to the width of the text encoder's tokens
    rho        rho                 mixture of the blocks
    ctx        context             M learned vectors, which begin as the words "a photo of a"
    w, w', w'' text0, text1, text2 unit text features of the picture, of its view and of its AugMix view, for every class
    h          projector           linear layer and batch normalisation
    L-ce, L-sem, L-con             cross-entropy; agreement of the texts; contrast of the picture with its view

    token      sum_l rho_l (A_l((mu + sd) / 2) + C_l(mu)) / 2 + rho_0, added to every vector of ctx (encoders/prompts.py)
    loss       L-ce + consistency L-sem + contrastive L-con

`counterpoint train gopro --base 0.5 --shots 16 --data imagefolder:mine` learns from 16 pictures of each class of the first half.

L-con trains h alone, since the tower is frozen: in the released code it does not change the classifier. The paper's figure
classifies h's output, which `--classifier-features projected` does.

Differences from the authors' code: it gives all pictures of a batch the AugMix view of the first one, and augments normalised
values. Here each picture has its own views, made before the normalisation. Biases and normalisation layers have no weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tyro.conf import Suppress

from counterpoint.core.checks import need_alike, need_numbers, need_rows, need_within, shapes
from counterpoint.core.distributed import global_mean, mean_of_total, place
from counterpoint.core.nt_xent import nt_xent
from counterpoint.core.operands import EPS
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.data.images import ImageData, Indices
from counterpoint.encoders.prompts import PromptGenerator
from counterpoint.engine.optim import held_then_cosine
from counterpoint.engine.stages import Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.class_teachers import SHAPES_TEACHER, ClassTextConfig, NetworkLearner, open_network
from counterpoint.tasks.class_texts import texts_of
from counterpoint.tasks.kept_classes import stabilities, views_figure
from counterpoint.tasks.open_classes import class_shots
from counterpoint.views.images import RECIPES, ViewPipeline, check_recipe, denormalise, normalise
from counterpoint.views.images.augmix import AugMix

AT_ONCE = 4096  # texts of an evaluation at once

# ------------------------------------------------------------------------------------------------------------ equations


@over_group
@full_precision
def simclr_loss(a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"], temperature: float = 0.1) -> Float[Tensor, ""]:
    """Compute L-con, NT-Xent of two views: every other row of both views is a negative.

    Args:
        a, b: outputs of the projector, normalised here.
        temperature: > 0, by default 0.1.

    One picture has loss 0; equal rows give ln(2n - 1).

    >>> simclr_loss(torch.ones(2, 3), torch.ones(2, 3))
    tensor(1.0986)
    """
    return nt_xent(a, b, temperature)


@over_group
@full_precision
def gopro_loss(
    logits: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    text0: Float[Tensor, "n classes dim"],
    text1: Float[Tensor, "n classes dim"] | None = None,
    text2: Float[Tensor, "n classes dim"] | None = None,
    proj0: Float[Tensor, "n width"] | None = None,
    proj1: Float[Tensor, "n width"] | None = None,
    temperature: float = 0.1,
    contrastive_weight: float = 0.1,
    *,
    consistency_weight: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Compute L-ce + consistency_weight L-sem + contrastive_weight L-con, and the parts ce, consistency, contrastive.

    Args:
        logits: of the pictures.
        labels: class numbers, 0 to classes - 1.
        text0, text1, text2: unit text features of the pictures, of their views and of their AugMix views. L-sem is the mean
            squared difference of text0 and text1, plus that of text0 and text2; a view that is None is left out.
        proj0, proj1: projector's outputs of pictures and views, normalised here; None: without L-con.
        temperature: of L-con, > 0, by default 0.1.
        contrastive_weight: at least 0, by default 0.1.
        consistency_weight: at least 0, by default 1.

    Raises ValueError for shapes that do not fit, an empty batch, and labels or numbers out of range.

    >>> text = torch.ones(1, 1, 2)
    >>> gopro_loss(torch.zeros(1, 1), torch.tensor([0]), text, text, text, torch.ones(1, 2), torch.ones(1, 2))[0]
    tensor(0.)
    """
    need_rows(logits=logits)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or text0.ndim != 3 or text0.shape[:2] != logits.shape:
        found = shapes(logits=logits, labels=labels, text0=text0)
        raise ValueError(f"logits must be [n, classes], labels [n] and text0 [n, classes, dim], got {found}")
    need_numbers(logits.shape[1], labels=labels)
    need_within(0, math.inf, contrastive_weight=contrastive_weight, consistency_weight=consistency_weight)
    if (proj0 is None) != (proj1 is None) or (proj0 is not None and len(proj0) != len(logits)):
        raise ValueError("proj0 and proj1 belong together; give both, a row for each picture, or neither")
    ce = global_mean(F.cross_entropy(logits, labels, reduction="none"))
    consistency = contrastive = logits.new_zeros(())
    views = {name: text for name, text in (("text1", text1), ("text2", text2)) if text is not None}
    if views:
        need_alike("n classes dim", text0=text0, **views)
        entries = place(len(text0), text0.device).total * text0.shape[1] * text0.shape[2]
        total = torch.stack([F.mse_loss(text0, text, reduction="sum") for text in views.values()]).sum()
        consistency = mean_of_total(total, entries)
    if proj0 is not None and proj1 is not None:
        contrastive = simclr_loss(proj0, proj1, temperature)
    loss = ce + consistency_weight * consistency + contrastive_weight * contrastive
    return loss, {"ce": ce, "consistency": consistency, "contrastive": contrastive}


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class GOProConfig(ClassTextConfig):
    """Settings of GOPro. Defaults are the authors' for CLIP ViT-B/16."""

    epochs: int = 50
    batch_size: int = 4
    """Pictures in a batch, over all processes together; at least 2."""
    encoder: Annotated[str, Suppress] = "conv-s"  # not used: the teacher's image encoder is
    pretrained: Annotated[bool, Suppress] = False
    recipe: str = "supervised"
    """Augmentation of the picture, and that before AugMix (see counterpoint.views.images.RECIPES)."""
    optimizer: str = "sgd"
    lr: float = 0.002 * 256 / 4
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    """Number of first epochs, with the constant rate warmup_lr; then the rate falls to 0 on half a cosine. A fit with no more
    epochs than this leaves them out."""
    warmup_lr: float = 1e-5 * 256 / 4
    """Learning rate of these epochs at a batch of 256, > 0."""
    shots: int = 16
    """Training pictures of each class that are used, at least 0; 0: all."""
    shots_seed: int = 0
    """Seed that chooses them, at least 0."""
    context: str = "a photo of a"
    """Words whose vectors the learned context begins with; their tokens are its length M."""
    ending: str = "."
    """Text after the name of a class."""
    view_recipe: str = "byol"
    """Augmentation of the second view, by default that of MoCo v3: crops, colours, grey, blur and flips."""
    severity: float = 1.0
    """Greatest strength of AugMix's changes: above 0.1, at most 10."""
    consistency: float = 1.0
    """Weight of L-sem, at least 0; 0: one text pass for each picture and class instead of three."""
    contrastive: float = 0.1
    """Weight of L-con, at least 0."""
    temperature: float = 0.1
    """Temperature of L-con, > 0."""
    classifier_features: Literal["raw", "projected"] = "raw"
    """Picture's features in the logits: the frozen encoder's (the released code), or the projector's (the paper's figure)."""
    chunk: int = 256
    """Number of texts encoded at once, at least 1. Of more texts, the backward pass encodes the others once more."""

    counts = (*ClassTextConfig.counts, "chunk")
    from_file = False
    adapts = False
    distils: ClassVar[bool] = False  # it trains no network of pictures

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature", "warmup_lr")
        self.need_weight("shots", "shots_seed", "consistency", "contrastive")
        if self.batch_size < 2:
            raise CounterpointError(
                f"batch_size must be at least 2 for the projector's batch normalisation, got {self.batch_size}"
            )
        if self.cached:
            raise CounterpointError("--cached: gopro needs the tokens of augmented pictures, so nothing can be kept")
        if not self.context.strip():
            raise CounterpointError("context must have at least one word")
        AugMix(self.severity)

    def check(self) -> None:
        super().check()
        check_recipe(self.view_recipe)

    def trained_on(self, rows: Indices, data: ImageData) -> Indices:
        rows = super().trained_on(rows, data)
        assert data.train.labels is not None
        return rows[class_shots(data.train.labels[rows], self.shots, self.shots_seed)]

    def facts(self, data: ImageData) -> dict[str, Any]:
        network = open_network(self.teacher)
        with torch.no_grad():
            layers = network.layers(torch.zeros(2, 3, data.size, data.size))[1]
        words = len(network.own_ids(self.context))
        endings = [text for (text,) in texts_of(data.classes, "{}" + self.ending, self.class_names, self.descriptions)]
        network.token_ids(endings, words)  # raises for texts that are too long
        return super().facts(data) | {
            "words": words,
            "endings": endings,
            "text_width": network.width,
            "layer_widths": [layer.shape[2] for layer in layers],
        }


# ---------------------------------------------------------------------------------------------------------- the learner


class GOPro(NetworkLearner):
    """The prompt generator and the projector beside a frozen network of pictures and texts."""

    def __init__(self, config: GOProConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.generator = PromptGenerator(data.words, data.text_width, data.layer_widths)
        self.projector = nn.Sequential(nn.Linear(self.taught, self.taught), nn.BatchNorm1d(self.taught))
        # Without L-con and with raw features it has no part in the loss.
        self.projector.requires_grad_(bool(config.contrastive) or config.classifier_features == "projected")
        self.class_names = tuple(data.class_names)
        self.endings = list(data.endings)  # what follows the context in the prompt of each class
        self.mixer = AugMix(config.severity)

    def build_views(self) -> ViewPipeline:
        plain, strong = (RECIPES[name][0][0] for name in (self.config.recipe, self.config.view_recipe))
        return ViewPipeline(self.size, crops=3, recipe=[plain, strong, plain], mean=None, std=None)

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if not self.generator.context.any():  # else a parent's
            with torch.no_grad():
                self.generator.context.copy_(self.dual.word_rows(self.config.context))

    def turns(self) -> list[Turn]:
        config = self.config
        curve = held_then_cosine(self.epochs, config.warmup_epochs, config.warmup_lr / config.lr)
        return [self.turn_of([self], replace(config, warmup_epochs=0), curve=curve)]  # the curve warms up

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        drawn = self.drawn(batch["image"], generator)
        total, mine = self.share(len(batch["image"]))
        mixture = self.mixer.draw(total, generator).take(mine)
        picture, view, plain = self.views.apply(batch["image"], drawn)
        return batch | {"views": [normalise(x) for x in (picture, view, self.mixer.apply(plain, mixture))]}

    def layers(self, images: Tensor) -> tuple[Float[Tensor, "n dim"], list[Tensor]]:
        """Compute the unit rows of pictures, and the tokens of each block."""
        with torch.no_grad():
            rows, layers = self.dual.layers(images)
        return F.normalize(rows, dim=1, eps=EPS), layers

    def texts(self, layers: Sequence[Tensor], classes: int) -> Float[Tensor, "n classes dim"]:
        """Compute the unit text features of the first classes, by each picture's own prompts."""
        rows = self.dual.text_rows_with_context(self.generator(layers), self.endings[:classes], self.config.chunk)
        return F.normalize(rows, dim=2, eps=EPS)

    def compared(self, rows: Tensor) -> Float[Tensor, "n dim"]:
        """Return the unit features of pictures that the classifier compares with texts."""
        projected = self.config.classifier_features == "projected"
        return F.normalize(self.projector(rows), dim=1, eps=EPS) if projected else rows

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        rows, layers = zip(*(self.layers(view) for view in batch["views"]), strict=True)
        text0 = self.texts(layers[0], self.base)
        text1, text2 = (self.texts(each, self.base) if config.consistency else None for each in layers[1:])
        proj0, proj1 = (self.projector(each) if config.contrastive else None for each in rows[:2])
        logits = self.scale * torch.einsum("nd,ncd->nc", self.compared(rows[0]), text0)
        given = (logits, batch["label"], text0, text1, text2, proj0, proj1, config.temperature, config.contrastive)
        loss, parts = gopro_loss(*given, consistency_weight=config.consistency)
        return {"loss": loss} | {name: value.detach() for name, value in parts.items()}

    # --- what it learned

    def embed(self, images: Tensor) -> Float[Tensor, "n dim"]:
        return self.compared(F.normalize(self.dual.images(images), dim=1, eps=EPS))

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch.get("part") == "bank":  # only features are needed, for search and export
            return {"feature": self.embed(batch["image"])}
        rows, logits = self.classified(batch["image"])
        return {"feature": rows, "logits": logits, **self.of_teacher(batch)}

    def classified(self, images: Tensor) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n classes"]]:
        """Compute the features and the logits of normalised pictures."""
        classes = len(self.class_names)
        found: list[tuple[Tensor, Tensor]] = []
        for part in images.split(max(1, AT_ONCE // classes)):
            rows, layers = self.layers(part)
            rows = self.compared(rows)
            found.append((rows, self.scale * torch.einsum("nd,ncd->nc", rows, self.texts(layers, classes))))
        features, logits = zip(*found, strict=True)
        return torch.cat(features), torch.cat(logits)

    def views_of(self, batch: dict[str, Any], count: int) -> list[Tensor]:
        """Make the picture, its view and its AugMix mixture, of `count` pictures; its position alone decides both."""
        images, at = denormalise(batch["image"]), batch["index"].cpu()
        generator = torch.Generator().manual_seed(0)
        strong = self.views.draw((count, *images.shape[1:]), generator)[1].take(at)
        mixture = self.mixer.draw(count, generator).take(at)
        return [images, self.views.apply(images, [strong])[0], self.mixer.apply(images, mixture)]

    def of_views(self, batch: dict[str, Any], count: int) -> Float[Tensor, "n 3 classes"]:
        """Compute the logits of evaluation pictures and of their two views."""
        return torch.stack([self.classified(normalise(view))[1] for view in self.views_of(batch, count)], 1)

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the share of pictures that keep their class in the second view, and in an AugMix mixture."""
        view, mixture = stabilities(survey, split, self.base, self.of_views)
        return {"view_stability": view, "augmix_stability": mixture}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw test pictures and their views, with the class that each gets."""
        said = "Test pictures, their views by the second recipe and by AugMix: the class that each gets, and its share."
        return {"Views of a picture": views_figure(survey, self.base, self.views_of, self.of_views, said)}


SYSTEM = System(
    slug="gopro",
    task="labelled",
    config=GOProConfig,
    learner=GOPro,
    data="styled-shapes?label=shape&unseen=outline",
    recipe={
        "teacher": SHAPES_TEACHER,
        "recipe": "digits-moved",
        "view_recipe": "shapes",
        "ending": "",
        "base": 0.5,
        "batch_size": 8,
        "lr": 0.002 * 256 / 8,
        "evaluate_every": 50,
    },
)
