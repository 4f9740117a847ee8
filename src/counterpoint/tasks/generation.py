"""Define the task `generation`: make pictures of conditions; judges that were trained apart measure the pictures.

A training batch:

    batch["image"]    [B, 3, size, size] uint8
    batch["ids"]      [B, T] numbers of the words of the captions
    batch["mask"]     [B, T] True at words, False at padding
    batch["label"]    [B] class numbers, -1 for none
    batch["index"]    [B] positions of the items

An evaluation batch also has "captions", the texts. For data with subjects it has "reference", another picture of each
subject. A learner's `predict` returns

- "pictures" [n, 3, size, size] uint8, a picture generated for each caption; None before it can generate;
- "codes", optional: its own rows of pictures and captions, by the names "image" and "text";
- "words" and "real", optional: rows of each picture's subject, learnt and of a frozen encoder (tasks/measures/subjects.py).

Measures (tasks/measures/generation.py): `frechet_distance`, `class_accuracy` and `r_precision` of the generated pictures by a
judge. Of codes: `image_purity` and `text_purity` are the share of items whose nearest other item is of their class.
`code_r_precision` is the share of real pictures nearest to their own caption among 30.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.seeds import generator_of, seed_torch
from counterpoint.core.world import processes
from counterpoint.data.generation import Condition, GenerationData, GenerationSplit
from counterpoint.data.images import Indices
from counterpoint.data.shown import png
from counterpoint.encoders.text import UNKNOWN, Tokenizer, train_words
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.optim import OptimConfig
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.branches import Partners
from counterpoint.tasks.measures.classes import purity
from counterpoint.tasks.measures.generation import CANDIDATES, Judge, judged, r_precision, trained_judge
from counterpoint.tasks.measures.subjects import picture_error, subject_measures
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.words import counted

AT_ONCE = 128  # items in a batch of the evaluation
SHOWN = 8  # captions on a run's page
CELL = 96  # pixels of a picture on the page
CLASSES, GENERATED = 12, 8  # on the page: classes, and generated pictures of each


@dataclass
class GenerationConfig(OptimConfig):
    """Settings of every learner that generates pictures."""

    epochs: int = 600
    """Passes over the training pictures in the last stage, which trains the generator."""
    batch_size: int = 20
    """Pictures in a batch, over all processes together."""
    vocabulary: int = 5000
    """Maximum number of words, the most frequent of the training captions. Others count as one unknown word."""
    context: int = 18
    """Maximum number of words of a caption that are read; further words are cut, and counted in a note."""
    evaluate_every: int = 10
    """Epochs between evaluations; the last epoch is always evaluated."""

    counts: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "vocabulary", "context", "evaluate_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count(*self.counts)

    def check(self) -> None:
        """Raise CounterpointError for names that do not exist. Runs before data are read."""

    def facts(self, data: GenerationData) -> dict[str, Any]:
        """Return the facts of the data that a learner with these settings needs, fit for JSON."""
        return data.spec | {"tokenizer": train_words(data.train.captions, self.vocabulary).to_json()}


# ---------------------------------------------------------------------------------------------------------- the learner


class GenerationLearner(Learner):
    """A learner that generates pictures. Subclasses write `loss`, `turns`, `made` and, if they have codes, `codes`."""

    config: Any

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        seed_torch(seed)
        self.size = int(data.size)
        self.tokenizer = Tokenizer.from_json(data.tokenizer)

    def made(self, batch: dict[str, Any], generator: torch.Generator) -> Float[Tensor, "n 3 size size"] | None:
        """Generate a picture in -1..1 for each caption of a batch with "ids", "mask" and "subject".

        "subject" is None or, for each row, a list of uint8 pictures. None: the learner cannot generate yet.
        """
        raise CounterpointError(f"{type(self).__name__} does not generate; write its method `made`")

    def codes(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return rows of pictures ("image") and captions ("text") in a shared space; {} without such a space."""
        return {}

    def encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the word numbers and the mask of texts, on the learner's device."""
        ids, mask = self.tokenizer.encode(list(texts), self.config.context)
        return {"ids": ids.to(self.device), "mask": mask.to(self.device)}

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text that the learner does not know, each once."""
        found = self.tokenizer.model.encode(text)
        parts = (text[a:b] for token, (a, b) in zip(found.tokens, found.offsets, strict=True) if token == UNKNOWN)
        return list(dict.fromkeys(parts))

    def check_condition(self, condition: Condition) -> None:
        """Raise CounterpointError for a condition that the learner does not take; here, one with pictures of a subject."""
        if condition.subject:
            raise CounterpointError(
                "this run makes pictures of prompts alone and takes no subject; leave out --subject"
            )

    @torch.no_grad()
    def generate(self, conditions: Sequence[Condition], seed: int = 0) -> UInt8[Tensor, "n 3 size size"]:
        """Generate a picture for each condition, in evaluation mode.

        Args:
            conditions: what to generate; equal conditions give different pictures.
            seed: seed of the noise; the same conditions and seed give the same pictures.

        Raises CounterpointError for no condition, and for a text without a word or with more words than the learner reads. Raises
        it too where nothing has been trained to generate.
        """
        if not conditions:
            raise CounterpointError("give at least one prompt")
        for condition in conditions:
            many = len(self.tokenizer.model.encode(condition.text).ids)
            if not 0 < many <= self.config.context:
                raise CounterpointError(
                    f"the prompt '{condition.text}' has {many} words, and this learner reads 1 to {self.config.context}; "
                    "change the prompt"
                )
            self.check_condition(condition)
        generator = generator_of(seed)
        training = self.training
        self.eval()
        try:
            parts = []
            for start in range(0, len(conditions), AT_ONCE):
                chosen = conditions[start : start + AT_ONCE]
                subject = [list(one.subject) for one in chosen]
                batch = self.encoded([one.text for one in chosen]) | {"subject": subject if any(subject) else None}
                found = self.made(batch, generator)
                if found is None:
                    raise CounterpointError("this learner has no trained generator; finish its training first")
                parts.append(eight_bit(found))
        finally:
            self.train(training)
        return torch.cat(parts)

    @torch.no_grad()
    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show a real picture of each class, and pictures generated for captions of the class."""
        split, names = survey.split("test"), survey.classes
        rows = []
        for label in range(min(len(names), CLASSES)):
            own = np.flatnonzero(split.labels == label)[:GENERATED]
            if len(own):
                captions = [split.captions[own[n % len(own)]] for n in range(GENERATED)]
                made = self.generate([Condition(text) for text in captions], seed=label)
                real = torch.from_numpy(split.images(own[:1])).permute(0, 3, 1, 2)
                rows.append([enlarged(picture) for picture in (*real, *made)])
        if not rows:
            return {}
        columns = ["real", *(f"caption {n}" for n in range(1, GENERATED + 1))]
        said = (
            f"A row for each class of the test pictures ({', '.join(names[:CLASSES])}), in this order where it has one."
        )
        return {"Generated pictures by class": {"kind": "pictures", "columns": columns, "rows": rows, "caption": said}}

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = self.made(batch | {"subject": None}, generator_of(self.seed, *batch["index"][:1].tolist()))
        return {"pictures": None if found is None else eight_bit(found), "codes": self.codes(batch)}


