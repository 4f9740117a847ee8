"""SPACE-2: pre-train an encoder of task-oriented dialogs on labelled and unlabelled dialogs, with graded positives from a tree.

He et al.: "SPACE-2: Tree-Structured Semi-Supervised Contrastive Pre-training for Task-Oriented Dialog Understanding",
COLING 2022, arXiv 2209.06638; code AlibabaResearch/DAMO-ConvAI (space-2).

    frame      annotation of the last turn: paths (domain, intent, slot, value) of the semantic tree
    k          view of the tree: D, I, S, V (nodes), DI, IS, SV (edges), DIS, ISV, DISV (paths)
    s_k        score of two frames in view k: the Jaccard similarity of their sets of nodes, edges or paths (core/tree_scores.py)
    z          [B, dim] the state at [CLS]
    e_k        [B, 2, dim] unit vectors of subspace k: one linear map and tanh, for two passes with different dropout

    L_tree = mean over k of the contrast of e_k with soft positives of weights s_k (`soft_supcon`, core/set_scores.py)
    L_self = the same with weight 1 of a turn's own second pass, 0 of all others

In the order of a run:

1. Pre-training: each step has labelled turns of one corpus, and unlabelled turns. L_tree compares labelled turns in each subspace
   with the scores of its view. L_self compares unlabelled turns with their own second pass. Both kinds predict masked words;
   annotated values are masked whole.
2. `--second-epochs N`: one view alone (I, for intents), on labelled turns alone.
3. `--tune-epochs N`: a linear classifier of domain and intent on z, with masked words and R-Drop.

- Of the code, not of the paper: the loss is the mean over views, not the sum, and has the factor temperature / 0.07. Frames whose
  sets are both empty in a view score 0 there.
- Chosen: names are compared as tuples, not as strings joined by hyphens. A default name must be equal, not contained. Scores are
  computed tile by tile from sets in each step, so none is kept. Blocks of encoders built here normalise before attention, not
  after. An encoder of transformers keeps its own table of places.
- The ablations are settings: `--scores equal` (no tree), `--scores combined` (one score for all views), `--scores none`,
  `--no-unlabelled`, `--views ""` (no subspaces; z itself, with the combined score).

Not built: the fine-tuning of slots and of dialog states, and the higher dropout of stage 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import shapes
from counterpoint.core.distil import r_drop
from counterpoint.core.distributed import (
    gather_rows,
    global_max,
    global_mean,
    mean_where,
)
from counterpoint.core.masking import IGNORED, mask_tokens
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.seeds import seed_torch
from counterpoint.core.set_scores import PairScores, soft_supcon
from counterpoint.core.transforms import need_fixed
from counterpoint.core.tree_scores import VIEWS, Frames, combined_scores, equal_scores, need_frames, view_scores
from counterpoint.core.world import over_group
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches
from counterpoint.engine.optim import on_lines
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.dialogs import DialogModel, DialogsConfig, MixedBatches, shared_path_figure
from counterpoint.words import counted

# ----------------------------------------------------------------------------------------------------------- the contrast


@over_group
@full_precision(keep=("frames",))
def tree_contrast(
    features: Float[Tensor, "n 2 views dim"],
    frames: Frames,
    temperature: float = 0.07,
    base_temperature: float = 0.07,
    views: Sequence[str] = VIEWS,
) -> Float[Tensor, ""]:
    r"""Compute L_tree: the mean over the views of the tree of `soft_supcon`, each in its own subspace with its own scores.

    Args:
        features: rows of each subspace, for two passes; of any norm.
        frames: annotations, as in `tree_scores`. A process may have other rows than another one.
        temperature: > 0, by default 0.07.
        base_temperature: > 0, by default 0.07; the loss has the factor temperature / base_temperature.
        views: names of the active views, in the order of the subspaces; default: all ten, in the order of `tree_scores`.

    Memory is linear in n. Raises ValueError for shapes that do not fit, another view and an empty batch. Raises it too for a
    temperature that is not positive and finite.

    >>> tree_contrast(torch.eye(2)[:, None, None].expand(2, 2, 10, 2), torch.full((2, 1, 4), -2), 1.0, 1.0)
    tensor(0.5514)
    """
    need_frames(frames)
    if features.ndim != 4 or features.shape[2] != len(views) or len(frames) != len(features) or not len(views):
        raise ValueError(
            f"features must be [n, 2, views, dim] with {counted(len(views), 'view')} and a frame for each of n, got "
            + shapes(features=features, frames=frames)
        )
    if unknown := [view for view in views if view not in VIEWS]:
        raise ValueError(f"views must be of {', '.join(VIEWS)}, got {unknown[0]!r}")
    need_fixed("tree_contrast", frames=frames)
    everything = gathered_frames(frames)
    losses = [
        soft_supcon(rows, view_scores(everything, view, wide(features).dtype), temperature, base_temperature)
        for rows, view in zip(features.unbind(2), views, strict=True)
    ]
    return torch.stack(losses).mean()


def gathered_frames(frames: Frames) -> Frames:
    """Gather the frames of all processes, which may have different numbers of rows."""
    most = global_max(frames.shape[1], frames.device)
    return gather_rows(F.pad(frames.long(), (0, 0, 0, most - frames.shape[1]), value=-2))


# ----------------------------------------------------------------------------------------------------------- the learner

READ = ("ids", "place", "speaker", "turn", "mask")


@dataclass
class Space2Config(DialogsConfig):
    """Settings of SPACE-2. Defaults are the paper's for pre-training."""

    optimizer: str = "adamw"
    lr: float = 1e-5
    weight_decay: float = 0.0
    clip_norm: float | None = 5.0
    schedule: Literal["epoch", "step"] = "step"
    temperature: float = 0.07
    """Temperature of both contrasts, > 0. The loss is multiplied by temperature / 0.07."""
    views: str = ",".join(VIEWS)
    """Active views of the tree, between commas, each with a subspace. Empty: no subspaces, one contrast of z itself."""
    subspace: int = 0
    """Width of each subspace, at least 0; 0: that of the encoder."""
    scores: Literal["tree", "combined", "equal", "none"] = "tree"
    """Weights of labelled pairs: tree, each view's own score; combined, one score in all views; equal, 1 for equal annotations;
    none."""
    unlabelled: bool = True
    """Learn from turns without annotation, too."""
    word_weight: float = 0.1
    """Weight of masked words, at least 0."""
    second_epochs: int = 0
    """Epochs of the second stage, on labelled turns, at least 0; 60 in the paper for its data of intents. 0: none."""
    second_view: str = "I"
    """The view of the second stage, with the scores tree; with others all views stay."""
    tune_epochs: int = 0
    """Epochs in which a classifier of domain and intent trains, at least 0; 60 in the paper. 0: none."""
    tune_lr: float = 1e-4
    """Learning rate of that stage at a batch of 256, > 0."""
    r_drop: float = 5.0
    """Weight of R-Drop in that stage, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature", "tune_lr")
        if min(self.word_weight, self.r_drop, self.subspace, self.second_epochs, self.tune_epochs) < 0:
            raise CounterpointError(
                "word_weight, r_drop, subspace, second_epochs and tune_epochs must not be negative, got "
                f"{self.word_weight}, {self.r_drop}, {self.subspace}, {self.second_epochs} and {self.tune_epochs}"
            )
        for view in self.active:
            if view not in VIEWS:
                raise unknown("view", view, list(VIEWS))
        if self.second_epochs and self.second_view not in self.active:
            raise CounterpointError(
                f"second_view is {self.second_view}, which has no subspace; name one of --views {self.views}"
            )

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active views."""
        return tuple(name.strip() for name in self.views.split(",") if name.strip())


