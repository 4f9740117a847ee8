"""Measure classifiers of pictures with several labels, for learners of the task `labelled` whose data have `tags`.

`accuracy` is the share of pictures whose highest score is that of one of their labels.
"""

from __future__ import annotations

from typing import Any

import torch

from counterpoint.data.images import ImageData
from counterpoint.errors import diverged
from counterpoint.tasks.measures.multilabel import tag_measures


class TagsEvaluator:
    """Mean average precision and F1 of `logits` against the labels of a split.

    Args:
        config: the settings.
        data: the data, with tags.
    """

    split = "test"

    def __init__(self, config: Any, data: ImageData) -> None:
        assert data.tags is not None
        self.tags, self.config = data.tags, config
        self.reset()

    def reset(self) -> None:
        self.logits: list[torch.Tensor] = []
        self.index: list[torch.Tensor] = []
        self.figures: dict[str, Any] = {}
        self.chances: dict[str, float] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        self.logits.append(outputs["logits"].detach().float().cpu())
        self.index.append(batch["index"].cpu())

    def compute(self, *, final: bool = False) -> dict[str, float]:
        logits, index = torch.cat(self.logits), torch.cat(self.index)
        if not bool(torch.isfinite(logits).all()):
            raise diverged("the logits hold NaN or infinite values")
        tags = torch.from_numpy(getattr(self.tags, self.split))[index]
        first = tags.gather(1, logits.argmax(1, keepdim=True)).double().mean()
        present = tags.double().mean(0)
        self.chances = {"accuracy": float(present.mean()), "mean_ap": float(present.mean())}
        if final:
            self.figures = {"Labels": self._table(logits, tags)}
        return {"accuracy": float(first)} | tag_measures(logits, tags)

    def _table(self, logits: torch.Tensor, tags: torch.Tensor) -> dict[str, Any]:
        """Return the table of the average precision of each class, the lowest first."""
        rows: list[tuple[str, int, float]] = []
        for number, name in enumerate(self.tags.names):
            own = tags[:, number : number + 1]
            if 0 < int(own.sum()) < len(own):
                rows.append((name, int(own.sum()), round(tag_measures(logits[:, [number]], own)["mean_ap"], 3)))
        caption = "Average precision of each label, over all pictures of the split."
        rows.sort(key=lambda row: row[2])
        return {
            "kind": "table",
            "columns": ["label", "pictures", "average precision"],
            "rows": rows,
            "caption": caption,
        }

    def chance(self) -> dict[str, float]:
        """Return the chance level of accuracy and of mean average precision: the mean share of pictures with a label."""
        return dict(self.chances)
