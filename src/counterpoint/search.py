"""Embeddings of a whole set in one file, and search in them by a text, a picture, a sound, or several together.

    rows = embed("runs/first", "emb.parquet")                   # every item in every modality, a Parquet file
    index("emb.parquet")                                        # for large sets: a graph for each modality, beside it
    hits = search("runs/first", ["red arrow"], "emb.parquet")   # a text, an image, sound or vector file, several together

Search is exact, unless `index` has made a graph (FAISS's HNSW) of this very file. FAISS was chosen by measurement
(`benchmarks/search.py`): of usearch, LanceDB and FAISS it is the fastest at asking and its index is one file. Exact search of
100,000 rows of 128 takes milliseconds, so an index pays only from about a million rows on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterpoint.data.images import decode
from counterpoint.data.pairs import AlignedData, AlignedSplit
from counterpoint.encoders.text import Tokenizer
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError, RunError, unknown
from counterpoint.files import replacing
from counterpoint.tasks.aligned import Items, ListedSplit
from counterpoint.training import load_learner, load_source, restore
from counterpoint.views.images import normalise

SPLITS = ("all", "train", "test", "unpaired")
BATCH = 256
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff")
VECTORS = (".npy",)
# Names of files that are nothing to look for by: no one asks for the words "clip.mp4".
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
RESERVED = ("item", "split", "label", "source")  # columns that are no text of the item's
NEIGHBOURS, BUILD, ASK = 32, 128, 64  # of the graph: edges a row, and how many candidates are kept building and asking


@dataclass(frozen=True)
class Hit:
    """One item found."""

    rank: int  # from 1
    similarity: float  # dot product of the embeddings; their cosine where these are unit rows
    item: int
    split: str
    label: str | None
    texts: dict[str, str]  # what the item says in its modalities of text
    source: str | None = None  # the row of the user's own manifest that it is


@dataclass(frozen=True)
class Embeddings:
    """A file that `embed` wrote."""

    path: Path
    run: str
    key: str  # of the run's weights: embeddings of other weights cannot be compared with a query's
    modalities: dict[str, str]  # name -> kind
    item: NDArray[np.int64]
    split: list[str]
    label: list[str | None]
    texts: dict[str, list[str | None]]
    vectors: dict[str, NDArray[np.float32]]  # name -> [n, dim], zeros where the item lacks the modality
    present: dict[str, NDArray[np.bool_]]
    source: list[str | None]  # rows of a manifest


def _column(text: str) -> str:
    """The column of a modality of text."""
    return f"{text}_text" if text in RESERVED else text


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise CounterpointError(
            "files of embeddings are Parquet, which needs the extra [datasets]: pip install 'counterpoint[datasets]'"
        ) from error
    return pa, pq


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise CounterpointError("an index needs the extra [search]: pip install 'counterpoint[search]'") from error
    return faiss


def _key(run: Run) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(run.load_weights().items()):
        digest.update(name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _opened(path: Path | str) -> tuple[Run, Any]:
    """A run of the task aligned and its trained learner."""
    run = Run.open(path)
    system, _ = restore(run)
    if system.task != "aligned":
        raise CounterpointError(f"{run.path} is a run of the task {system.task}; only runs of aligned embed and search")
    return run, load_learner(run)


# ---------------------------------------------------------------------------------------------------------------- embed


@torch.no_grad()
def embed(
    path: Path | str,
    out: Path | str,
    *,
    data: str | None = None,
    split: str = "all",
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Write the embeddings of a run's data, or another source's of the same modalities, and return how many items there are.

    A row of the Parquet file is an item: `item` (its position in its split), `split`, `label`, `source` (the row of a
    manifest that it is), the texts as they are, and `<modality>_embedding`, null where the item lacks it. The split
    "unpaired" has items in one modality each, where the data has such. Raises CounterpointError for another task, data that
    does not fit, an unknown split; DataError and RunError for files.
    """
    pa, pq = _arrow()
    out = Path(out)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if out.suffix != ".parquet":
        raise CounterpointError(f"embeddings are written as Parquet; name a file that ends in .parquet, not {out}")
    run, learner = _opened(path)
    system, config = restore(run)
    source: AlignedData = load_source(system, data or run.config["data"])
    for note in source.notes:
        say(f"note: {note}")
    items = Items(source, run.facts(), config.context)
    parts = {name: getattr(source, name) for name in SPLITS[1:] if split in ("all", name)}
    parts = {name: part for name, part in parts.items() if part is not None}
    if not parts:
        raise CounterpointError(f"{source.name} has no split '{split}'")
    worded = [name for name, modality in source.modalities.items() if modality.kind == "text"]
    columns: dict[str, list[Any]] = {name: [] for name in (*RESERVED, *map(_column, worded))}
    vectors: dict[str, list[Any]] = {name: [] for name in source.modalities}
    from rich.console import Console
    from rich.progress import track

    chunks = [(name, part, rows) for name, part in parts.items() for rows in _chunks(part)]
    for name, part, rows in track(chunks, "embedding", console=Console(stderr=True), transient=True):
        batch = items.batch(part, rows)
        found = learner.predict(batch)["embedding"]
        columns["item"] += rows
        columns["split"] += [name] * len(rows)
        columns["label"] += _labels(source, part, rows)
        listed = isinstance(part, ListedSplit)
        columns["source"] += part.row_names(np.asarray(rows)) if listed else [None] * len(rows)
        for word in worded:
            columns[_column(word)] += part.column(word, np.asarray(rows))
        for modality, kept in vectors.items():
            there = batch["present"][modality].tolist()
            values = found[modality].float().cpu().numpy()
            if not np.isfinite(values[there]).all():
                raise RunError(
                    f"{run.path}: its embeddings of {modality} hold NaN or infinite values; training diverged"
                )
            kept += [row if here else None for row, here in zip(values, there, strict=True)]
    for modality, kept in vectors.items():
        dim = next((len(row) for row in kept if row is not None), 1)
        columns[f"{modality}_embedding"] = pa.array(
            [None if row is None else row for row in kept], pa.list_(pa.float32(), dim)
        )
    table = pa.table(columns)
    said = {
        "run": str(run.path),
        "key": _key(run),
        "data": data or run.config["data"],
        "modalities": {name: modality.kind for name, modality in source.modalities.items()},
    }
    table = table.replace_schema_metadata({b"counterpoint": json.dumps(said).encode()})
    with replacing(out) as file:
        pq.write_table(table, file)
    return int(table.num_rows)