class Space2(Learner):
    """An encoder of dialogs, its subspaces, its head of masked words and, where it is tuned, a classifier of intents."""

    config: Space2Config

    def __init__(self, config: Space2Config, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.config, self.mask_number, self.vocabulary = config, data.mask, data.vocabulary
        self.examples, self.free = data.examples, data.unlabelled
        seed_torch(seed)
        self.model = DialogModel(config, data.vocabulary)
        dim = self.model.dim
        self.subspaces = nn.Linear(dim, (config.subspace or dim) * len(config.active)) if config.active else None
        self.classifier = nn.Linear(dim, data.classes) if config.tune_epochs else None

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config

        def labelled(survey: Survey) -> Batches:
            return MixedBatches(survey.split().corpora, 0, config.batch_size)

        first = None if config.unlabelled else labelled
        found = [Stage("pre-training", config.epochs, self.of_encoder, batches=first)]
        if config.second_epochs:
            found.append(Stage("second", config.second_epochs, self.of_encoder, batches=labelled))
        if config.tune_epochs:
            found.append(Stage("classifier", config.tune_epochs, self.of_classifier, self._tuning, labelled))
        return found

    def of_encoder(self) -> list[nn.Module]:
        """Return the modules of the first two stages."""
        return [self.model, *([] if self.subspaces is None else [self.subspaces])]

    def of_classifier(self) -> list[nn.Module]:
        """Return the modules of the last stage."""
        return [self.model, *([] if self.classifier is None else [self.classifier])]

    def turns(self) -> list[Turn]:
        return self._turns(self.of_encoder(), self.config)

    def _tuning(self) -> list[Turn]:
        return self._turns(self.of_classifier(), replace(self.config, lr=self.config.tune_lr))

    def _turns(self, modules: Sequence[nn.Module], config: Space2Config) -> list[Turn]:
        return [on_lines(config, modules, self.epochs, self.steps_per_epoch)]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return [(self.model, "forward"), (self.model, "summary")]

    # --- the step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Mask all annotated values, and words of other utterances as BERT does; never a marker."""
        length = global_max(batch["ids"].shape[1], self.device)
        wide_names = (*READ, "value", "told")
        batch = batch | {name: F.pad(batch[name], (0, length - batch[name].shape[1])) for name in wide_names}
        ids = self.whole(batch["ids"])
        maskable = self.whole(batch["mask"] & ~batch["told"]) & (ids < self.vocabulary)
        chosen = self.config.mask_probability
        masked = mask_tokens(ids, maskable, self.mask_number, self.vocabulary, chosen, generator=generator)
        _, mine = self.share(len(batch["ids"]))
        value = batch["value"]
        return batch | {
            "masked": torch.where(value, self.mask_number, masked.ids[mine]),
            "labels": torch.where(value, batch["ids"], masked.labels[mine]),
        }

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        labelled = batch["index"] < self.examples
        z = torch.stack(self.model.summary(*(torch.cat([batch[name]] * 2) for name in READ)).chunk(2), 1)
        if self.stage_name == "classifier":
            terms = self.tuning_terms(z, batch["intent"])
        else:
            terms = {"tree": self.tree_loss(z[labelled], batch["frames"][labelled])}
            if self.stage_name == "pre-training" and self.config.unlabelled and self.free:
                terms["self"] = self.self_loss(z[~labelled])
        if self.config.word_weight:
            terms["words"] = self.config.word_weight * self.word_loss(batch, labelled)
        return {"loss": torch.stack(list(terms.values())).sum()} | terms

    def word_loss(self, batch: dict[str, Any], labelled: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
        """Compute the loss of masked words, averaged over those of labelled turns and over those of unlabelled ones; the sum."""
        states = self.model(batch["masked"], *(batch[name] for name in READ[1:]))
        labels = batch["labels"]
        chosen = labels != IGNORED
        each = F.cross_entropy(self.model.logits(states, labels).float(), labels[chosen], reduction="none")
        owner = labelled[:, None].expand_as(chosen)[chosen]
        found = mean_where(each, owner)
        return found + mean_where(each, ~owner) if self.free else found

    def features(self, z: Float[Tensor, "n 2 dim"]) -> Float[Tensor, "n 2 views width"]:
        """Compute the rows of each subspace, of any norm; without subspaces z itself."""
        if self.subspaces is None:
            return z[:, :, None]
        return torch.tanh(self.subspaces(z)).unflatten(2, (len(self.config.active), -1))

    def tree_loss(self, z: Float[Tensor, "n 2 dim"], frames: Frames) -> Float[Tensor, ""]:
        """Compute L_tree of labelled turns, with the weights of the settings."""
        config, features = self.config, self.features(z)
        if config.scores == "tree" and config.active:
            views = config.active
            if self.stage_name == "second":
                at = views.index(config.second_view)
                features, views = features[:, :, at : at + 1], (config.second_view,)
            return tree_contrast(features, frames, config.temperature, views=views)
        scores = None
        if config.scores != "none":
            score = equal_scores if config.scores == "equal" else combined_scores
            scores = score(gathered_frames(frames), wide(features).dtype)
        return self._mean_contrast(features, scores)

    def self_loss(self, z: Float[Tensor, "n 2 dim"]) -> Float[Tensor, ""]:
        """Compute L_self of unlabelled turns."""
        return self._mean_contrast(self.features(z), None)

    def _mean_contrast(
        self, features: Float[Tensor, "n 2 views width"], scores: PairScores | None
    ) -> Float[Tensor, ""]:
        rows = features.unbind(2)
        return torch.stack([soft_supcon(row, scores, self.config.temperature) for row in rows]).mean()

    def tuning_terms(self, z: Float[Tensor, "n 2 dim"], intent: Int[Tensor, " n"]) -> dict[str, Tensor]:
        """Compute the classifier's cross-entropy on both passes, and R-Drop."""
        assert self.classifier is not None
        logits = [self.classifier(z[:, n]).float() for n in (0, 1)]
        entropy = global_mean(torch.cat([F.cross_entropy(one, intent, reduction="none") for one in logits]))
        return {"intents": entropy, "r_drop": self.config.r_drop * r_drop(*logits)}

    # --- evaluation and saving

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        z = self.model.summary(*(batch[name] for name in READ))
        return {"z": z} if self.classifier is None else {"z": z, "logits": self.classifier(z)}

    def embed(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n dim"]:
        """Compute z of texts as single turns of a user. Their first and last token become the markers."""
        at = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(at == 0, self.vocabulary, ids)
        ids = torch.where(at == mask.sum(1, keepdim=True) - 1, self.vocabulary + 1, ids)
        place = at.clamp(max=self.config.utterance + 1).expand_as(ids) * mask
        ones = mask.to(torch.int64)
        return self.model.summary(ids, place, ones, ones, mask)

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the mean cosine of two test turns in each subspace, by the part of the path that they share."""
        names = self.config.active or ("z",)
        rows = survey.over("test", lambda batch: unit(self.features(self.predict(batch)["z"][:, None])[:, 0]))
        drawn = shared_path_figure(survey.over("test", lambda batch: batch["frames"][:, 0]), rows, names)
        return {"Similarity in each subspace by distance in the tree": drawn} | super().figures(survey)


# Settings for small corpora on a few cores, which replace the paper's.
LAPTOP: dict[str, Any] = {
    "encoder": "text-64-1-4",
    "vocabulary": 1000,
    "context": 64,
    "subspace": 32,
    "batch_size": 128,
    "epochs": 8,
    "lr": 6e-3,
    "evaluate_every": 4,
}

SYSTEM = System(
    slug="space-2",
    task="dialogs",
    config=Space2Config,
    learner=Space2,
    data="task-dialogs",
    recipe=LAPTOP,
)
