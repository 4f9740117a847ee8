"""Define the task `sequences`: find items that follow a user's history, or that complete a set; all items are ranked.

A training batch of histories, where every beginning of a history is an example, and one of sets:

    batch["ids"]        [B, L] item numbers plus 1, padded with 0 on the right: the last L items before the target; the whole set
    batch["lengths"]    [B] numbers of items
    batch["target"]     [B] the next item's number, for histories alone
    batch["index"]      [B] positions of the examples

An evaluation batch has the known items in the same form. Two more entries are padded with -1: `batch["known"]` [B, h] has all
known items, and `batch["wanted"]` [B, w] the items to find. A `SequencesLearner` embeds histories or sets, and items. The score
of an item is their dot product. Items that are known are no candidates (`mask_seen`). The evaluation measures, for K of
5, 10, 20 and 50:

- `recall_K`: the share of wanted items among the first K; with one wanted item it is the hit rate;
- `ndcg_K`, `mrr_K`: the discounted gain, and the reciprocal rank of the first item found;
- `unseen_recall_20`: recall of items that occur in no training history, where some are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tyro.conf import Suppress

from counterpoint.core.ranking import ranks_of_wanted
from counterpoint.core.world import processes
from counterpoint.data.histories import HistoryData, HistorySplit
from counterpoint.data.images import Indices
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.optim import OptimConfig
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.histories import BETWEEN, Beginnings, Examples, UserBatches, known_items
from counterpoint.tasks.measures.ranking import CUTS, ranking_measures
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.words import counted

AT_ONCE = 256  # questions in a batch of the evaluation
SHOWN = 8  # users in the table of the page
LISTED = 5  # items of each user there


@dataclass
class SequencesConfig(OptimConfig):
    """Settings of every learner from histories or sets of items."""

    epochs: int = 100
    """Passes over the training examples."""
    batch_size: int = 256
    """Examples in a batch, over all processes together."""
    dim: int = 64
    """Width of the embeddings of items and users."""
    length: int = 50
    """Maximum number of items of a history or set that the network reads: the last ones of a history."""
    whole_histories: Annotated[bool, Suppress] = False
    """An epoch has one random beginning of each user's history, not every beginning."""
    mask_seen: bool = True
    """Items that are known are no candidates. False: as in RecBole's sequential evaluation, every item is one."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""

    counts: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "dim", "length", "evaluate_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count(*self.counts)

    def check(self) -> None:
        """Raise CounterpointError for settings that do not fit together. Runs before data are read."""


# ---------------------------------------------------------------------------------------------------------- the learner


class SequencesLearner(Learner):
    """A learner that embeds histories or sets, and items, for scores by the dot product."""

    def represent(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return vectors [n, dim] of histories or sets.

        Args:
            ids: [n, L] item numbers plus 1, padded with 0 on the right.
            lengths: [n] numbers of items.
        """
        raise NotImplementedError

    def item_table(self) -> Tensor:
        """Return the vectors of all items, [I, dim]."""
        raise NotImplementedError

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"query": self.represent(batch["ids"], batch["lengths"]), "items": self.item_table()}


# ------------------------------------------------------------------------------------------------------------- measures


