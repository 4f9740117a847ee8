"""Embed the items of a data source with a trained run, and write the embeddings to one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, unknown
from counterpoint.experiment import Experiment
from counterpoint.files import check_writable, replacing
from counterpoint.search.encoder import BATCH, Encoder
from counterpoint.search.stored import RESERVED, WORDED, arrow, check_local, file_column, text_column
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
                    f"{source.name} gives {source.spec['modalities']}, but the run was trained on {trained}"
                )
            # Learners concatenate modalities in the order of the batch.
            source = replace(source, modalities={name: source.modalities[name] for name in trained})
        elif isinstance(source, ImageData):
            facts = encoder.run.facts()
            for name in ("size", "channels"):
                if facts.get(name) != source.spec[name]:
                    raise CounterpointError(
                        f"{source.name} has images of {name} {source.spec[name]}, but the run was trained on {facts.get(name)}"
                    )
        elif isinstance(source, TargetData | HistoryData):
            Experiment.of_run(encoder.run).measured(source).check_facts(encoder.run.facts())
        elif not isinstance(source, TokenData | DialogData):
            raise CounterpointError(
                f"{getattr(source, 'name', source)} holds neither pictures, texts, aligned items nor histories"
            )
        splits = {name: part for name in names if (part := getattr(source, name, None)) is not None}
        if not splits:
            raise CounterpointError(f"{source.name} has no split '{split}'")
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


def embed(
    path: Run | Path | str,
    out: Path | str,
    *,
    data: str | None = None,
    split: str = "all",
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Write the embeddings of a run's data, or of another source of the same modalities. Return the number of items.

    A row of the Parquet file is an item. The columns are:

    - `item`: its position in its split;
    - `split`, `label` and its texts;
    - `source`: its file, or its row of a table;
    - `<modality>_file`: path of its image, sound or video where there is one;
    - `<modality>_embedding`: null where the item lacks the modality.

    The split "unpaired" has items in one modality each, where the data has such items. Equal texts are embedded once. Of a run of
    sequences, a row is a history or a set. Its split "items" has the items to recommend.

    Args:
        path: A finished run of the task aligned, views, labelled, regression, tokens, dialogs, sequences or federations.
        out: The file to write, .parquet; checked for writing before the work begins.
        data: Another data source. Default: the run's own.
        split: One of all, train, valid, test, unpaired, items.
        say: Receives notes.

    Raises CounterpointError for another task, data that does not fit, an unknown split; DataError and RunError for files.
    """
    pa, pq = arrow()
    check_local(out, "embeddings are written to a file")
    if not isinstance(path, Run):
        check_local(path, "a run is a folder")
    out = Path(out)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if out.suffix != ".parquet":
        raise CounterpointError(f"embeddings are written as Parquet; name a file that ends in .parquet, not {out}")
    check_writable(out)
    encoder = Encoder.load(path)
    experiment = Experiment.of_run(encoder.run)
    spec = data or experiment.data
    source = experiment.source(data)
    for note in source.notes:
        say(f"note: {note}")
    items = Items.of(source, encoder, split)
    columns, vectors = _embedded(items, encoder)
    for modality, (rows, there) in vectors.items():
        columns[f"{modality}_embedding"] = pa.FixedSizeListArray.from_arrays(
            pa.array(rows.ravel()), rows.shape[1], mask=pa.array(~there)
        )
    said = {"run": str(encoder.run.path), "key": encoder.key, "data": spec, "modalities": encoder.kinds}
    table = pa.table(columns).replace_schema_metadata({b"counterpoint": json.dumps(said).encode()})
    with replacing(out) as file:
        pq.write_table(table, file)
    return int(table.num_rows)


def _embedded(
    items: Items, encoder: Encoder
) -> tuple[dict[str, list[Any]], dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]]]:
    """Return the file's columns without the embeddings, and for each modality its rows and the mask of its items."""
    from rich.console import Console
    from rich.progress import track

    worded = [name for name, kind in items.kinds.items() if kind in WORDED]
    columns: dict[str, list[Any]] = {name: [] for name in (*RESERVED, *map(text_column, worded))}
    files: dict[str, list[str | None]] = {name: [] for name in items.kinds if name not in worded}
    parts: dict[str, list[tuple[NDArray[np.float32], NDArray[np.bool_]]]] = {name: [] for name in items.kinds}
    texts: dict[str, dict[Any, NDArray[np.float32]]] = {name: {} for name in worded}
    chunks = [
        (split, np.arange(at, min(at + BATCH, len(part))))
        for split, part in items.splits.items()
        for at in range(0, len(part), BATCH)
    ]
    for split, rows in track(chunks, "embedding", console=Console(stderr=True), transient=True):
        columns["item"] += rows.tolist()
        columns["split"] += [split] * len(rows)
        columns["label"] += items.labels(split, rows)
        columns["source"] += items.names(split, rows)
        for name in items.kinds:
            values, there = items.column(split, name, rows), items.present(split, name, rows)
            if name in worded:
                columns[text_column(name)] += items.words(name, values)
                found = _embedded_texts(encoder, name, [values[n] for n in np.flatnonzero(there)], texts[name])
            else:
                files[name] += items.files(split, name, rows)
                found = encoder.rows(name, values if there.all() else values[there])
            parts[name].append((found, there))
    # Leave out columns without any path.
    columns |= {file_column(name): paths for name, paths in files.items() if any(path is not None for path in paths)}
    return columns, {name: _whole(found) for name, found in parts.items()}


def _embedded_texts(
    encoder: Encoder, name: str, values: Sequence[Any], known: dict[Any, NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return the embeddings of texts or lists of items. Equal texts get the same embedding, bit for bit."""
    new: list[Any] = [text for text in dict.fromkeys(values) if text not in known]
    if new:
        known |= dict(zip(new, encoder.rows(name, new), strict=True))
    return np.stack([known[text] for text in values]) if values else np.zeros((0, 1), np.float32)


def _whole(
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.bool_]]],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return all items' rows [n, dim], zeros for items without the modality, and the mask [n] of the others."""
    there = np.concatenate([here for _, here in parts])
    dim = max(rows.shape[1] for rows, _ in parts)
    whole = np.zeros((len(there), dim), np.float32)
    found = [rows for rows, _ in parts if len(rows)]
    if found:
        whole[there] = np.concatenate(found)
    return whole, there


def shown_items(source: Any, kinds: Mapping[str, str], split: str, row: int) -> dict[str, dict[str, Any]]:
    """Return each modality that an item has, in the form that a page shows (see `data.shown`)."""
    from counterpoint.data.shown import png, shown

    part = getattr(source, split)
    if isinstance(source, ImageData):
        return {"image": {"png": png(part.images(np.array([row]))[0])}}
    there = [name for name in kinds if part.present(name, np.array([row]))[0]]
    return {name: shown(source, part, name, row) for name in there}
