"""Search embeddings for the items most similar to texts, images, sounds or vectors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.files import check_there, check_writable, quoted
from counterpoint.search.encoder import Encoder
from counterpoint.search.nearest import nearest_rows
from counterpoint.search.stored import Embeddings, Hit, check_embeddings, check_local, read_embeddings

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff")
VECTORS = (".npy",)
# Endings of files that cannot be queries. A query such as "clip.mp4" is a wrong file, not words.
OTHERS = (
    ".mp4",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".heic",
    ".heif",
    ".avif",
    ".svg",
    ".pdf",
    ".npz",
    ".parquet",
    ".csv",
)


def search(
    path: Run | Path | str,
    queries: Sequence[str],
    embeddings: Path | str,
    *,
    k: int = 10,
    modality: str | None = None,
    html: Path | str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[str, list[Hit]]:
    """Return the modality that was searched, and the k items of a file of embeddings most similar to the queries.

    Items with the same text, or the same file, in that modality are one hit, with a count.

    Args:
        path: The run that made the embeddings.
        queries: Texts, image files, sound files and vectors in .npy files. Several queries are combined, as the run's system
            combines modalities. "MODALITY=QUERY" names the modality, for a run with several modalities of one kind. Of a run of
            sequences, queries are names of items: one history or set. They are no hits, where the run masks known items.
            "item=NAME" asks for the histories or sets that an item fits.
        embeddings: The file or folder that `embed` wrote.
        k: Number of hits, at least 1. Fewer are returned only if there are fewer items.
        modality: The modality to search in. Default: the first modality that no query has.
        html: A page to write, with thumbnails and players; checked for writing before the work begins. Default: none.
        say: Receives notes.

    Raises CounterpointError for a query or modality that the run cannot encode, and for embeddings of another run. Raises
    DataError for a query file that cannot be read.
    """
    if not queries or k < 1:
        raise CounterpointError("search needs at least one query, and -k of at least 1")
    if not isinstance(path, Run):
        check_local(path, "a run is a folder")
    check_embeddings(embeddings)
    page = None if html is None else check_writable(html)
    run = path if isinstance(path, Run) else Run.open(path)
    if run.config.get("task") != "sequences":  # its queries are names, which may look like files
        check_there(file for query in queries if (file := _file_asked(query)))
    encoder = Encoder.load(run)
    found = read_embeddings(embeddings)
    for note in found.notes:
        say(f"note: {note}")
    check_key(encoder, found)
    asked: dict[str, Any] = {} if encoder.task != "sequences" else _items_asked(queries, encoder)
    for query in queries if not asked else ():
        name, value = _query(query, encoder, asked)
        asked[name] = value
    target, hits = find(encoder, found, asked, k=k, modality=modality)
    if page is not None:
        from counterpoint.search.shown import write_page

        write_page(page, encoder, found, asked, target, hits, say=say)
    return target, hits


def check_key(encoder: Encoder, found: Embeddings) -> None:
    """Raise CounterpointError when a file of embeddings was made by other weights."""
    if found.key != encoder.key:
        place = f"{found.path}-new/" if found.path.is_dir() else found.path
        raise CounterpointError(
            f"{found.path} holds embeddings of other weights ({found.run}); make them again: counterpoint embed "
            f"{encoder.run.path} -o {place}"
        )


def find(
    encoder: Encoder, found: Embeddings, asked: Mapping[str, Any], *, k: int, modality: str | None = None
) -> tuple[str, list[Hit]]:
    """Return the modality that was searched and the k nearest items, for queries that are read already.

    Args:
        encoder: The run that made the embeddings, loaded.
        found: The file of embeddings, read.
        asked: Maps names of modalities to items, as `Encoder.rows` takes them.
        k: Number of hits, at least 1.
        modality: The modality to search in. Default: the first modality that no query has.

    Raises CounterpointError for an unknown modality, and for queries that the run cannot combine.
    """
    target = modality or next((name for name in found.modalities if name not in asked), next(iter(asked)))
    if target not in found.modalities:
        raise unknown("modality", target, found.modalities)
    _check_whole(encoder, asked, target)
    vector = encoder.joined({name: encoder.rows(name, [value]) for name, value in asked.items()})[0]
    if len(vector) != found.vectors[target].shape[1]:
        raise DataError(
            f"{found.path} is damaged: its {target} has {found.vectors[target].shape[1]} numbers an item, the run's has "
            f"{len(vector)}; make it again: counterpoint embed {quoted(encoder.run.path)} -o {quoted(found.path)}"
        )
    masked = encoder.task == "sequences" and encoder.config.mask_seen and target == "item"
    known = {name for items in asked.values() for name in items} if masked and "item" not in asked else set()
    return target, _hits(found, target, vector, k, known)


def _check_whole(encoder: Encoder, asked: Mapping[str, Any], target: str) -> None:
    """Raise CounterpointError when a run that scores whole tuples gets queries for only a part of a tuple."""
    if not getattr(encoder.learner, "whole_tuples", False):
        return
    wanted = [name for name in encoder.kinds if name != target]
    if set(asked) != set(wanted):
        raise CounterpointError(
            f"{encoder.run.path} was trained to score whole items: to search in {target}, give queries of "
            f"{' and '.join(wanted)} together, not of {' and '.join(asked)}"
        )


def _items_asked(queries: Sequence[str], encoder: Encoder) -> dict[str, Any]:
    """Return the query to a run of sequences: one history or set of all names of items, or one item."""
    (lists,) = (name for name in encoder.kinds if name != "item")
    single = [query.partition("=")[2] for query in queries if query.startswith("item=")]
    if not single:
        return {lists: tuple(query.removeprefix(f"{lists}=") for query in queries)}
    if len(queries) > 1:
        raise CounterpointError(f"item=NAME is the only query of a search; without it, all queries are one {lists}")
    return {"item": single[0]}


def _hits(found: Embeddings, target: str, vector: np.ndarray, k: int, known: Collection[str] = ()) -> list[Hit]:
    """Return the k nearest items that differ in a modality, without those whose texts are known.

    Items with the same text or file there are one hit.
    """
    total = int(np.count_nonzero(found.present[target]))
    texts, files = found.texts.get(target), found.files.get(target)

    def thing(row: int) -> Any:
        """Return the item's text or file in the searched modality, or its row where it has neither."""
        if texts is not None:
            return texts[row]
        return row if files is None or files[row] is None else files[row]

    wanted = k + len(known)
    while True:
        nearest = nearest_rows(found, target, vector, wanted)
        first: dict[Any, tuple[float, int]] = {}
        for similarity, row in nearest:
            if thing(row) not in known:
                first.setdefault(thing(row), (similarity, row))
        if len(first) >= k or wanted >= total:
            break
        wanted = min(total, 4 * wanted)
    chosen = dict(list(first.items())[:k])
    members: dict[Any, list[int]] = {key: [row] for key, (_, row) in chosen.items()}
    if texts is not None or files is not None:
        for row in np.flatnonzero(found.present[target]).tolist():
            if (rows := members.get(thing(row))) is not None and row != rows[0]:
                rows.append(row)
    return [
        Hit(
            rank,
            similarity,
            int(found.item[row]),
            found.split[row],
            found.label[row],
            {name: said for name, column in found.texts.items() if (said := column[row])},
            found.source[row],
            {name: path for name, column in found.files.items() if (path := column[row])},
            len(members[key]),
            [found.source[other] or f"{found.split[other]} {found.item[other]}" for other in members[key][1:]],
        )
        for rank, (key, (similarity, row)) in enumerate(chosen.items(), 1)
    ]


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # words that are too long for the name of a file
        return False


