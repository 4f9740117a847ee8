"""Tune a teacher of pictures and texts by prompts in both towers, with few labels (PromptSRC, see core/prompt_tuning.py).

The networks stay frozen. Prompts replace the words of the template before a class's name, and are appended to the tokens of
pictures. After each epoch they enter a weighted mean over epochs, which `finish` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.operands import EPS
from counterpoint.core.prompt_tuning import gaussian_epoch_weights, prompt_tuning_loss
from counterpoint.data.images import ImageData
from counterpoint.encoders.dual import DualEncoder
from counterpoint.encoders.prompts import appended_prompts, blocks_of, new_prompts, prompt_width, replaced_prompts
from counterpoint.engine.loading import Batches, ChosenBatches
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.class_teachers import ClassTextConfig, ClassTextLearner, open_network
from counterpoint.tasks.class_texts import templates_of, texts_of
from counterpoint.tasks.image_towers import text_tower
from counterpoint.tasks.open_classes import class_shots
from counterpoint.words import counted


@dataclass
class TunedConfig(ClassTextConfig):
    """Settings of students whose teacher may first be tuned by few labels."""

    prompts: int = 4
    """Vectors in a set of prompts, at least 1."""
    tune_epochs: int = 0
    """Passes over the labelled pictures in stage `tune`; 0 (default): the teacher stays as it is."""
    tune_lr: float = 0.16
    """Learning rate of stage `tune` at a batch of 256, > 0."""
    tune_depth: int = 9
    """Number of blocks with prompts in each tower of the teacher, 1 to the number of its blocks."""
    tune_images: bool = True
    """Put prompts into the teacher's image tower as well, which has to be a transformer."""
    shots: int = 16
    """Labelled pictures of each base class that stage `tune` learns from; 0: all."""
    text_weight: float = 25.0
    """Weight of the distance of the teacher's texts from those without prompts, at least 0."""
    image_weight: float = 10.0
    """Weight of the same for pictures, at least 0."""
    frozen_templates: str = ""
    """Templates, in the form of --templates, whose mean the teacher's texts stay close to. Default: those of --templates."""
    epoch_mean: float = 15.0
    """Epoch of stage `tune` whose prompts weigh most in the teacher's."""
    epoch_std: float = 1.0
    """Standard deviation of these weights in epochs, > 0."""

    counts = (*ClassTextConfig.counts, "prompts", "tune_depth")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("tune_lr", "epoch_std")
        for name in ("tune_epochs", "shots", "text_weight", "image_weight"):
            if getattr(self, name) < 0:
                raise CounterpointError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.tune_epochs and (self.cached or self.teacher.startswith("file:")):
            raise CounterpointError("tune_epochs needs a teacher that is a network, without --cached")

    def check(self) -> None:
        super().check()
        if self.frozen_templates:
            templates_of(self.frozen_templates)

    def facts(self, data: ImageData) -> dict[str, Any]:
        if not self.tune_epochs:
            return super().facts(data)
        self.need_labels(data, "--tune-epochs")
        return super().facts(data) | {"teacher_widths": tuned_widths(self)}

    def need_labels(self, data: ImageData, option: str) -> None:
        """Raise DataError where no training picture has a label of a base class; `option` needs some."""
        labels = np.zeros(0) if data.train.labels is None else data.train.labels
        if not ((labels >= 0) & (labels < self.base_classes(len(data.classes)))).any():
            raise DataError(f"{data.name}: no training picture has a label of a base class, which {option} needs")


def tuned_widths(config: TunedConfig) -> list[int]:
    """Return the widths of a teacher's words, of its tokens of texts, and of tokens of pictures that get prompts.

    Raises CounterpointError for towers that are no transformers, or have fewer blocks than `tune_depth`.
    """
    network = open_network(config.teacher)
    towers = [text_tower(network), *([network.tower] if config.tune_images else [])]
    for tower in towers:
        try:
            count = len(blocks_of(tower))
        except CounterpointError as error:
            raise CounterpointError(f"--teacher {config.teacher}: {error}, or set --no-tune-images") from error
        if count < config.tune_depth:
            raise CounterpointError(
                f"tune_depth {config.tune_depth} is more than the {counted(count, 'block')} of a tower of the teacher; set "
                f"--tune-depth {count} or less"
            )
    return [network.width, *map(prompt_width, towers)]


class _Prompts(nn.Module):
    """Sets of prompts of both towers. The first set of `text` holds words."""

    def __init__(self, count: int, depth: int, widths: Sequence[int]) -> None:
        super().__init__()
        words, tokens, *pixels = widths
        self.text = new_prompts(count, [words, *[tokens] * (depth - 1)])
        self.image = new_prompts(count, [*pixels * depth])


