"""Measure retrieval from every modality to every other and from all others together, chance levels, and gaps.

Every function takes `there`, {modality: [items] bool}: True where an item has the modality.
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

# Names of the reported figures of the gap between two modalities, and their names in `gap_metrics`.
GAP = {
    "centroid_distance": "centroid_distance",
    "separability": "linear_separability",
    "uniformity": "total_uniformity_loss",
    "alignment": "alignment",
}
GAP_PAIRS = 1000  # maximum number of test items on which the gap between two modalities is measured


class Sameness:
    """Groups of items of a split that are identical in a modality, and are therefore right for each other's queries."""

    def __init__(self, data: AlignedData, split: AlignedSplit) -> None:
        self.data, self.split = data, split
        rows = np.arange(len(split))
        # Groups of identical items that the source knows.
        known = getattr(split, "same", None)
        self.known: dict[str, Tensor] = {}
        for name in data.modalities:
            numbers = None if known is None else known(name)
            if numbers is not None:
                self.known[name] = _apart(torch.from_numpy(numbers))
        # Items with exactly the same text are identical: any caption "arrow" may find any picture of an arrow.
        self.worded: Tensor | None = None
        for name, modality in data.modalities.items():
            if modality.kind == "text" and not self.known:
                first: dict[str, int] = {}
                texts = split.column(name, rows)
                self.worded = torch.tensor([first.setdefault(str(t), n) if t else n for n, t in enumerate(texts)])
                break
        # Items that are identical in a modality are indistinguishable there, even if they differ in others.
        self.same = {name: self.known.get(name, self._same(name, rows)) for name in data.modalities}

    def _same(self, name: str, rows: Int[np.ndarray, " items"]) -> Int[Tensor, " items"]:
        """Number the items of a modality. Equal texts or vectors get equal numbers."""
        if name in self.known or self.data.modalities[name].kind not in ("text", "vector"):
            return torch.from_numpy(rows)
        column = self.split.column(name, rows)
        if isinstance(column, list):  # an array of texts would be as wide as the longest in every row
            first: dict[str, int] = {}
            return torch.tensor([first.setdefault(str(text), n) for n, text in enumerate(column)])
        return torch.from_numpy(np.unique(np.asarray(column), axis=0, return_inverse=True)[1].reshape(-1))

    def right(self, query: str, key: str) -> Int[Tensor, "items columns"]:
        """Number the items. An item is right for another's query if they share a number in any column.

        Args:
            query: the query's modality.
            key: the searched modality.
        """
        if self.worded is not None:
            return self.worded[:, None]
        return torch.stack([self.same[query], self.same[key]] if self.known else [self.same[key]], 1)

    def right_jointly(self, key: str, modalities: Sequence[str], whole: Tensor) -> Int[Tensor, "whole columns"]:
        """Number the items that have all modalities, as `right` does, for queries of all modalities but `key`.

        Args:
            key: the searched modality.
            modalities: all modalities.
            whole: [items] bool; True for items that have all modalities.
        """
        groups = self.same[key][whole, None]
        if self.known:  # identical in all modalities of the query, or in the searched one
            asked = torch.stack([self.same[other] for other in modalities if other != key], 1)
            groups = torch.cat([groups, asked.unique(dim=0, return_inverse=True)[1][whole, None]], 1)
        return groups


def _apart(numbers: Tensor) -> Tensor:
    """Give each item that lacks the modality (-1) a unique number."""
    lone = numbers < 0
    return torch.where(lone, -1 - torch.arange(len(numbers)), numbers)


def _others(key: str, modalities: Sequence[str]) -> str:
    """Name all modalities but one."""
    return "_and_".join(other for other in modalities if other != key)


def _to_each(found: Mapping[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """Average the recalls over the queries' modalities; return nothing for two modalities."""
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
        there: {modality: [items] bool}; True where an item has the modality.
        same: the groups of items that are right for each other.
        wholes: [items] number of the whole that each item was cut from; None if items were not cut from wholes.
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
    # Two modalities have no figure if no item of the split has both.
    mean = {"mean_recall": float(np.nanmean(list(found.values())))} if found else {}
    return mean | found | more | _to_each(found, list(all_of))


def pairwise_chance(
    modalities: Sequence[str], there: Mapping[str, Tensor], same: Sameness, wholes: Tensor | None
) -> dict[str, float]:
    """Return the chance levels of `pairwise_figures`: its figures on average with keys in random order."""
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
    """Measure retrieval from all other modalities together, on the items that have all modalities.

    Args:
        queries: {searched modality: [items, dim]}; empty if the learner returns none.
        keys: {modality: [items, dim]} embeddings.
        there, same: as for `pairwise_figures`.
        labels: [items] classes, -1 for none; None if no item has one.
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
        # Retrieval of the class alone, because several items may show the same class.
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
    """Return the chance levels of `joint_figures`; `queries` are the searched modalities."""
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
    """Measure the gap between every two modalities, on the first GAP_PAIRS items that have both."""
    found = dict[str, float]()
    for a, b in itertools.combinations(all_of, 2):
        both = (there[a] & there[b]).nonzero().flatten()[:GAP_PAIRS]
        if len(both) > 1:
            gap = gap_metrics(all_of[a][both], all_of[b][both])
            found |= {f"{a}_{b}_{short}": gap[name] for short, name in GAP.items()}
    return found
