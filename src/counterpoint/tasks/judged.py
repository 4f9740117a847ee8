"""Learn from pictures whose labels may be wrong: a table of judged labels by position, a last stage on kept ones, and their page.

A picture has one label, or several (the data's `tags`). Tables of the second kind have a column for each class: 1 where it is
present, 0 where absent. In both, -1 stands for a removed label, and -2 for one not judged yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.mixing import draw_mix, mix
from counterpoint.core.noisy_labels import judged_labels, judged_tags
from counterpoint.data.images import ImageData
from counterpoint.encoders.text import check_text_encoder
from counterpoint.engine.loading import Batches, ChosenBatches
from counterpoint.engine.stages import Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.labelled import LabelledConfig, LabelledLearner
from counterpoint.tasks.measures.unknown import unknown_measures
from counterpoint.tasks.tags import TagsEvaluator
from counterpoint.tasks.web_figures import label_figures
from counterpoint.tasks.web_texts import embedded_texts, trusted_by_text


@dataclass
class JudgedConfig(LabelledConfig):
    """Settings of learners that judge labels, with the help of texts. Defaults are those of CAPro for WebVision1k."""

    epochs: int = 60
    """Passes of the main stage over the training images, those with a frozen encoder included."""
    frozen_epochs: int = 5
    """First passes of the main stage, with a frozen encoder and without prototypes; at least 0, below epochs."""
    clean_after: int = 10
    """Passes of the main stage before labels are judged, at least 0."""
    threshold: float = 0.6
    """Smallest score that corrects a label, 0 to 1; the paper has 0.9 where pictures have several labels."""
    finetune_epochs: int = 15
    """Passes of the last stage, over the kept images under their corrected labels; 0: without it."""
    finetune_lr: float = 1e-4
    """Learning rate of the last stage at a batch of 256, > 0."""
    mixup: float = 0.8
    """Both parameters of the Beta distribution of mixtures in the last stage, at least 0; 0: no mixtures."""
    lr: float = 0.1
    recipe: str = "moco-v2"
    texts: str = ""
    """CSV with the columns file and text: the text of each training image. Default: those that come with the data."""
    definitions: str = ""
    """File of the classes' definitions: JSON {class: definition}, or a line for each class. Default: the data's, or names."""
    tags: str = ""
    """CSV with the columns file and tags: the labels of each image, with ; between them. Default: those of the data."""
    unknown: str = ""
    """Source of images of no known class, such as imagefolder:DIR, that join the valid and test images. Default: none."""
    text_encoder: str = "words"
    """Embedding of texts: words (weighted by rarity), minilm, or hf:NAME."""
    trusted: int = 50
    """Number of images of each class that texts choose."""
    graph_neighbours: int = 20
    """Visual neighbours that are ranked again, the image itself included."""
    graph_kept: int = 5
    """Neighbours of them that smooth a text, the image itself included."""
    graph_search: Literal["exact", "approximate"] = "exact"
    """Search of visual neighbours: exact, or by an inverted file (faiss) for large sets, whose recall the run measures."""
    self_weight: float = 0.0
    """Weight of an image's own text in its smoothed text, at least 0."""

    counts: ClassVar[tuple[str, ...]] = (*LabelledConfig.counts, "trusted", "graph_neighbours", "graph_kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frozen_epochs", "clean_after", "finetune_epochs", "self_weight", "mixup"):
            if not getattr(self, name) >= 0:
                raise CounterpointError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.frozen_epochs >= self.epochs:
            raise CounterpointError(f"frozen_epochs ({self.frozen_epochs}) must be below epochs ({self.epochs})")
        self.need_share("threshold")
        self.need_positive("finetune_lr")

    @property
    def needs_texts(self) -> bool:
        """Whether training needs the texts of images."""
        return True

    def check(self) -> None:
        super().check()
        if self.text_encoder != "words":
            check_text_encoder(self.text_encoder)
        if self.graph_search == "approximate" and not find_spec("faiss"):
            raise CounterpointError(
                "graph_search approximate needs the extra [search]: pip install 'counterpoint[search]', or use exact"
            )

    def evaluator(self, data: ImageData) -> Any:
        return super().evaluator(data) if data.tags is None else TagsEvaluator(self, data)

    def facts(self, data: ImageData) -> dict[str, Any]:
        if self.needs_texts and data.texts is None:
            raise DataError(
                f"{data.name} has no texts; give --texts FILE (CSV with the columns file and text), or use --prototypes labels"
            )
        return super().facts(data) | {"several": data.tags is not None}