class TunedTeacher(nn.Module):
    """Prompts of a teacher (`current`), and their weighted sum over epochs (`total`). The network is no submodule.

    Args:
        config: the settings.
        widths: what `tuned_widths` returned.
    """

    def __init__(self, config: TunedConfig, widths: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.current, self.total = (_Prompts(config.prompts, config.tune_depth, widths) for _ in range(2))
        self.total.requires_grad_(False)
        for one in self.total.parameters():
            one.zero_()

    def begin(self, network: DualEncoder, classes: Sequence[str]) -> None:
        """Store the texts without prompts. New text prompts begin with the words of the template, a parent's as they are."""
        config = self.config
        self.held = [network]  # in a list, so that it is no submodule
        more = config.class_names, config.descriptions
        words = texts_of(classes, config.frozen_templates or config.templates, *more)
        with torch.no_grad():
            texts = network.texts([text for of in words for text in of]).unflatten(0, (len(words), -1))
        self.frozen_text = F.normalize(texts.mean(1), dim=1, eps=EPS)
        before, _, after = templates_of(config.templates)[0].partition("{}")
        self.names = [text for (text,) in texts_of(classes, "{}" + after, *more)]
        network.token_ids(self.names, config.prompts)  # raises for names that are too long, before the first step
        rows = network.word_rows(before)[: config.prompts] if before.strip() else torch.zeros(0, 1)
        with torch.no_grad():
            if not self.total.text[0].any():
                self.current.text[0][: len(rows)] = rows
            for total in self.total.parameters():
                total.zero_()

    def texts(self, count: int) -> Float[Tensor, "count dim"]:
        """Compute the embeddings of the first classes with prompts, not normalised."""
        network, prompts = self.held[0], list(self.current.text)
        with replaced_prompts(text_tower(network), prompts[1:], network.start):
            return network.text_rows_with_context(prompts[0], self.names[:count], count)

    def images(self, images: Tensor) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of pictures with prompts, not normalised."""
        network = self.held[0]
        with ExitStack() as stack:
            if len(self.current.image):
                stack.enter_context(appended_prompts(network.tower, list(self.current.image)))
            return network.images(images)

    def loss(self, images: Tensor, labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, ""]:
        """Compute the loss of a batch of labelled pictures of the first classes."""
        config, network = self.config, self.held[0]
        with torch.no_grad():
            frozen = network.images(images)
        weights = network.scale, config.text_weight, config.image_weight
        texts, rows = self.texts(classes), self.images(images)
        return prompt_tuning_loss(rows, texts, frozen, self.frozen_text[:classes], labels, *weights)

    @torch.no_grad()
    def add(self, epoch: int, epochs: int) -> None:
        """Add the prompts after an epoch, which counts from 0, to the weighted sum."""
        weight: Any = gaussian_epoch_weights(epochs, self.config.epoch_mean, self.config.epoch_std)[epoch]
        for total, one in zip(self.total.parameters(), self.current.parameters(), strict=True):
            total.add_(weight.to(one) * one)

    @torch.no_grad()
    def finish(self, classes: int) -> Float[Tensor, "classes dim"]:
        """Take the weighted prompts; return the unit embeddings of the first classes with them."""
        self.current.load_state_dict(self.total.state_dict())
        return F.normalize(self.texts(classes), dim=1, eps=EPS)


class TunedLearner(ClassTextLearner):
    """A student of a teacher that a first stage may tune, `tune`. Subclasses write `turn` and, for later stages, `loss`.

    Attributes:
        tuned: the teacher's prompts; None where it stays as it is.
    """

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.tuned = TunedTeacher(config, data.teacher_widths) if config.tune_epochs else None

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.tuned is not None:
            assert self.network is not None
            teacher: Any = self.network.module
            self.tuned.begin(teacher, survey.classes)

    def turn(self, lr: float, modules: Sequence[nn.Module]) -> list[Turn]:
        """Return the turns of a stage that trains these modules."""
        raise NotImplementedError

    def tuned_first(self, then: Stage) -> list[Stage]:
        """Return this stage, behind `tune` where the teacher is tuned."""
        if self.tuned is None:
            return [then]
        config, trained = self.config, [self.tuned.current]
        tune = Stage("tune", config.tune_epochs, lambda: trained, lambda: self.turn(config.tune_lr, trained))
        return [replace(tune, batches=self.few, evaluated=False), replace(then, enter=self.store)]

    @property
    def tuning(self) -> bool:
        """Whether the current stage tunes the teacher."""
        return self.tuned is not None and self.position.stage == 0

    def few(self, survey: Survey) -> Batches:
        """Return batches of the few labelled pictures of base classes, as positions among the pictures that are trained on."""
        labels = np.asarray(survey.labels)[survey.rows]
        rows = class_shots(np.where(labels < self.base, labels, -1), self.config.shots, self.seed)
        size = min(self.config.batch_size, len(rows))
        return ChosenBatches(rows, size, max(1, len(rows) // size))

    def tuning_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of stage `tune`."""
        assert self.tuned is not None
        return {"loss": self.tuned.loss(batch["views"][0], batch["label"], self.base)}

    def end_epoch(self, epoch: int) -> None:
        if self.tuned is not None and self.tuning:
            self.tuned.add(epoch, self.epochs)

    def store(self, survey: Survey) -> None:
        """Take the teacher's prompts, and store its texts of all classes."""
        assert self.tuned is not None
        self.prototypes.copy_(self.tuned.finish(len(self.prototypes)))

    @torch.no_grad()
    def taught_images(self, images: Tensor) -> Float[Tensor, "n dim"]:
        """Compute the teacher's embeddings of normalised pictures."""
        assert self.network is not None
        found: Tensor = self.network(images) if self.tuned is None else self.tuned.images(images)
        return found

    def teacher_rows(self, batch: dict[str, Any]) -> Float[Tensor, "n dim"]:
        return super().teacher_rows(batch) if self.known is not None else self.taught_images(batch["views"][0])

    def of_teacher(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.network is None or self.survey is None:
            return {}
        return {"teacher_logits": self.classify(self.taught_images(batch["image"]))}
