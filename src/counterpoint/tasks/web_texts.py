"""Give pictures the texts and labels that were found with them, and choose by text the pictures of each class.

    --texts FILE          CSV with the columns file and text: the text of each picture, by its path or the end of it
    --definitions FILE    a definition of each class: JSON {class: definition}, or a line for each class
    --tags FILE           CSV with the columns file and tags: the labels of each picture, with ; between them
    --unknown SOURCE      pictures of no known class, of which every second one joins the valid split, the others the test split

A text is embedded as its words, weighted by how rare they are, or by a language model (`--text-encoder minilm`, `hf:NAME`).
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.approximate_neighbours import approximate_rows
from counterpoint.core.neighbours import PLACES, graph_smooth, k_reciprocal_rerank, nearest_rows, rerank_lists
from counterpoint.core.operands import unit
from counterpoint.data.generated import InflatedImages
from counterpoint.data.images import ImageData, ImageSplit, Indices, Listed, Tags, WebTexts
from counterpoint.encoders.text import build_text_encoder, build_tokenizer
from counterpoint.errors import DataError
from counterpoint.tasks.class_texts import texts_of
from counterpoint.tasks.web import pictures_of
from counterpoint.words import counted

BATCH = 64  # texts that a language model embeds at a time
LARGEST = 2000  # pictures of a class that are ranked again; of more, the nearest by cosine


def with_found(data: ImageData, config: Any) -> ImageData:
    """Return the data with the labels, texts and unknown pictures of the settings. A source's `System.source`.

    Raises DataError for a file that cannot be read, lacks a column, or names no picture of the data.
    """
    if config.tags:
        data = _with_tags(data, config.tags)
    if config.texts or config.definitions:
        data = _with_texts(data, config)
    return _with_unknown(data, config.unknown) if config.unknown else data


def _with_texts(data: ImageData, config: Any) -> ImageData:
    if not config.texts and data.texts is None:
        raise DataError(
            "definitions need the texts of pictures; add --texts FILE, a CSV with the columns file and text"
        )
    definitions = tuple(texts[0] for texts in texts_of(data.classes, "{}", "", config.definitions))
    if not config.texts:
        assert data.texts is not None
        return replace(data, texts=data.texts._replace(definitions=definitions))
    found = _matched(data, data.train, config.texts, "text")
    given = sum(map(bool, found))
    if not given:
        raise _names_none(data, config.texts)
    note = f"{given} of {counted(len(found), 'training picture has', 'training pictures have')} a text"
    return replace(data, texts=WebTexts(found, definitions), notes=[*data.notes, note])


def _with_tags(data: ImageData, file: str) -> ImageData:
    """Return the data with several labels a picture. The class of a picture is the first of them, -1 without any."""
    splits = {name: getattr(data, name) for name in ("train", "valid", "test")}
    said = {name: [_split(cell) for cell in _matched(data, of, file, "tags")] for name, of in splits.items()}
    names = sorted({tag for rows in said.values() for row in rows for tag in row})
    if not any(said["train"]):
        raise _names_none(data, file)
    if len(names) < 2:
        raise DataError(f"{file}: has the one label {names[0]}; several labels a picture need at least two")
    at = {name: number for number, name in enumerate(names)}
    numbers = {name: np.zeros((len(rows), len(names)), np.int64) for name, rows in said.items()}
    for name, rows in said.items():
        for row, own in enumerate(rows):
            numbers[name][row, [at[tag] for tag in own]] = 1
    first = {name: np.array([at[row[0]] if row else -1 for row in rows], np.int64) for name, rows in said.items()}
    counts = numbers["train"].sum(0)
    if not counts.all():
        raise DataError(
            f"{file}: no training picture has the label {names[int(counts.argmin())]}; remove it, or add a picture"
        )
    relabelled: Any = {name: Relabelled(of, first[name]) for name, of in splits.items()}
    none = sum(not row for row in said["train"])
    note = (
        f"{counted(len(names), 'label')}, {counts.sum() / len(counts):.1f} training pictures each; "
        f"{counted(none, 'training picture has', 'training pictures have')} none"
    )
    tags = Tags(tuple(names), **numbers)
    return replace(data, **relabelled, classes=tuple(names), tags=tags, notes=[*data.notes, note])


def _split(cell: str) -> list[str]:
    return [tag for part in cell.split(";") if (tag := part.strip())]


class Relabelled:
    """A split of the user's files under other labels.

    Args:
        split: the split.
        labels: class of each picture, -1 for none.
    """

    def __init__(self, split: Any, labels: Indices) -> None:
        self.split, self.labels = split, labels

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Indices) -> Any:
        return self.split.images(indices)

    def row_names(self, positions: Indices) -> list[str]:
        return list(self.split.row_names(positions))

    def files(self, positions: Indices, modality: str) -> list[str | None]:
        return list(self.split.files(positions, modality))


class Part:
    """Some pictures of a split, without labels.

    Args:
        split: the split.
        rows: positions of the pictures.
    """

    labels = None

    def __init__(self, split: ImageSplit, rows: Indices) -> None:
        self.split, self.rows = split, rows

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Any:
        return self.split.images(self.rows[indices])


def _with_unknown(data: ImageData, source: str) -> ImageData:
    parts = pictures_of(source, data, "--unknown")
    found: dict[str, Any] = {}
    for number, name in enumerate(("valid", "test")):
        found[name] = getattr(data, name)
        for part in parts:
            found[name] = InflatedImages(found[name], Part(part, np.arange(number, len(part), 2)), 1)
    more = {name: len(split) - len(getattr(data, name)) for name, split in found.items()}
    if not all(more.values()):
        raise DataError(f"--unknown {source}: has fewer than two pictures, one for each of the splits valid and test")
    note = f"{more['valid']} valid and {more['test']} test pictures are of no known class"
    return replace(data, **found, notes=[*data.notes, note])


def _matched(data: ImageData, split: Any, file: str, column: str) -> tuple[str, ...]:
    """Return the cell of each picture in a column of a file, "" where the file lacks the picture."""
    count = len(split)
    if not isinstance(split, Listed):
        raise DataError(f"{data.name} names no files, so {file} cannot be matched; use pictures in files")
    said = _read(file, column)
    taken: dict[str, str] = {}  # the end of a path that the file holds, and the picture that it names
    cells = []
    for name in split.row_names(np.arange(count)):
        parts = Path(name).parts
        ends = (name, *("/".join(parts[start:]) for start in range(1, len(parts))))
        end = next((end for end in ends if end in said), None)
        if end is not None and (other := taken.setdefault(end, name)) != name:
            raise DataError(f"{file}: '{end}' names {other} and {name}; write the folder, too")
        cells.append("" if end is None else said[end])
    return tuple(cells)


def _names_none(data: ImageData, file: str) -> DataError:
    train: Any = data.train
    name = train.row_names(np.arange(1))[0]
    return DataError(
        f"{file}: names no training picture of {data.name}; its column file needs paths such as '{name}', or their ends, such "
        f"as '{Path(name).name}'"
    )


def _read(file: str, column: str) -> dict[str, str]:
    try:
        with Path(file).open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            if not {"file", column} <= set(rows.fieldnames or ()):
                raise DataError(
                    f"{file}: needs the columns file and {column}, has {', '.join(rows.fieldnames or ()) or 'none'}"
                )
            return {row["file"]: (row[column] or "").strip() for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error


def embedded_texts(encoder: str, texts: Sequence[str]) -> Float[Tensor, "n dim"]:
    """Embed texts as unit rows; an empty text is a row of zeros.

    Args:
        encoder: "words": words weighted by log(n / number of texts with the word). Else a text encoder's name.
        texts: the texts.
    """
    if encoder == "words":
        bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
        spread = Counter(word for bag in bags for word in bag)
        # A word of a single text relates it to no other.
        at = {word: number for number, word in enumerate(sorted(w for w, count in spread.items() if count > 1))}
        cells = [
            (row, at[word], count * float(np.log(len(texts) / spread[word])))
            for row, bag in enumerate(bags)
            for word, count in bag.items()
            if word in at
        ]
        found = torch.zeros(len(texts), max(1, len(at)))
        if cells:
            rows, columns, values = zip(*cells, strict=True)
            found[list(rows), list(columns)] = torch.tensor(values)
        return unit(found)
    tokenizer, network = build_tokenizer(encoder, texts), build_text_encoder(encoder).eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(texts), BATCH):
            some = list(texts[start : start + BATCH])
            rows_of = network(*tokenizer.encode(some, network.length)).float()
            parts.append(rows_of * torch.tensor([bool(text) for text in some])[:, None])
    return unit(torch.cat(parts))


def trusted_by_text(
    features: Float[Tensor, "n dim"],
    texts: Float[Tensor, "n width"],
    definitions: Float[Tensor, "classes width"],
    labels: Int[Tensor, "n ..."],
    *,
    top: int = 50,
    neighbours: int = 20,
    kept: int = 5,
    self_weight: float = 0.0,
    search: Literal["exact", "approximate"] = "exact",
) -> tuple[Bool[Tensor, "n ..."], float | None]:
    """Choose for each class the pictures whose smoothed text is nearest to its definition.

    Args:
        features: visual features.
        texts, definitions: unit rows; a missing text is a row of zeros.
        labels: [n] classes of the pictures, -1 for none; or [n, classes], 1 for a class that is present.
        top: number of pictures of a class, at least 1.
        neighbours: number of visual neighbours that are ranked again, the picture itself included.
        kept: number of them that enter the graph, the picture itself included.
        self_weight: weight of a picture's own text, at least 0.
        search: exact neighbours, or approximate ones of an inverted file (`core.approximate_neighbours`).

    Returns True for chosen pictures: min(top, its pictures) of each class. A picture without any text comes last. The second
    value is the share of exact neighbours among approximate ones, None for exact search.
    """
    smooth, recall = smoothed_texts(
        features, texts, neighbours=neighbours, kept=kept, self_weight=self_weight, search=search
    )
    trusted = torch.zeros(labels.shape, dtype=torch.bool)
    for number, definition in enumerate(definitions):
        own = (labels == number if labels.ndim == 1 else labels[:, number] == 1).nonzero()[:, 0]
        if not len(own):
            continue
        cosine = smooth[own] @ definition
        # Texts at the same distance are taken in the order of the pictures, whatever the rounding.
        own = own[cosine.round(decimals=PLACES).argsort(descending=True, stable=True)[:LARGEST]]
        distance = k_reciprocal_rerank(definition[None], smooth[own])[0]
        distance[smooth[own].norm(dim=1) == 0] = torch.inf
        chosen = own[distance.round(decimals=PLACES).argsort(stable=True)[:top]]
        trusted[(chosen,) if labels.ndim == 1 else (chosen, number)] = True
    return trusted, recall


def smoothed_texts(
    features: Float[Tensor, "n dim"],
    texts: Float[Tensor, "n width"],
    *,
    neighbours: int = 20,
    kept: int = 5,
    self_weight: float = 0.0,
    search: Literal["exact", "approximate"] = "exact",
) -> tuple[Float[Tensor, "n width"], float | None]:
    """Average each picture's text over its visual neighbours, and normalise it. Arguments and second value: `trusted_by_text`."""
    recall = None
    if search == "approximate":
        found = approximate_rows(features, neighbours)
        near, recall = found.neighbours, found.recall
    else:
        near = nearest_rows(features, neighbours)
    lists = rerank_lists(features, near.rows, min(kept, near.rows.shape[1]))
    return unit(graph_smooth(lists.rows, lists.similarity, texts, self_weight)), recall