class JudgedLearner(LabelledLearner):
    """A classifier with a table of judged labels. Subclasses name a stage "main", where they judge, and "fine-tuning".

    Attributes:
        trusted: labels whose text fits the class's definition.
        judged: the last judgement of each label.
        history: numbers of labels kept, corrected, removed, and now right, after each epoch of the main stage.
        graph_recall: share of the exact neighbours in the graph of texts; -1 where the graph is exact.
    """

    crops: ClassVar[int] = 2
    trusted: Bool[Tensor, "examples ..."]
    judged: Int[Tensor, "examples ..."]
    history: Int[Tensor, "epochs 4"]
    graph_recall: Float[Tensor, ""]

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.several = bool(getattr(data, "several", False))
        shape = (data.examples, data.classes) if self.several else (data.examples,)
        self.register_buffer("trusted", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("judged", torch.full(shape, -2))
        self.register_buffer("history", torch.full((config.epochs, 4), -1))
        self.register_buffer("graph_recall", torch.tensor(-1.0))

    # --- labels

    def given(self, survey: Survey) -> Tensor:
        """Return the labels of all training pictures, as the data give them."""
        found = survey.tags if self.several else survey.labels
        assert found is not None
        return found

    def truth(self, survey: Survey) -> Tensor | None:
        """Return the true labels of all training pictures, where the data know them."""
        found = survey.known("train").get("truth")
        return None if found is None else found.long()

    def trust(self, survey: Survey) -> Tensor:
        """Choose by text the trusted labels, and return them."""
        config, texts = self.config, survey.texts
        rows = embedded_texts(config.text_encoder, [*texts.train, *texts.definitions])
        features = survey.over("train", lambda batch: self.encoder(batch["image"])).float()
        chosen, recall = trusted_by_text(
            features, rows[: len(features)], rows[len(features) :], self.given(survey),
            top=config.trusted, neighbours=config.graph_neighbours, kept=config.graph_kept,
            self_weight=config.self_weight, search=config.graph_search,
        )  # fmt: skip
        # All processes take the choice of the first.
        self.trusted.copy_(gather_rows(chosen.long())[: len(chosen)].bool())
        self.graph_recall.fill_(-1 if recall is None else recall)
        return self.trusted.cpu()

    def take(self, survey: Survey, found: Tensor) -> None:
        """Store a judgement of all labels, for the last stage. Without a kept label, store the labels as given."""
        if not (found >= 0).any():
            self.warnings.append("no label is kept, so the last stage has all labels; lower --threshold")
            found = self.given(survey)
        self.judged.copy_(found)

    def score(self, batch: dict[str, Any]) -> Tensor:
        """Compute the score of each class for the pictures of a batch, [n, classes]."""
        raise NotImplementedError

    def judge(self, survey: Survey) -> None:
        """Judge the labels of all pictures once, for the last stage; the objective cross-entropy keeps them as given."""
        labels, config, trusted = self.given(survey), self.config, self.trusted.cpu()
        score = survey.over("train", self.score)
        if config.objective == "cross-entropy":
            self.judged.copy_(labels)
        elif self.several:
            self.take(survey, judged_tags(score, labels, config.threshold, trusted))
        else:
            known = labels >= 0
            found = torch.full_like(labels, -1)
            found[known] = judged_labels(score[known], labels[known], config.threshold, trusted[known]).label
            self.take(survey, found)

    # --- the last stage

    def kept_batches(self, survey: Survey) -> Batches:
        """Return the batches of pictures with a kept label."""
        kept = (self.judged >= 0).flatten(1).any(1) if self.several else self.judged >= 0
        rows = np.flatnonzero(kept.cpu().numpy()[survey.rows])
        return ChosenBatches(rows, self.config.batch_size, max(1, len(rows) // self.config.batch_size))

    def fine_turns(self) -> list[Turn]:
        """Return the optimiser of the last stage."""
        return [self.turn_of([self.encoder, self.classifier], rate=self.config.finetune_lr / self.config.lr)]

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        found = super().prepare(batch, generator)
        if self.stage_name != "fine-tuning":
            return found
        # A process mixes its own images; the share is the same on all.
        return found | {"mix": draw_mix(len(batch["image"]), self.config.mixup, generator)}

    def mixed_loss(self, images: Tensor, labels: Tensor, drawn: Any) -> Tensor:
        """Compute the loss of the classifier on mixtures of two images."""
        share, partner = drawn.lam.to(images.device), drawn.permutation.to(images.device)
        logits = self.classifier(self.encoder(mix(images, partner, share)))
        own, other = (self.each_loss(logits, label) for label in (labels, labels[partner]))
        return global_mean(share * own + (1 - share) * other)

    def each_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the classifier's loss of each row, [n]. Default: the cross-entropy of one label."""
        return F.cross_entropy(logits, labels, reduction="none")

    # --- measures and the page

    def end_epoch(self, epoch: int) -> None:
        """Count the judgements of the main stage."""
        assert self.survey is not None
        if self.stage_name != "main":
            return
        labels, judged, truth = self.given(self.survey), self.judged.cpu(), self.truth(self.survey)
        kept, same = judged >= 0, judged == labels
        right = kept & (judged == truth) if truth is not None else kept & False
        parts = (kept & same, kept & ~same, judged == -1, right)
        self.history[epoch + self.config.frozen_epochs] = torch.tensor([int(part.sum()) for part in parts])

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the judged labels where the true ones are known, and the classifier on pictures of no known class."""
        found = {} if self.several else unknown_measures(self, survey, split)
        if self.graph_recall >= 0:
            found["graph_recall"] = float(self.graph_recall)
        truth, labels, judged = self.truth(survey), self.given(survey), self.judged.cpu()
        kept = judged >= 0
        if truth is None or not kept.any():
            return found  # before the main stage
        if self.several:  # precision of the labels that are present
            kept = judged == 1
        first = self.trusted.cpu() if self.config.prototypes == "text" else labels >= (1 if self.several else 0)
        precision = {"label_precision": (judged == truth)[kept], "start_precision": (labels == truth)[first]}
        found |= {name: float(right.double().mean()) for name, right in precision.items() if len(right)}
        if not self.several and (none := truth == -1).any():
            found["unknown_removed"] = float((judged == -1)[none].double().mean())
        return found | {"kept_share": float((judged >= 0).double().mean())}

    @torch.no_grad()
    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show what became of the labels over the epochs, and pictures whose labels changed."""
        mine = label_figures(survey, self.given(survey), self.judged.cpu(), self.truth(survey), self.history.cpu())
        return super().figures(survey) | mine