def _chunks(split: AlignedSplit) -> list[list[int]]:
    return [list(range(at, min(at + BATCH, len(split)))) for at in range(0, len(split), BATCH)]


def _labels(source: AlignedData, split: AlignedSplit, rows: Sequence[int]) -> list[str | None]:
    if split.labels is None or not source.classes:
        return [None] * len(rows)
    return [source.classes[n] if n >= 0 else None for n in split.labels[rows].tolist()]


def read_embeddings(path: Path | str) -> Embeddings:
    """A file that `embed` wrote; DataError when it is none, or damaged."""
    pa, pq = _arrow()
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it: counterpoint embed RUN -o {path}")
    try:
        table = pq.read_table(path)
        said = json.loads((table.schema.metadata or {})[b"counterpoint"])
        modalities = dict(said["modalities"])
        vectors, present = {}, {}
        for name in modalities:
            column = table[f"{name}_embedding"].combine_chunks()
            there = np.asarray(column.is_valid())
            dim = column.type.list_size
            values = np.zeros((len(column), dim), np.float32)
            values[there] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
            vectors[name], present[name] = values, there
        return Embeddings(
            path,
            str(said["run"]),
            str(said["key"]),
            modalities,
            table["item"].to_numpy(),
            table["split"].to_pylist(),
            table["label"].to_pylist(),
            {name: table[_column(name)].to_pylist() for name, kind in modalities.items() if kind == "text"},
            vectors,
            present,
            table["source"].to_pylist() if "source" in table.column_names else [None] * len(table),
        )
    except (KeyError, ValueError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: not a file that counterpoint embed wrote, or damaged ({str(error).splitlines()[0][:160]})"
        ) from error


