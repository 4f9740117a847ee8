"""Load batches of aligned items for training, for an evaluation, and from sets that are not trained on."""

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

BATCH = 256  # items in a batch of the evaluation
EXAMPLES = 2048  # maximum number of training items that represent their classes


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
        present = {name: torch.from_numpy(self.split.present(name, rows)) for name in self.data.modalities}
        return {
            "inputs": {name: self.inputs(name, rows) for name in self.data.modalities},
            "present": present,
            "whole": frozenset(name for name, mask in present.items() if bool(mask.all())),
            "index": torch.from_numpy(rows),
            "label": None if labels is None else torch.from_numpy(labels[rows]),
        }

    def __len__(self) -> int:
        return len(self.split)


class EvaluationBatches(Dataset[dict[str, Any]]):
    """Batches of an evaluation: the items of every measured split, then the classes' prompts, then training items.

    The prompts are one batch of texts alone.
    """

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
        # Draw them at random, because the first items of a sorted set belong to one class.
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
    """Return items as `predict` takes them: images normalised, no augmentation."""
    batch = batches[rows]
    kinds = batches.data.modalities
    batch["inputs"] = {k: normalise(v) if kinds[k].kind == "image" else v for k, v in batch["inputs"].items()}
    return batch | {"part": part}


def as_trained(data: AlignedData, trained: Mapping[str, Any]) -> tuple[AlignedData, dict[str, Tokenizer]]:
    """Return the data with its modalities in a trained run's order, and the run's tokenizers.

    Raises CounterpointError if the data have other modalities.
    """
    if trained["modalities"] != data.spec["modalities"]:
        raise CounterpointError(
            f"{data.name} has the modalities {data.spec['modalities']}, the run was trained on {trained['modalities']}"
        )
    # Learners combine modalities in the order of the data.
    data = replace(data, modalities={name: data.modalities[name] for name in trained["modalities"]})
    return data, {name: Tokenizer.from_json(text) for name, text in trained["tokenizers"].items()}