class RankingEvaluator:
    """Ranks of the wanted items of one split among all items."""

    def __init__(self, data: HistoryData, split: HistorySplit, *, mask_seen: bool) -> None:
        self.data, self.split, self.mask_seen = data, split, mask_seen
        self.unseen = torch.from_numpy(data.counts == 0)
        self.reset()

    def reset(self) -> None:
        self.ranks: list[Tensor] = []
        self.wanted: list[Tensor] = []
        self.rows: list[list[str]] = []
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        query, items = outputs["query"].float(), outputs["items"].float()
        if not bool(torch.isfinite(query).all() and torch.isfinite(items).all()):
            raise diverged("the vectors of users or items hold NaN or infinite values")
        hidden = batch["known"] if self.mask_seen else batch["known"][:, :0]
        ranks = ranks_of_wanted(query, items, batch["wanted"], hidden).cpu()
        self.ranks.append(ranks)
        self.wanted.append(batch["wanted"].cpu())
        if len(self.rows) < SHOWN:
            self._show(batch, query @ items.T, ranks)

    def _show(self, batch: dict[str, Any], scores: Tensor, ranks: Tensor) -> None:
        """Add rows to the table of the page: what is known, what is proposed, what was to find."""
        names = self.data.items
        for row in range(min(len(scores), SHOWN - len(self.rows))):
            known = batch["known"][row][batch["known"][row] >= 0].tolist()
            mine = scores[row].clone()
            if self.mask_seen:
                mine[known] = -torch.inf
            best = mine.topk(min(LISTED, len(names))).indices.tolist()
            wanted = batch["wanted"][row][batch["wanted"][row] >= 0].tolist()
            self.rows.append(
                [
                    BETWEEN.join(names[n] for n in (known[-LISTED:] if self.data.ordered else known[:LISTED])),
                    BETWEEN.join(f"{names[n]} (right)" if n in wanted else names[n] for n in best),
                    BETWEEN.join(
                        f"{names[n]} ({rank})" for n, rank in zip(wanted[:LISTED], ranks[row].tolist(), strict=False)
                    ),
                ]
            )

    def _joined(self) -> tuple[Tensor, Tensor]:
        width = max((ranks.shape[1] for ranks in self.ranks), default=0)
        pad = torch.nn.functional.pad
        ranks, wanted = (
            torch.cat([pad(part, (0, width - part.shape[1]), value=-1) for part in parts])
            for parts in (self.ranks, self.wanted)
        )
        return ranks, wanted

    def compute(self, *, final: bool = False) -> dict[str, float]:
        if not self.ranks:
            return {}
        ranks, wanted = self._joined()
        none = max(len(self.data.items), *CUTS) + 1  # above all cuts, which may lie above the number of items
        rows = ranking_measures(ranks.masked_fill(wanted < 0, none), (wanted >= 0).sum(1))
        first = SequencesTask.headline  # a page shows the first measures large
        found = {name: float(rows[name].mean()) for name in sorted(rows, key=lambda name: name != first)}
        new = (wanted >= 0) & self.unseen[wanted.clamp(min=0)]
        if bool(new.any()):
            found["unseen_recall_20"] = float((ranks[new] <= 20).double().mean())
        if final:
            self.figures = self._figures(ranks[wanted >= 0], wanted[wanted >= 0])
        return found

    def chance(self) -> dict[str, float]:
        """Return the recall of a random order."""
        items = max(1, len(self.data.items))
        return {f"recall_{cut}": min(1.0, cut / items) for cut in CUTS}

    def _figures(self, ranks: Tensor, wanted: Tensor) -> dict[str, Any]:
        """Draw recall by the length of the list, for often and for rarely used items; and show proposals of a few users."""
        counts = torch.from_numpy(self.data.counts)[wanted]
        middle = float(counts.double().median())
        cuts = sorted({round(1.25**n) for n in range(30) if 1.25**n <= len(self.data.items)})
        groups = {
            "all wanted items": torch.ones_like(counts, dtype=torch.bool),
            f"more than {middle:g} times in training": counts > middle,
            f"{middle:g} times or fewer": counts <= middle,
        }
        series = {
            name: [cuts, [float((ranks[at] <= cut).double().mean()) for cut in cuts]]
            for name, at in groups.items()
            if bool(at.any())
        }
        what = "histories" if self.data.ordered else "sets"
        return {
            "Wanted items found": {
                "kind": "curves",
                "series": series,
                "xlabel": "length of the list of proposals",
                "caption": f"Share of the wanted items in a list of proposals, for {len(self.split)} {what} and "
                f"{counted(len(self.data.items), 'item')}.",
            },
            "Proposals": {
                "kind": "table",
                "columns": [
                    "last known items" if self.data.ordered else "known items",
                    "first proposals",
                    "wanted (rank)",
                ],
                "rows": self.rows,
                "caption": f"The first {len(self.rows)} {what} of the split.",
            },
        }


