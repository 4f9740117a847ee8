"""Collect a learner's outputs for one split of aligned items, and compute its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from counterpoint.data.pairs import AlignedData, AlignedSplit
from counterpoint.errors import diverged
from counterpoint.tasks.aligned.classes import Examples, by_examples, by_probe, by_prompts, chance
from counterpoint.tasks.aligned.retrieval import (
    Sameness,
    gap_figures,
    joint_chance,
    joint_figures,
    pairwise_chance,
    pairwise_figures,
)
from counterpoint.tasks.measures import class_chance, decided_shares


class Seen:
    """Collect a learner's outputs for one split, batch by batch, and measure them.

    Args:
        data: the data.
        split: the split to measure.
        comparable: whether the learner's logits have the data's classes (default); False: ignore them.
    """

    def __init__(self, data: AlignedData, split: AlignedSplit, comparable: bool = True) -> None:
        self.comparable = comparable
        self.same = Sameness(data, split)
        self.wholes = None if split.groups is None else torch.from_numpy(split.groups)
        self.reset()

    def reset(self) -> None:
        # By the prefix of the embedding, "" for "embedding" itself, then by modality.
        self.embeddings: dict[str, dict[str, list[Tensor]]] = {}
        self.present: dict[str, list[Tensor]] = {}
        self.queries: dict[str, list[Tensor]] = {}
        self.labels: list[Tensor] = []
        self.logits: list[Tensor] = []

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        for prefix, found in embeddings_of(outputs):
            for name, value in found.items():
                self.embeddings.setdefault(prefix, {}).setdefault(name, []).append(value)
        for name, query in outputs.get("joint", {}).items():
            self.queries.setdefault(name, []).append(query.detach().float().cpu())
        for name, mask in batch["present"].items():
            self.present.setdefault(name, []).append(mask.cpu())
        if "logits" in outputs and self.comparable:
            self.logits.append(outputs["logits"].detach().float().cpu())
        if batch["label"] is not None:
            self.labels.append(batch["label"].cpu())

    def whole(self, prefix: str) -> dict[str, Tensor]:
        """Return {modality: [items, dim]} of an embedding by its prefix, "" for "embedding" itself."""
        return {name: torch.cat(parts) for name, parts in self.embeddings[prefix].items()}

    @property
    def there(self) -> dict[str, Tensor]:
        """{modality: [items] bool}: True where an item has the modality."""
        return {name: torch.cat(parts) for name, parts in self.present.items()}

    @property
    def label(self) -> Tensor | None:
        """[items] classes, -1 for none; None if no item has one."""
        return torch.cat(self.labels) if self.labels else None

    def compute(
        self, prompts: Mapping[str, Mapping[str, Tensor]], examples: Mapping[str, Examples], final: bool
    ) -> dict[str, float]:
        """Measure the collected outputs.

        Args:
            prompts: embeddings of the classes' prompts, by the prefix of the embedding: {text modality: [classes, dim]}.
            examples: embeddings and classes of training items, likewise: {modality: ([n, dim], [n] classes)}.
            final: also fit linear probes.

        Raises CounterpointError for embeddings that are not finite.
        """
        labels, there, found = self.label, self.there, dict[str, float]()
        if self.logits and labels is not None:
            known = labels >= 0
            found["accuracy"] = float(decided_shares(torch.cat(self.logits)[known], labels[known]).mean())
        for prefix in self.embeddings:
            all_of = self.whole(prefix)
            if not all(bool(torch.isfinite(value).all()) for value in all_of.values()):
                raise diverged("the embeddings hold NaN or infinite values")
            measured = pairwise_figures(all_of, there, self.same, self.wholes) | gap_figures(all_of, there)
            if labels is not None:
                if prefix in prompts:
                    measured |= by_prompts(all_of, there, labels, prompts[prefix])
                else:
                    measured |= by_examples(all_of, there, labels, examples.get(prefix, {}))
                if final:
                    measured |= by_probe(all_of, there, labels, examples.get(prefix, {}))
            found |= {f"{prefix}{k}": v for k, v in measured.items()}
        queries = {name: torch.cat(parts) for name, parts in self.queries.items()}
        return found | joint_figures(queries, self.whole(""), there, self.same, labels)

    def chance(self, prompts: Mapping[str, Mapping[str, Tensor]], examples: Mapping[str, Examples]) -> dict[str, float]:
        """Return the chance level of recalls and accuracies: that of keys in random order, and 1 / classes."""
        there, found = self.there, dict[str, float]()
        if self.logits:
            found["accuracy"] = class_chance(self.logits[0].shape[1])
        for prefix, all_of in self.embeddings.items():
            made = pairwise_chance(list(all_of), there, self.same, self.wholes)
            made |= chance(list(all_of), prompts.get(prefix, {}), examples.get(prefix, {}))
            found |= {f"{prefix}{name}": value for name, value in made.items()}
        modalities = list(self.embeddings.get("", {}))
        return found | joint_chance(list(self.queries), modalities, there, self.same, self.label)


def embeddings_of(outputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (prefix, {modality: [n, dim]}) for each embedding of a learner; the prefix of "embedding" itself is ""."""
    for key in outputs:
        if key.endswith("embedding"):
            values = {name: value.detach().float().cpu() for name, value in outputs[key].items()}
            yield key.removesuffix("embedding"), values
