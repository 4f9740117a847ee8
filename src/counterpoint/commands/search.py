"""`counterpoint search RUN QUERY`."""

from __future__ import annotations

import json
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Place, Text, complain, console, say, table, unset


def main(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    query: Annotated[Positional[tuple[str, ...]], unset(metavar="QUERY [QUERY ...]")],
    *,
    in_: Annotated[str, arg(name="in", metavar="FILE")] = "embeddings.parquet",
    k: Annotated[int, arg(aliases=["-k"])] = 10,
    modality: Annotated[Text, unset(metavar="NAME")] = None,
    html: Annotated[Place, unset(metavar="FILE")] = None,
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Find the items most similar to a text, an image, sound or vector file; several queries are combined.

    A run of sequences finds what to recommend to a user who has the items of the queries, best first.

    Example: counterpoint search runs/first "a red circle" --in embeddings.parquet -k 5 --html found.html

    Args:
        run: The run that made the embeddings.
        query: Words, or the path of an image, a sound or a vector (.npy). Where a run has several modalities of one kind,
            MODALITY=QUERY names the modality. For a run of sequences: names of items that a user has, or item=NAME.
        in_: A file or folder that `counterpoint embed` wrote.
        k: Number of items to find, at least 1. Items with the same text or file are one hit.
        modality: The modality to search in. Default: the first modality that no query has.
        html: A page to write, with thumbnails and players. Default: none.
        json_: Print JSON.
    """
    from counterpoint import search as room

    notes: list[str] = []
    target, hits = room.search(run, query, in_, k=k, modality=modality, html=html, say=notes.append)
    for note in notes:
        complain(note, "default")
    if json_:
        print(json.dumps({"modality": target, "hits": [vars(hit) for hit in hits]}, indent=2))
        return 0
    numbers = ("", "similarity", "items", "item")
    shown = table(*numbers, "split", "label", "text", "source", right=numbers, title=f"in {target}")
    shown.columns[-1].overflow = "fold"
    for hit in hits:
        files = [path for path in hit.files.values() if path != hit.source]
        shown.add_row(
            *(str(hit.rank), f"{hit.similarity:.3f}", str(hit.count), str(hit.item)),
            *(hit.split, hit.label or "", " · ".join(hit.texts.values())),
            " · ".join([*([hit.source] if hit.source else []), *files]),
        )
    console().print(shown)
    if html is not None:
        say(f"Page: {html}")
    return 0