# ------------------------------------------------------------------------------------------------------------- the task


class _Asked(Dataset[dict[str, Any]]):
    """Batches of a split as `predict` takes them."""

    def __init__(self, split: HistorySplit, length: int, *, ordered: bool) -> None:
        self.split, self.length, self.ordered = split, length, ordered

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        rows = np.asarray(list(positions), np.int64)
        found = known_items(self.split, rows, self.length, ordered=self.ordered)
        for name, lists in (("known", self.split.known), ("wanted", self.split.wanted)):
            found[name] = torch.from_numpy(lists.padded(rows, -1))
        return found | {"index": torch.from_numpy(rows)}


class SequencesTask:
    """Loaders and evaluator of one source of histories or sets."""

    name = "sequences"
    headline = "ndcg_20"  # the measure it judges by
    contract = "sequences"  # the form of data it takes (see counterpoint.data.load)
    at_once = AT_ONCE

    def __init__(self, data: HistoryData, config: SequencesConfig) -> None:
        if not isinstance(data, HistoryData):
            raise CounterpointError(
                f"{data.name} has no histories, which the task sequences needs; name a source of them"
            )
        if not len(data.train) or not len(data.test):
            raise DataError(
                f"{data.name}: needs histories to learn from and to test, has {len(data.train)}, {len(data.test)}"
            )
        self.data, self.config = data, config
        self.beginnings = Beginnings(data.train)
        if data.ordered and not len(self.beginnings):
            raise DataError(
                f"{data.name}: no training history has 2 items, one to know and one to find; give longer ones"
            )

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings, and by which items are known again."""
        data, asked = self.data, "history" if self.data.ordered else "set"
        kinds = {asked: {"kind": asked, "length": self.config.length}, "item": {"kind": "item"}}
        return data.spec | {"modalities": kinds, "names": list(data.items)}

    def split(self, name: str) -> HistorySplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: HistorySplit = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError where the valid split is too small to monitor training."""
        if self.data.ordered and len(self.data.valid) < 2:
            raise DataError(
                f"{self.data.name}: needs at least 2 users with 3 items, whose last items but one training is monitored on; has "
                f"{len(self.data.valid)}"
            )
        check_watched(self.data.name, len(self.data.valid), "histories" if self.data.ordered else "sets")

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Raise DataError where these data have other items than those that a run was trained on."""
        if trained["items"] != len(self.data.items):
            raise DataError(
                f"{self.data.name} has {counted(len(self.data.items), 'item')}, and the run was trained on {trained['items']}: "
                "its network "
                "knows its own items alone"
            )
        for number, (mine, theirs) in enumerate(zip(self.data.items, trained.get("names", ()), strict=False)):
            if mine != theirs:
                raise DataError(
                    f"{self.data.name}: item {number} is '{mine}', and '{theirs}' in the data that the run was trained on: its "
                    "network knows its own items alone"
                )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        examples = Examples(self.data, self.beginnings, self.config.length)
        size = self.config.batch_size
        if batches is None:
            one_each = self.data.ordered and self.config.whole_histories
            batches = UserBatches(self.beginnings, size) if one_each else Batches(len(examples), size)
        return DataLoader(examples, batch_size=None, sampler=batches.bind(seed, position, *processes()))

    def evaluation_batch(self, split: str | HistorySplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these questions of a split as a learner's `predict` takes them."""
        return self._asked(self.split(split) if isinstance(split, str) else split)[list(map(int, rows))]

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the questions of a split, in order."""
        asked = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(asked)))) for start in range(0, len(asked), AT_ONCE)]
        return DataLoader(self._asked(asked), batch_size=None, sampler=at)

    def _asked(self, split: HistorySplit) -> _Asked:
        return _Asked(split, self.config.length, ordered=self.data.ordered)

    def evaluator(self, split: str) -> RankingEvaluator:
        return RankingEvaluator(self.data, self.split(split), mask_seen=self.config.mask_seen)


TASK = SequencesTask
