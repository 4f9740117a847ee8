"""Evaluate the task `aligned`: figures of a split and its shifts, a picture of the space, a gallery."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from counterpoint.core.class_texts import class_prototypes
from counterpoint.data.pairs import AlignedData, AlignedSplit
from counterpoint.data.shown import shown
from counterpoint.tasks.aligned.seen import Seen, embeddings_of
from counterpoint.tasks.measures import axes_figure, gallery_rows
from counterpoint.tasks.splits import named_split

SHOWN = 6  # queries of the gallery for each direction, and retrieved items of each query
DRAWN = 400  # maximum number of items of each modality in the picture of the space


def measured_splits(data: AlignedData, split: str) -> dict[str, AlignedSplit]:
    """Return the splits to measure, by the prefix of their figures: "" for valid or test, then the shifts of test."""
    shifts = {f"{name}_": part for name, part in data.shifts.items()} if split == "test" else {}
    return {"": named_split(data, split), **shifts}


class AlignedEvaluator:
    """Measures of a split and its shifts: retrieval, gaps, classification, and identification of wholes.

    Args:
        data: the data.
        learned: names of the classes of a learner's logits; None: those of the data.
        split: the split to measure: valid, or test (default) with its `shifts`.
    """

    def __init__(self, data: AlignedData, learned: Sequence[str] | None = None, split: str = "test") -> None:
        self.data = data
        # The accuracy of a classifier of other classes is undefined.
        comparable = learned is None or list(learned) == list(data.classes or ())
        splits = measured_splits(data, split)
        self.split = splits[""]
        self.seen = {name: Seen(data, part, comparable) for name, part in splits.items()}
        self.reset()

    def reset(self) -> None:
        for seen in self.seen.values():
            seen.reset()
        self.prompts: dict[str, dict[str, Tensor]] = {}
        # By embedding, then by modality: embeddings of training items, and the classes of those that have the modality.
        self.examples: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {}
        self.measures: dict[str, float] = {}
        self.figures: dict[str, Any] = {}
        self.found: tuple[str, ...] = ()  # names of the last figures

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        self.measures |= outputs.get("measures", {})
        if batch["part"] == "items":
            self.seen[batch["split"]].update(batch, outputs)
            return
        for prefix, found in embeddings_of(outputs):
            if batch["part"] == "prompts":
                # Several texts of a class stand together: their mean counts.
                classes = len(self.data.classes or ())
                self.prompts[prefix] = {
                    name: value if len(value) == classes else class_prototypes(value.unflatten(0, (classes, -1)))
                    for name, value in found.items()
                }
                continue
            for name, value in found.items():
                known = batch["present"][name].cpu()
                pairs = self.examples.setdefault(prefix, {}).setdefault(name, [])
                pairs.append((value[known], batch["label"].cpu()[known]))

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found = dict(self.measures)
        examples = self._examples()
        for split, seen in self.seen.items():
            if seen.embeddings:
                measured = seen.compute(self.prompts, examples, final)
                # Figures without any query are NaN: leave them out.
                found |= {f"{split}{name}": value for name, value in measured.items() if value == value}
        if final and self.seen[""].embeddings:  # a scorer of pairs has none
            self.figures = self._space() | self._gallery()
        self.found = tuple(found)
        return found

    def chance(self) -> dict[str, float]:
        """Return the chance level of each recall and accuracy of the last `compute`."""
        examples = self._examples()
        made = {
            f"{split}{name}": value
            for split, seen in self.seen.items()
            if seen.embeddings
            for name, value in seen.chance(self.prompts, examples).items()
        }
        return {name: made[name] for name in self.found if name in made and name not in self.measures}

    def _examples(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Concatenate the embeddings and classes of training items: by embedding, then by modality."""
        return {
            prefix: {
                name: (torch.cat([z for z, _ in parts]), torch.cat([c for _, c in parts])) for name, parts in of.items()
            }
            for prefix, of in self.examples.items()
        }

    def _space(self) -> dict[str, Any]:
        """Project some test items' embeddings of all modalities on their first two principal axes, which show the gap."""
        seen = self.seen[""]
        all_of, there = seen.whole(""), seen.there
        rows = {name: value[there[name]][:DRAWN] for name, value in all_of.items()}
        if sum(map(len, rows.values())) < 2 or min(value.shape[1] for value in rows.values()) < 2:
            return {}
        caption = "Test items in every modality. Clouds that do not mix are a gap between modalities."
        return {"The shared space": axes_figure(rows, caption)}

    def _gallery(self) -> dict[str, Any]:
        """Show a few queries and their retrieved items of the split, for every two modalities."""
        seen = self.seen[""]
        all_of, there = seen.whole(""), seen.there
        found: list[dict[str, Any]] = []
        for a, b in itertools.permutations(all_of, 2):
            keys = there[b].nonzero().flatten()
            asked = (there[a] & there[b]).nonzero().flatten()
            asked = asked[:: max(1, len(asked) // SHOWN)][:SHOWN]
            if not len(asked) or not len(keys):
                continue
            rows = gallery_rows(asked, keys, all_of[a][asked] @ all_of[b][keys].T, seen.same.right(a, b), SHOWN)
            found.append({"query": a, "key": b, "rows": rows})
        wanted = {(part["query"], row["query"]) for part in found for row in part["rows"]}
        wanted |= {(part["key"], cell["item"]) for part in found for row in part["rows"] for cell in row["found"]}
        items = {f"{name}/{row}": shown(self.data, self.split, name, row) for name, row in sorted(wanted)}
        return {"Retrieval gallery": {"kind": "gallery", "parts": found, "items": items}} if found else {}
