"""Batches of aligned items: of training, of an evaluation, and of a set that is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from counterpoint.data.pairs import AlignedData, AlignedSplit
from counterpoint.encoders.text import Tokenizer
from counterpoint.errors import CounterpointError
from counterpoint.views.images import normalise

BATCH = 256  # of evaluation
EXAMPLES = 2048  # training items that stand for their classes, at most


class SplitBatches(Dataset[dict[str, Any]]):
    """A split, read by lists of positions."""

    def __init__(
        self, data: AlignedData, split: AlignedSplit, tokenizers: Mapping[str, Tokenizer], length: int
    ) -> None:
        self.data, self.split, self.tokenizers, self.length = data, split, tokenizers, length

    def inputs(self, name: str, rows: Any) -> Any:
        column = self.split.column(name, rows)
        kind = self.data.modalities[name].kind
        if kind == "text":
            return self.tokenizers[name].encode([str(text) for text in column], self.length)
        tensor = torch.from_numpy(np.asarray(column))
        return tensor.permute(0, 3, 1, 2).contiguous() if kind == "image" else tensor

    def __getitem__(self, indices: list[int]) -> dict[str, Any]:
        rows = np.asarray(indices, np.int64)
        labels = self.split.labels
        return {
            "inputs": {name: self.inputs(name, rows) for name in self.data.modalities},
            "present": {name: torch.from_numpy(self.split.present(name, rows)) for name in self.data.modalities},
            "index": torch.from_numpy(rows),
            "label": None if labels is None else torch.from_numpy(labels[rows]),
        }

    def __len__(self) -> int:
        return len(self.split)


class EvaluationBatches(Dataset[dict[str, Any]]):
    """The items of every split that is measured, then what says what a class is: its prompts as a batch of texts alone, and
    training items."""

    def __init__(
        self, splits: Mapping[str, SplitBatches], prompts: dict[str, Any] | None, examples: SplitBatches
    ) -> None:
        self.prompts = prompts
        self.at = [
            (prefix, batches, list(range(start, min(start + BATCH, len(batches)))))
            for prefix, batches in splits.items()
            for start in range(0, len(batches), BATCH)
        ]
        labels = examples.split.labels
        known = np.array([], np.int64) if labels is None else np.flatnonzero(labels >= 0)
        # The first ones would be of one kind where a set is in order.
        chosen = np.random.RandomState(0).permutation(known)[:EXAMPLES].tolist() if len(known) else []
        self.examples = [(examples, chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH)]

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number < len(self.at):
            prefix, batches, rows = self.at[number]
            return evaluated(batches, rows, "items") | {"split": prefix}
        number -= len(self.at)
        if self.prompts is not None:
            if number == 0:
                return {"inputs": self.prompts, "part": "prompts"}
            number -= 1
        return evaluated(*self.examples[number], "examples")

    def __len__(self) -> int:
        return len(self.at) + (self.prompts is not None) + len(self.examples)


def evaluated(batches: SplitBatches, rows: list[int], part: str) -> dict[str, Any]:
    """Items as `predict` takes them: images normalised, nothing varied."""
    batch = batches[rows]
    kinds = batches.data.modalities
    batch["inputs"] = {k: normalise(v) if kinds[k].kind == "image" else v for k, v in batch["inputs"].items()}
    return batch | {"part": part}


def as_trained(data: AlignedData, trained: Mapping[str, Any]) -> tuple[AlignedData, dict[str, Tokenizer]]:
    """Data with its modalities in the order that a run was trained on, and that run's tokenizers.

    CounterpointError when its modalities are others.
    """
    if trained["modalities"] != data.spec["modalities"]:
        raise CounterpointError(
            f"{data.name} gives {data.spec['modalities']}, the run was trained on {trained['modalities']}"
        )
    # Learners put modalities side by side as they come.
    data = replace(data, modalities={name: data.modalities[name] for name in trained["modalities"]})
    return data, {name: Tokenizer.from_json(text) for name, text in trained["tokenizers"].items()}