# ---------------------------------------------------------------------------------------------------------------- index


def _graph_file(path: Path, modality: str) -> Path:
    return path.with_name(f"{path.name}.{modality}.faiss")


def _stamp(found: Embeddings) -> str:
    stat = found.path.stat()
    return f"{found.key}-{stat.st_size}-{stat.st_mtime_ns}"


def index(path: Path | str, *, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Build a graph (HNSW) over each modality of a file of embeddings, beside it; returns the graphs' files.

    A graph is used only as long as the file it was made of is unchanged.
    """
    faiss = _faiss()
    found = read_embeddings(path)
    files = []
    for name, vectors in found.vectors.items():
        rows = np.flatnonzero(found.present[name])
        if not len(rows):
            say(f"note: no item has {name}; it gets no index")
            continue
        inner = faiss.IndexHNSWFlat(vectors.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        inner.hnsw.efConstruction = BUILD
        graph = faiss.IndexIDMap(inner)
        graph.add_with_ids(vectors[rows], rows)
        file = _graph_file(found.path, name)
        with replacing(file) as out:
            out.write(faiss.serialize_index(graph).tobytes())
        with replacing(file.with_name(file.name + ".json")) as out:
            out.write(json.dumps({"stamp": _stamp(found)}).encode())
        files.append(file)
    return files


def _nearest(found: Embeddings, modality: str, query: NDArray[np.float32], k: int) -> list[tuple[float, int]]:
    """(similarity, row) of the k nearest: by the graph where there is one of this file, else exactly."""
    graph = _graph(found, modality)
    if graph is not None:
        similarity, rows = graph.search(query[None], k)
        return [(float(s), int(r)) for s, r in zip(similarity[0], rows[0], strict=True) if r >= 0]
    rows = np.flatnonzero(found.present[modality])
    similarity = found.vectors[modality][rows] @ query
    best = np.argsort(-similarity, kind="stable")[:k]
    return [(float(similarity[n]), int(rows[n])) for n in best]


def _graph(found: Embeddings, modality: str) -> Any:
    file = _graph_file(found.path, modality)
    said = file.with_name(file.name + ".json")
    try:
        if json.loads(said.read_text())["stamp"] != _stamp(found):
            return None
        faiss = _faiss()
        graph = faiss.deserialize_index(np.frombuffer(file.read_bytes(), np.uint8))
    except (OSError, ValueError, KeyError, TypeError, CounterpointError):
        return None
    except RuntimeError as error:
        raise DataError(f"{file} is damaged; make it anew: counterpoint index {found.path}") from error
    faiss.downcast_index(graph.index).hnsw.efSearch = ASK
    return graph


# --------------------------------------------------------------------------------------------------------------- search


@torch.no_grad()
def search(
    path: Path | str,
    queries: Sequence[str],
    embeddings: Path | str,
    *,
    k: int = 10,
    modality: str | None = None,
) -> tuple[str, list[Hit]]:
    """The modality that was searched in, and the k items of a file of embeddings that are most like the queries.

    Args:
        path: the run that the embeddings are of.
        queries: texts, image files, sound files and vectors in .npy files. Several are sought together, as the run's system
            joins modalities.
        modality: to search in. Default: the first that is not asked with.

    Raises CounterpointError for a query or modality that the run has no tower for, and embeddings of another run; DataError
    for a query file that cannot be read.
    """
    if not queries or k < 1:
        raise CounterpointError("search needs a query, and -k of at least 1")
    run, learner = _opened(path)
    found = read_embeddings(embeddings)
    if found.key != _key(run):
        raise CounterpointError(
            f"{found.path} holds embeddings of other weights ({found.run}); make them anew: counterpoint embed {run.path} "
            f"-o {found.path}"
        )
    facts = run.facts()
    _, config = restore(run)
    asked: dict[str, Any] = {}
    for query in queries:
        name, value = _query(query, facts, config, asked)
        asked[name] = value
    target = modality or next((name for name in found.modalities if name not in asked), next(iter(asked)))
    if target not in found.modalities:
        raise unknown("modality", target, found.modalities)
    # One at a time: what a system makes of a whole item needs all of it.
    made = [learner.predict({"inputs": {n: v}, "part": "query"})["embedding"][n][0] for n, v in asked.items()]
    joined = made[0] if len(made) == 1 else _joined(learner, made)
    vector = np.ascontiguousarray(joined.float().cpu().numpy())
    if not np.isfinite(vector).all():
        raise RunError(f"{run.path}: its embedding of the query holds NaN or infinite values; training diverged")
    hits = [
        Hit(
            rank,
            similarity,
            int(found.item[row]),
            found.split[row],
            found.label[row],
            {name: said for name, texts in found.texts.items() if (said := texts[row])},
            found.source[row],
        )
        for rank, (similarity, row) in enumerate(_nearest(found, target, vector, k), 1)
    ]
    return target, hits


def _joined(learner: Any, made: Sequence[torch.Tensor]) -> torch.Tensor:
    return learner.joint([row[None] for row in made])[0]


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # words that are too long for the name of a file
        return False


def _query(query: str, facts: Mapping[str, Any], config: Any, taken: Mapping[str, Any]) -> tuple[str, Any]:
    """The modality a query is of, and its inputs as a batch of one."""
    file, ending = Path(query), Path(query).suffix.lower()
    kinds_of = {"image": PICTURES, "audio": SOUNDS, "vector": VECTORS}
    kind = next((kind for kind, endings in kinds_of.items() if ending in endings), "text")
    if kind == "text" and not query.strip():
        raise CounterpointError("the query is empty; say what to look for")
    # A path that leads nowhere is a slip, not words.
    pathlike = ending in OTHERS or (file.parent != Path() and ending and not re.search(r"\s", query))
    if kind == "text" and (pathlike or _is_there(file)):
        raise DataError(
            f"{query} is neither a picture ({', '.join(PICTURES)}), sound ({', '.join(SOUNDS)}) or vector ({', '.join(VECTORS)})"
        )
    names = [name for name, spec in facts["modalities"].items() if spec["kind"] == kind]
    free = [name for name in names if name not in taken]
    if not free:
        kinds = ", ".join(f"{name} ({spec['kind']})" for name, spec in facts["modalities"].items())
        more = "other " if names else ""
        raise CounterpointError(
            f"this run has no {more}modality for '{query}', which is of the kind {kind}; it has {kinds}"
        )
    spec = facts["modalities"][free[0]]
    try:
        if kind == "image":
            pixels = torch.from_numpy(np.array(decode(file, spec["size"])))
            return free[0], normalise(pixels.permute(2, 0, 1)[None])
        if kind == "audio":
            from counterpoint.data.sounds import decode_sound

            return free[0], torch.from_numpy(np.array(decode_sound(file, spec["rate"], spec["samples"]).wave))[None]
        if kind == "vector":
            from counterpoint.data.manifest import read_vector

            values = read_vector(file)
            if len(values) != spec["dim"]:
                raise DataError(f"has {len(values)} numbers, the run's {free[0]} has {spec['dim']}")
            return free[0], torch.from_numpy(values)[None]
    except DataError as error:
        raise DataError(f"{query}: {error}") from error
    return free[0], Tokenizer.from_json(facts["tokenizers"][free[0]]).encode([query], config.context)