def _file_asked(query: str) -> str:
    """Return the path that a query names by its ending, with or without a modality before it; "" for words."""
    named, sign, rest = query.partition("=")
    file = rest if sign and re.fullmatch(r"\w+", named) else query
    return file if Path(file).suffix.lower() in (*PICTURES, *SOUNDS, *VECTORS) and "://" not in file else ""


def _query(query: str, encoder: Encoder, taken: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the modality of a query, and the item for the run's transform: a path, or words.

    "MODALITY=..." names the modality, for a run with several modalities of one kind.
    """
    named, sign, rest = query.partition("=")
    if sign and named in encoder.kinds:
        if named in taken:
            raise CounterpointError(f"two queries are of the modality {named}; give one query for each modality")
        query = rest
    elif sign and (Path(rest).is_file() or difflib.get_close_matches(named, encoder.kinds, cutoff=0.75)):
        raise unknown("modality", named, encoder.kinds)  # not words that hold an equals sign
    else:
        named = ""
    check_local(query, "queries are words, or files")
    file, ending = Path(query), Path(query).suffix.lower()
    kinds_of = {"image": PICTURES, "audio": SOUNDS, "vector": VECTORS}
    kind = next((kind for kind, endings in kinds_of.items() if ending in endings), "text")
    if kind == "text" and not query.strip():
        raise CounterpointError("the query is empty; give words or the path of a file")
    # Treat the path of a missing file as an error, not as words.
    pathlike = ending in OTHERS or (file.parent != Path() and ending and not re.search(r"\s", query))
    if kind == "text" and (pathlike or _is_there(file)):
        raise DataError(
            f"{query} is neither an image ({', '.join(PICTURES)}) nor a sound ({', '.join(SOUNDS)}) nor a vector "
            f"({', '.join(VECTORS)}); name a file of these kinds, or give words"
        )
    names = [name for name in encoder.transform.of_kind(kind) if named in ("", name)]
    free = [name for name in names if name not in taken]
    if not free:
        more = "other " if names else ""
        raise CounterpointError(
            f"this run has no {more}modality for '{query}', which is of the kind {kind}; it has {encoder.listed()}"
        )
    return free[0], query if kind == "text" else file