def eight_bit(pictures: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 3 h w"]:
    """Convert pictures in -1..1 to bytes."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def signed(pictures: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Convert bytes to pictures in -1..1."""
    return pictures.float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------- the task


class _Items(Dataset[dict[str, Any]]):
    """Batches of items by lists of positions."""

    def __init__(self, split: GenerationSplit, tokenizer: Tokenizer, context: int, *, asked: bool = False) -> None:
        self.split, self.tokenizer, self.context, self.asked = split, tokenizer, context, asked

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        rows = np.asarray(positions, np.int64)
        captions = [self.split.captions[row] for row in rows]
        ids, mask = self.tokenizer.encode(captions, self.context) if captions else (torch.zeros(0, 1).long(),) * 2
        found = {
            "image": torch.from_numpy(self.split.images(rows)).permute(0, 3, 1, 2).contiguous(),
            "ids": ids,
            "mask": mask.bool(),
            "label": torch.from_numpy(self.split.labels[rows]),
            "index": torch.from_numpy(rows),
        }
        if self.asked and self.split.subjects is not None:
            others = torch.from_numpy(self.split.images(self.references[rows])).permute(0, 3, 1, 2)
            found |= {"reference": others.contiguous()}
        return found | ({"captions": captions} if self.asked else {})

    @cached_property
    def references(self) -> Indices:
        """The next item of each item's subject, in a circle: its reference in an evaluation."""
        assert self.split.subjects is not None
        every = torch.arange(len(self.split))
        return Partners(torch.from_numpy(self.split.subjects)).of(every, torch.zeros(len(every))).numpy()


class GenerationTask:
    """Loaders and evaluator of one source of pictures with captions."""

    name = "generation"
    contract = "generation"  # the form of data it takes (see counterpoint.data.load)
    headline = "frechet_distance"  # the measure it judges by
    lower: ClassVar[bool] = True  # a smaller headline is better
    at_once = AT_ONCE

    def __init__(self, data: GenerationData, config: Any) -> None:
        if not isinstance(data, GenerationData):
            raise CounterpointError(
                f"{data.name} has no pictures with captions, which generation needs; name another source"
            )
        if len(data.train) < 2 or len(data.test) < 2:
            raise DataError(
                f"{data.name}: needs 2 training and 2 test pictures, has {len(data.train)} and {len(data.test)}"
            )
        self.data, self.config = data, config
        self.notes: list[str] = []

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings."""
        found: dict[str, Any] = self.config.facts(self.data)
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: of these captions, or of a trained run (`check_facts`)."""
        return Tokenizer.from_json(self.facts["tokenizer"])

    @cached_property
    def judge(self) -> Judge:
        """The judge, trained on the training split."""
        return trained_judge(self.data.train, len(self.data.classes))

    def split(self, name: str) -> GenerationSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: GenerationSplit = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError where an epoch has no step or the valid split is too small. Count captions that are cut."""
        check_watched(self.data.name, len(self.data.valid), "pictures with captions")
        if len(self.data.train) < self.config.batch_size:
            raise DataError(
                f"{self.data.name} has {counted(len(self.data.train), 'training picture')}, fewer than a batch of "
                f"{self.config.batch_size}; "
                f"use --batch-size {len(self.data.train)} or less"
            )
        cut = len(self.tokenizer.too_long(self.data.train.captions, self.config.context))
        if cut:
            self.notes.append(
                f"{cut} of {counted(len(self.data.train), 'training caption has', 'training captions have')} more than "
                f"{self.config.context} words, of which the last "
                "are not read; raise --context to read them"
            )

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Take the tokenizer of a trained run. CounterpointError for pictures of another size or for other classes."""
        for name in ("size", "class_names"):
            if trained[name] != self.data.spec[name]:
                raise CounterpointError(
                    f"the run was trained on {name} {trained[name]}, {self.data.name} has {self.data.spec[name]}"
                )
        self.facts = dict(trained)

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        chosen = Batches(len(self.data.train), self.config.batch_size, drop_last=True) if batches is None else batches
        items = _Items(self.data.train, self.tokenizer, self.config.context)
        return DataLoader(items, batch_size=None, sampler=chosen.bind(seed, position, *processes()))

    def evaluation_batch(self, split: str | GenerationSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these items of a split as a learner's `predict` takes them."""
        chosen = self.split(split) if isinstance(split, str) else split
        return _Items(chosen, self.tokenizer, self.config.context, asked=True)[list(map(int, rows))]

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the items of a split, in order."""
        items = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(items)))) for start in range(0, len(items), AT_ONCE)]
        asked = _Items(items, self.tokenizer, self.config.context, asked=True)
        return DataLoader(asked, batch_size=None, sampler=at)

    def evaluator(self, split: str) -> GenerationEvaluator:
        return GenerationEvaluator(self, self.split(split))


class GenerationEvaluator:
    """Measure the pictures and codes of one split."""

    def __init__(self, task: GenerationTask, split: GenerationSplit) -> None:
        self.task, self.split = task, split
        self.reset()

    def reset(self) -> None:
        self.rows: list[int] = []
        self.pictures: list[Tensor] = []
        self.codes: dict[str, list[Tensor]] = {}
        self.own: dict[str, list[Tensor]] = {"words": [], "real": []}  # rows of subjects
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        self.rows += batch["index"].tolist()
        if outputs["pictures"] is not None:
            self.pictures.append(outputs["pictures"].cpu())
        for name in self.own.keys() & outputs.keys():
            self.own[name].append(_finite(outputs[name]))
        for name, rows in outputs.get("codes", {}).items():
            self.codes.setdefault(name, []).append(_finite(rows))

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found: dict[str, float] = {}
        rows = np.array(self.rows)
        labels, captions = torch.from_numpy(self.split.labels[rows]), [self.split.captions[row] for row in rows]
        codes = {name: torch.cat(parts) for name, parts in self.codes.items()}
        if self.pictures:
            real, fake = torch.from_numpy(self.split.images(rows)).permute(0, 3, 1, 2), torch.cat(self.pictures)
            found |= judged(self.task.judge, real, fake, captions, labels)
            if final:
                self.figures |= shown_pictures(real, fake, captions)
            if self.split.subjects is not None:
                found["picture_error"] = picture_error(fake, real)
        if self.split.subjects is not None and self.own["words"]:
            words, alike = (torch.cat(self.own[name]) for name in ("words", "real"))
            found |= subject_measures(words, alike, torch.from_numpy(self.split.subjects[rows]), labels)
        if self.task.data.classes:
            found |= {f"{name}_purity": purity(of, labels, k=1) for name, of in codes.items()}
        if {"image", "text"} <= codes.keys():
            found["code_r_precision"] = r_precision(codes["image"], codes["text"], captions)
        return found

    def chance(self) -> dict[str, float]:
        """Return the level of a guess, for the measures that have one."""
        known = self.split.labels[self.split.labels >= 0]
        share = np.bincount(known).max() / len(known) if len(known) else 0.0
        one = 1 / min(CANDIDATES, len(self.split))
        return {
            "class_accuracy": float(share),
            "r_precision": one,
            "code_r_precision": one,
            "image_purity": float(np.mean(np.bincount(known)[known] / len(known))) if len(known) else 0.0,
        }


def _finite(rows: Tensor) -> Tensor:
    if not bool(rows.isfinite().all()):
        raise diverged("the codes hold NaN or infinite values")
    return rows.float().cpu()


def shown_pictures(real: Tensor, fake: Tensor, captions: Sequence[str]) -> dict[str, Any]:
    """Draw real pictures beside generated ones, each with its caption."""
    rows = []
    for n in np.unique(np.linspace(0, len(captions) - 1, min(len(captions), SHOWN)).astype(int)):
        cells = [{"png": enlarged(one[n]), "text": text} for one, text in ((real, "real"), (fake, str(captions[n])))]
        rows.append(cells)
    lines = [{"cells": [cell for pair in rows[start : start + 2] for cell in pair]} for start in range(0, len(rows), 2)]
    said = "Test pictures, and the picture generated for the caption of each."
    return {"Generated pictures": {"kind": "captioned", "rows": lines, "caption": said}}


def enlarged(picture: UInt8[Tensor, "3 h w"]) -> str:
    """Encode a picture for the page, enlarged by whole pixels where it is small."""
    pixels = picture.permute(1, 2, 0).cpu().numpy()
    larger = max(1, CELL // max(pixels.shape[:2]))
    return png(pixels.repeat(larger, axis=0).repeat(larger, axis=1), largest=2 * CELL)


TASK = GenerationTask
