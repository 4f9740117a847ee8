"""Give training pictures the texts that were found with them, and choose by text the pictures of each class.

    --texts FILE          CSV with the columns file and text: the text of each picture, by path or by file name
    --definitions FILE    a definition of each class: JSON {class: definition}, or a line for each class

A text is embedded as its words, weighted by how rare they are, or by a language model (`--text-encoder minilm`, `hf:NAME`).
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.neighbours import PLACES, graph_smooth, k_reciprocal_rerank, nearest_rows, rerank_lists
from counterpoint.core.operands import unit
from counterpoint.data.images import ImageData, Listed, WebTexts
from counterpoint.encoders.text import build_text_encoder, build_tokenizer
from counterpoint.errors import DataError
from counterpoint.tasks.class_texts import texts_of

BATCH = 64  # texts that a language model embeds at a time
LARGEST = 2000  # pictures of a class that are ranked again; of more, the nearest by cosine


def with_texts(data: ImageData, config: Any) -> ImageData:
    """Return the data with the texts of the settings' files. A source's `System.source`.

    Raises DataError for a file that cannot be read, lacks a column, or names no picture of the training split.
    """
    if not config.texts and not config.definitions:
        return data
    if not config.texts and data.texts is None:
        raise DataError(
            "definitions need the texts of pictures; add --texts FILE, a CSV with the columns file and text"
        )
    definitions = tuple(texts[0] for texts in texts_of(data.classes, "{}", "", config.definitions))
    if not config.texts:
        assert data.texts is not None
        return replace(data, texts=data.texts._replace(definitions=definitions))
    said = _read(config.texts)
    train: Any = data.train
    if not isinstance(train, Listed):
        raise DataError(
            f"{data.name} names no files, so --texts {config.texts} cannot be matched; use pictures in files"
        )
    names = train.row_names(np.arange(len(data.train)))
    found = tuple(said.get(name, said.get(Path(name).name, "")) for name in names)
    given = sum(map(bool, found))
    if not given:
        raise DataError(
            f"{config.texts}: names no training picture of {data.name}; its column file needs paths such as '{names[0]}', or names "
            f"such as '{Path(names[0]).name}'"
        )
    note = f"{given} of {len(found)} training pictures have a text"
    return replace(data, texts=WebTexts(found, definitions), notes=[*data.notes, note])


def _read(file: str) -> dict[str, str]:
    try:
        with Path(file).open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            if not {"file", "text"} <= set(rows.fieldnames or ()):
                raise DataError(
                    f"{file}: needs the columns file and text, has {', '.join(rows.fieldnames or ()) or 'none'}"
                )
            return {row["file"]: (row["text"] or "").strip() for row in rows}
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
    labels: Int[Tensor, " n"],
    *,
    top: int = 50,
    neighbours: int = 20,
    kept: int = 5,
    self_weight: float = 0.0,
) -> Bool[Tensor, " n"]:
    """Choose for each class the pictures whose smoothed text is nearest to its definition.

    Args:
        features: visual features.
        texts, definitions: unit rows; a missing text is a row of zeros.
        labels: classes of the pictures, -1 for none.
        top: number of pictures of a class, at least 1.
        neighbours: number of visual neighbours that are ranked again, the picture itself included.
        kept: number of them that enter the graph, the picture itself included.
        self_weight: weight of a picture's own text, at least 0.

    Returns True for chosen pictures: min(top, its pictures) of each class. A picture without any text comes last.
    """
    near = nearest_rows(features, neighbours)
    lists = rerank_lists(features, near.rows, min(kept, near.rows.shape[1]))
    smooth = unit(graph_smooth(lists.rows, lists.similarity, texts, self_weight))
    trusted = torch.zeros(len(labels), dtype=torch.bool)
    for number, definition in enumerate(definitions):
        own = (labels == number).nonzero()[:, 0]
        if not len(own):
            continue
        cosine = smooth[own] @ definition
        own = own[cosine.round(decimals=PLACES).argsort(descending=True, stable=True)[:LARGEST]]
        distance = k_reciprocal_rerank(definition[None], smooth[own])[0]
        distance[smooth[own].norm(dim=1) == 0] = torch.inf
        trusted[own[distance.round(decimals=PLACES).argsort(stable=True)[:top]]] = True
    return trusted
