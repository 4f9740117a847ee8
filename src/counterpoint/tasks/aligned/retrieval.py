"""Retrieval from every modality to every other, and from all others together; chance levels; the gap between two.

Every function takes `there`, {modality: [items] bool}: which items have the modality.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from counterpoint.core.gap import gap_metrics
from counterpoint.data.pairs import AlignedData, AlignedSplit
from counterpoint.tasks.measures import RECALL, class_chance, identification, retrieval, retrieval_chance

# What of the gap between two modalities is reported, under which name.
GAP = {
    "centroid_distance": "centroid_distance",
    "separability": "linear_separability",
    "uniformity": "total_uniformity_loss",
    "alignment": "alignment",
}
GAP_PAIRS = 1000  # test items that the gap between two modalities is measured on, at most


class Sameness:
    """Which items of a split are one thing in a modality, and so are right for each other's queries."""

    def __init__(self, data: AlignedData, split: AlignedSplit) -> None:
        self.data, self.split = data, split
        rows = np.arange(len(split))
        # What the source knows of items that are one thing in a modality.
        known = getattr(split, "same", None)
        self.known: dict[str, Tensor] = {}
        for name in data.modalities:
            numbers = None if known is None else known(name)
            if numbers is not None:
                self.known[name] = _apart(torch.from_numpy(numbers))
        # Items with the very same text are one: a picture of "arrow" may be found by any of its captions.
        self.worded: Tensor | None = None
        for name, modality in data.modalities.items():
            if modality.kind == "text" and not self.known:
                first: dict[str, int] = {}
                texts = split.column(name, rows)
                self.worded = torch.tensor([first.setdefault(str(t), n) if t else n for n, t in enumerate(texts)])
                break
        # What is the very same thing in a modality cannot be told apart there, whatever else the items are.
        self.same = {name: self.known.get(name, self._same(name, rows)) for name in data.modalities}

    def _same(self, name: str, rows: Int[np.ndarray, " items"]) -> Int[Tensor, " items"]:
        """Number the items of a modality: equal numbers where text or vector is equal."""
        if name in self.known or self.data.modalities[name].kind not in ("text", "vector"):
            return torch.from_numpy(rows)
        column = self.split.column(name, rows)
        if isinstance(column, list):  # an array of texts would have the longest one's width in every row
            first: dict[str, int] = {}
            return torch.tensor([first.setdefault(str(text), n) for n, text in enumerate(column)])
        return torch.from_numpy(np.unique(np.asarray(column), axis=0, return_inverse=True)[1].reshape(-1))

    def right(self, query: str, key: str) -> Int[Tensor, "items columns"]:
        """Number the items: an item is right for another's query where they have a number in common, column by column.

        Args:
            query: the modality that is asked with.
            key: the modality that is searched in.
        """
        if self.worded is not None:
            return self.worded[:, None]
        return torch.stack([self.same[query], self.same[key]] if self.known else [self.same[key]], 1)

    def right_jointly(self, key: str, modalities: Sequence[str], whole: Tensor) -> Int[Tensor, "whole columns"]:
        """Number the items that have all modalities, as `right` does, for queries of all modalities but `key`.

        Args:
            key: the modality that is searched in.
            modalities: all of them.
            whole: [items] bool; the items that have all.
        """
        groups = self.same[key][whole, None]
        if self.known:  # the same in all that is asked with, or in what is searched
            asked = torch.stack([self.same[other] for other in modalities if other != key], 1)
            groups = torch.cat([groups, asked.unique(dim=0, return_inverse=True)[1][whole, None]], 1)
        return groups


def _apart(numbers: Tensor) -> Tensor:
    """Give each item that lacks the modality (-1) a number of its own."""
    lone = numbers < 0
    return torch.where(lone, -1 - torch.arange(len(numbers)), numbers)


def _others(key: str, modalities: Sequence[str]) -> str:
    """Name all modalities but one."""
    return "_and_".join(other for other in modalities if other != key)


