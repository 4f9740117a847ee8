"""The items of a data source, read by split and position, in the modalities of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.dialogs import DialogData
from counterpoint.data.federations import FederatedData
from counterpoint.data.histories import HistoryData, HistorySplit
from counterpoint.data.images import ImageData, Indices, Listed
from counterpoint.data.pairs import AlignedData
from counterpoint.data.targets import TargetData
from counterpoint.data.tokens import TokenData
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.search.encoder import Encoder
from counterpoint.tasks.histories import BETWEEN, items_read

SPLITS = ("all", "train", "valid", "test", "unpaired", "items")


@dataclass(frozen=True)
class Items:
    """The splits of a data source, of images, texts, aligned items or histories, read by name, split and position."""

    source: Any
    specs: Mapping[str, Mapping[str, Any]]  # modality -> kind, and further facts
    splits: dict[str, Any]

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each modality."""
        return {name: spec["kind"] for name, spec in self.specs.items()}

    @classmethod
    def of(cls, source: Any, encoder: Encoder, split: str) -> Items:
        """Check that a source has the modalities of the run, and choose its splits.

        Raises CounterpointError for other modalities, and for a split that the source lacks.
        """
        names = SPLITS[1:] if split == "all" else (split,)
        source = source.public if isinstance(source, FederatedData) else source
        if isinstance(source, AlignedData):
            trained = {name: dict(spec) for name, spec in encoder.transform.modalities.items()}
            if trained != source.spec["modalities"]:
                raise CounterpointError(
                    f"{source.name} gives {source.spec['modalities']}, but the run was trained on {trained}; name data of the same "
                    "modalities"
                )
            # Learners concatenate modalities in the order of the batch.
            source = replace(source, modalities={name: source.modalities[name] for name in trained})
        elif isinstance(source, ImageData):
            facts = encoder.run.facts()
            for name in ("size", "channels"):
                if facts.get(name) != source.spec[name]:
                    raise CounterpointError(
                        f"{source.name} has images of {name} {source.spec[name]}, but the run was trained on {facts.get(name)}; "
                        + (f"add ?size={facts.get(name)}" if name == "size" else "name other data")
                    )
        elif isinstance(source, TargetData | HistoryData):
            Experiment.of_run(encoder.run).measured(source).check_facts(encoder.run.facts())
        elif not isinstance(source, TokenData | DialogData):
            raise CounterpointError(
                f"{getattr(source, 'name', source)} holds neither pictures, texts, aligned items nor histories; name other data, "
                "or embed pictures by Python: counterpoint.load(RUN).encode(images=[...])"
            )
        splits = {name: part for name in names if (part := getattr(source, name, None)) is not None}
        if not splits:
            there = ", ".join(name for name in SPLITS if getattr(source, name, None) is not None)
            raise CounterpointError(f"{source.name} has no split '{split}'; it has {there}")
        return cls(source, encoder.transform.modalities, splits)

    def column(self, split: str, name: str, rows: Indices) -> Any:
        """Return one modality of the items at n positions."""
        part = self.splits[split]
        if isinstance(self.source, HistoryData):
            if split == "items":
                return rows.tolist() if name == "item" else [()] * len(rows)
            known = [() if name == "item" else part.known[n].tolist() for n in rows.tolist()]
            return [tuple(items) for items in known]
        if isinstance(self.source, TargetData) and self.source.kind != "image":
            return part.inputs(rows).reshape(len(rows), -1)
        if isinstance(self.source, TokenData):
            return [part.texts[n] for n in rows.tolist()]
        if isinstance(self.source, DialogData):  # the last turn, without the turns before it
            return [part.context(n)[-1].text for n in rows.tolist()]
        return part.column(name, rows) if isinstance(self.source, AlignedData) else part.images(rows)

    def words(self, name: str, values: Sequence[Any]) -> list[str | None]:
        """Return n items of a modality as texts: themselves, names of items, or the names of a history that are read."""
        if not isinstance(self.source, HistoryData):
            return list(values)
        names, spec = self.source.items, self.specs[name]
        if spec["kind"] == "item":
            return [None if value == () else names[value] for value in values]
        read = [items_read(value, spec["length"], ordered=spec["kind"] == "history") for value in values]
        return [BETWEEN.join(names[n] for n in items) or None for items in read]

    def present(self, split: str, name: str, rows: Indices) -> NDArray[np.bool_]:
        """Return whether each item has a modality."""
        part = self.splits[split]
        if isinstance(self.source, HistoryData):
            some = np.ones(len(rows), bool) if split == "items" else part.known.lengths[rows] > 0
            return some if (split == "items") == (name == "item") else np.zeros(len(rows), bool)
        aligned = isinstance(self.source, AlignedData)
        return np.asarray(part.present(name, rows)) if aligned else np.ones(len(rows), bool)

    def labels(self, split: str, rows: Indices) -> list[str | None]:
        """Return the name of each item's class, None where it has none."""
        labels, classes = getattr(self.splits[split], "labels", None), getattr(self.source, "classes", None)
        if labels is None or not classes:
            return [None] * len(rows)
        return [classes[n] if n >= 0 else None for n in labels[rows].tolist()]

    def names(self, split: str, rows: Indices) -> list[str | None]:
        """Return the source of each item: its file, or its row of a table, or its user; None for built-in data."""
        part = self.splits[split]
        if isinstance(part, HistorySplit):
            return [part.names[n] for n in rows.tolist()] if len(part.names) else [None] * len(rows)
        return list(part.row_names(rows)) if isinstance(part, Listed) else [None] * len(rows)

    def files(self, split: str, name: str, rows: Indices) -> list[str | None]:
        """Return the absolute path of each item's image, sound or video; None where it has no file."""
        part = self.splits[split]
        found = part.files(rows, name) if isinstance(part, Listed) else [None] * len(rows)
        return [None if path is None else os.path.abspath(path) for path in found]


def shown_items(source: Any, kinds: Mapping[str, str], split: str, row: int) -> dict[str, dict[str, Any]]:
    """Return each modality that an item has, in the form that a page shows (see `data.shown`)."""
    from counterpoint.data.shown import png, shown

    part = getattr(source, split)
    if isinstance(source, ImageData):
        return {"image": {"png": png(part.images(np.array([row]))[0])}}
    there = [name for name in kinds if part.present(name, np.array([row]))[0]]
    return {name: shown(source, part, name, row) for name in there}
