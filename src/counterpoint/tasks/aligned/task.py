"""Provide the loaders and the evaluator of one source of aligned items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import DataLoader

from counterpoint.core.world import processes
from counterpoint.data.images import Indices
from counterpoint.data.pairs import AlignedData, AlignedSplit
from counterpoint.engine.loading import Batches, Position
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.aligned.batches import BATCH, EvaluationBatches, SplitBatches, as_trained, evaluated
from counterpoint.tasks.aligned.classes import prompts_of
from counterpoint.tasks.aligned.evaluator import AlignedEvaluator, measured_splits
from counterpoint.tasks.aligned.settings import AlignedConfig
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.words import counted


@runtime_checkable
class ListedSplit(Protocol):
    """A split of the user's own items. It names items by their rows and lists affected items in a report."""

    def row_names(self, positions: Indices) -> list[str]:
        """Name the origin of each of these items, such as "items.csv row 3 (a17)"."""
        ...

    def list_items(self, modality: str, positions: Indices, what: str, reason: str) -> Path | None:
        """List these items in the data's report, replacing the previous list. Return its file, None if it is empty."""
        ...


class AlignedTask:
    """Loaders and evaluator of one source of aligned items."""

    name = "aligned"
    headline = "mean_recall"  # the measure it judges by
    contract = "aligned"  # the form of data it takes (see counterpoint.data.load)
    at_once = BATCH  # rows of an `evaluation_batch` at most

    def __init__(self, data: AlignedData, config: AlignedConfig) -> None:
        if not isinstance(data, AlignedData) or len(data.modalities) < 2:
            raise CounterpointError(f"{data.name} has fewer than two aligned modalities, which the task aligned needs")
        config.check_batch()
        if len(data.test) < 2:
            raise DataError(f"{data.name}: needs at least 2 test items, has {len(data.test)}")
        self.data = data
        self.config = config
        self.notes: list[str] = []
        everything = np.arange(len(data.train))
        self.tokenizers = {
            name: config.tokenizer([str(text) for text in data.train.column(name, everything)])
            for name, modality in data.modalities.items()
            if modality.kind == "text"
        }
        self.notes += [note for name in self.tokenizers for note in self._cut(name)]
        self.facts: dict[str, Any] = data.spec | {
            "examples": len(data.train),
            "class_names": list(data.classes or ()),
            "domains": list(data.domains),
            "tokenizers": {name: tokenizer.to_json() for name, tokenizer in self.tokenizers.items()},
        }

        self.learned: list[str] = self.facts["class_names"]  # names of the classes of a learner's logits

    def _cut(self, name: str) -> list[str]:
        """Note texts that are longer than the context. Data with a report list them there."""
        count, long, report = 0, list[str](), None
        for called, split in (("training", self.data.train), ("valid", self.data.valid), ("test", self.data.test)):
            texts = [str(text) for text in split.column(name, np.arange(len(split)))]
            at = self.tokenizers[name].too_long(texts, self.config.context)
            count += sum(map(bool, texts))
            long += [f"{called} item {n}" for n in at]
            if isinstance(split, ListedSplit):
                reason = f"longer than the context of {self.config.context} tokens"
                report = split.list_items(name, np.asarray(at, np.int64), "cut", reason)
        if not long:
            return []
        where = f"the first is {long[0]}" if report is None else f"all in {report}"
        return [
            f"{self.data.name}: {len(long)} of {counted(count, 'text')} of {name} are longer than the context of "
            f"{self.config.context} tokens (--context) and lose their end; {where}"
        ]

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Adopt the tokenizers of a trained run and its order of modalities.

        Raises CounterpointError if these data do not fit the run.
        """
        self.data, self.tokenizers = as_trained(self.data, trained)
        self.learned = list(trained.get("class_names", self.facts["class_names"]))

    def check_training(self) -> None:
        """Raise DataError if an epoch would have no step, or if the valid split is too small to monitor training."""
        check_watched(self.data.name, len(self.data.valid), "items")
        if len(self.data.train) < self.config.batch_size:
            raise DataError(
                f"{self.data.name} has {counted(len(self.data.train), 'training item')}, fewer than a batch of "
                f"{self.config.batch_size}; use --batch-size {max(2, len(self.data.train))} or less"
            )

    def _batches(self, split: AlignedSplit) -> SplitBatches:
        return SplitBatches(self.data, split, self.tokenizers, self.config.context)

    def split(self, name: str) -> AlignedSplit:
        """Return the split of this name: train, valid, test or, if it exists, unpaired.

        Raises CounterpointError for another name.
        """
        found: AlignedSplit = named_split(self.data, name)
        return found

    def evaluation_batch(self, split: str | AlignedSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these items of a split as a learner's `predict` takes them: images normalised, no augmentation."""
        found = self.split(split) if isinstance(split, str) else split
        return evaluated(self._batches(found), list(map(int, rows)), "survey")

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        workers = self.config.workers
        own = Batches(len(self.data.train), self.config.batch_size, drop_last=True)
        chosen = own if batches is None else batches
        return DataLoader(
            self._batches(self.data.train),
            batch_size=None,
            sampler=chosen.bind(seed, position, *processes()),
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the batches for `evaluator(split)`: items of the split valid or test, then prompts, then training items."""
        prompts = None
        if self.data.classes and self.tokenizers:
            name, tokenizer = next(iter(self.tokenizers.items()))
            prompts = {name: tokenizer.encode(prompts_of(self.data.classes, self.config), self.config.context)}
        parts = {prefix: self._batches(part) for prefix, part in measured_splits(self.data, split).items()}
        batches = EvaluationBatches(parts, prompts, self._batches(self.data.train))
        return DataLoader(batches, batch_size=None, shuffle=False)

    def evaluator(self, split: str) -> AlignedEvaluator:
        return AlignedEvaluator(self.data, self.learned, split)