def _to_each(found: Mapping[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """Average the recalls over the modalities asked with; nothing for two modalities."""
    if len(modalities) < 3:
        return {}
    return {
        f"to_{b}_r{k}": float(np.mean([found[f"{a}_to_{b}_r{k}"] for a in modalities if a != b]))
        for b, k in itertools.product(modalities, RECALL)
    }


def pairwise_figures(
    all_of: Mapping[str, Tensor], there: Mapping[str, Tensor], same: Sameness, wholes: Tensor | None
) -> dict[str, float]:
    """Measure retrieval from every modality to every other.

    Args:
        all_of: {modality: [items, dim]} embeddings.
        there: see the module.
        same: which items are right.
        wholes: [items] the number of what each item was cut from; None where items were cut from nothing.
    """
    found, more = dict[str, float](), dict[str, float]()
    for a, b in itertools.permutations(all_of, 2):
        query, key = all_of[a][there[a]], all_of[b][there[b]]
        right = same.right(a, b)
        measured = retrieval(query, key, right[there[a]], right[there[b]])
        found |= {f"{a}_to_{b}_r{k}": measured[f"r{k}"] for k in RECALL}
        more[f"{a}_to_{b}_mrr"] = measured["mrr"]
        if wholes is not None:
            told = identification(query, key, wholes[there[a]], wholes[there[b]])
            more |= {f"{a}_to_{b}_group_{name}": value for name, value in told.items()}
    # Two modalities that no item of the split has together have no figure.
    mean = {"mean_recall": float(np.nanmean(list(found.values())))} if found else {}
    return mean | found | more | _to_each(found, list(all_of))


def pairwise_chance(
    modalities: Sequence[str], there: Mapping[str, Tensor], same: Sameness, wholes: Tensor | None
) -> dict[str, float]:
    """Return the chance levels of `pairwise_figures`: those of keys in random order."""
    found, more = dict[str, float](), dict[str, float]()
    for a, b in itertools.permutations(modalities, 2):
        right = same.right(a, b)
        made = retrieval_chance(right[there[a]], right[there[b]])
        found |= {f"{a}_to_{b}_r{k}": made[f"r{k}"] for k in RECALL}
        more[f"{a}_to_{b}_mrr"] = made["mrr"]
        if wholes is not None:
            more[f"{a}_to_{b}_group_accuracy"] = class_chance(len(wholes[there[b]].unique()))
    known = [value for value in found.values() if value == value]
    mean = {"mean_recall": float(np.mean(known))} if known else {}
    return mean | found | more | _to_each(found, modalities)


def joint_figures(
    queries: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    same: Sameness,
    labels: Tensor | None,
) -> dict[str, float]:
    """Measure retrieval from all other modalities together, of the items that have them all.

    Args:
        queries: {modality searched in: [items, dim]}; empty where the learner gives none.
        keys: {modality: [items, dim]} embeddings.
        there, same: as for `pairwise_figures`.
        labels: [items] classes, -1 for none; None where no item has one.
    """
    if not queries:
        return {}
    whole = torch.stack(list(there.values())).all(0)
    found: dict[str, float] = {}
    for name, query in queries.items():
        groups = same.right_jointly(name, list(keys), whole)
        measured = retrieval(query[whole], keys[name][whole], groups, groups)
        found |= {f"{_others(name, list(keys))}_to_{name}_r{k}": measured[f"r{k}"] for k in RECALL}
    figures = found | {"joint_recall": float(np.mean(list(found.values())))}
    if labels is not None and bool((known := whole & (labels >= 0)).any()):
        # Of the class alone: where several items show the same thing.
        for name, query in queries.items():
            told = retrieval(query[known], keys[name][known], labels[known], labels[known])
            figures[f"{_others(name, list(keys))}_to_{name}_class_r1"] = told["r1"]
    return figures


def joint_chance(
    queries: Sequence[str],
    modalities: Sequence[str],
    there: Mapping[str, Tensor],
    same: Sameness,
    labels: Tensor | None,
) -> dict[str, float]:
    """Return the chance levels of `joint_figures`; `queries` are the modalities searched in."""
    if not queries:
        return {}
    whole = torch.stack(list(there.values())).all(0)
    found, by_class = dict[str, float](), dict[str, float]()
    for name in queries:
        others = _others(name, modalities)
        groups = same.right_jointly(name, modalities, whole)
        made = retrieval_chance(groups, groups)
        found |= {f"{others}_to_{name}_r{k}": made[f"r{k}"] for k in RECALL}
        if labels is not None and bool((known := whole & (labels >= 0)).any()):
            by_class[f"{others}_to_{name}_class_r1"] = retrieval_chance(labels[known], labels[known])["r1"]
    return found | {"joint_recall": float(np.mean(list(found.values())))} | by_class


def gap_figures(all_of: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> dict[str, float]:
    """Measure how far every two modalities lie apart, on the first GAP_PAIRS items that have both."""
    found = dict[str, float]()
    for a, b in itertools.combinations(all_of, 2):
        both = (there[a] & there[b]).nonzero().flatten()[:GAP_PAIRS]
        if len(both) > 1:
            gap = gap_metrics(all_of[a][both], all_of[b][both])
            found |= {f"{a}_{b}_{short}": gap[name] for short, name in GAP.items()}
    return found
