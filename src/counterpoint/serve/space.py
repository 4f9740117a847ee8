"""Hold embeddings and encoders in memory: search by words, picture or sound, items, and a map of a sample."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import decode
from counterpoint.data.shown import png
from counterpoint.engine.run import WEIGHTS, Run
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.experiment import Experiment
from counterpoint.search.asking import check_key, find
from counterpoint.search.encoder import Encoder
from counterpoint.search.items import shown_items
from counterpoint.search.stored import Embeddings, Hit, facts_of, is_shard, read_embeddings
from counterpoint.serve.places import OutsideError, Places
from counterpoint.serve.walking import Walk
from counterpoint.words import counted

SAMPLE = 20_000  # maximum number of points of a map
FITTED = 5_000  # maximum number of points that the axes of a map are computed from
SCALE = 10_000  # a map's coordinates are whole numbers from 0 to this
PIXELS = 40_000_000  # maximum number of pixels of an uploaded picture
WORDS = 2000  # maximum number of characters of a query
GROUPS = 11  # labels of the data with a colour; the others share one
PICTURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
SOUNDS = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9")


def kind_of(content: bytes) -> str:
    """Return "image" or "audio" by the first bytes of an upload. DataError for all other content.

    FFmpeg also reads play lists, which may name other files. Their first bytes are none of these.
    """
    if content.startswith(tuple(PICTURES)) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
        return "image"
    if content.startswith(SOUNDS) or (content[:4], content[8:12]) in ((b"RIFF", b"WAVE"), (b"FORM", b"AIFF")):
        return "audio"
    raise DataError(
        "the upload is no picture (PNG, JPEG, GIF, BMP, TIFF, WebP) and no sound (WAV, FLAC, Ogg, MP3, AAC, AIFF)"
    )


@dataclass(frozen=True)
class Table:
    """A file of embeddings, described without its rows."""

    key: str
    path: Path
    rows: int
    run: str
    modalities: dict[str, str]  # name -> kind


@dataclass(frozen=True)
class Map:
    """A sample of the embeddings of one modality on its two main axes."""

    rows: NDArray[np.int64]  # rows of the file, ascending
    points: NDArray[np.int64]  # [n, 2], 0..SCALE
    share: tuple[float, float]  # of the variance that each axis has
    total: int  # rows that have the modality


class Space:
    """Files of embeddings under the folders, with the runs that made them."""

    def __init__(self, places: Places, walk: Walk) -> None:
        self.places, self.walk = places, walk
        self._tables: dict[str, tuple[int, Table | None]] = {}
        # Of each kind the last one: a million embeddings take gigabytes.
        self._held: dict[str, tuple[Any, Any]] = {}
        self._maps: dict[tuple[Any, str], Map] = {}
        self._lock = threading.RLock()

    def tables(self) -> list[Table]:
        """List the files of embeddings, and the folders of shards."""
        found = []
        for file in dict.fromkeys(_whole(file) for file in self.walk().ending(".parquet")):
            path = Path(file)
            stamp = path.stat().st_mtime_ns
            if file not in self._tables or self._tables[file][0] != stamp:
                table = None
                # Whatever is not a file of embeddings, or lacks shards, is no table.
                with contextlib.suppress(DataError):
                    said, rows = facts_of(path)
                    table = Table(self.places.key(path), path, rows, str(said["run"]), said["modalities"])
                self._tables[file] = stamp, table
            if (kept := self._tables[file][1]) is not None:
                found.append(kept)
        return found

    def table(self, key: str) -> Table:
        """Return a file of embeddings by its key. OutsideError when there is none."""
        for table in self.tables():
            if table.key == key:
                return table
        raise OutsideError(f"'{key}' is no file of embeddings; make one: counterpoint embed RUN -o FILE.parquet")

    def _hold(self, kind: str, key: Any, make: Any) -> Any:
        """Return what is held under a key, or make it and hold it instead of the one before."""
        with self._lock:
            if kind not in self._held or self._held[kind][0] != key:
                self._held.pop(kind, None)  # free the memory first
                self._held[kind] = key, make()
            return self._held[kind][1]

    def embeddings(self, table: Table) -> Embeddings:
        """Read a file of embeddings, or return the one in memory."""
        made = self._hold("embeddings", _stamp(table.path), lambda: read_embeddings(table.path))
        assert isinstance(made, Embeddings)
        return made

    def run(self, table: Table) -> Run:
        """Return the run that made a file: by its path in the file, else by its name under the folders. RunError without it."""
        name = Path(table.run).name
        ways = [Path(table.run), *(folder / table.run for folder in self.places.folders), table.path.parent]
        for path in [*ways, *(Path(run) for run in self.walk().runs if Path(run).name == name)]:
            if path.name == name and self.places.holds(path):
                try:
                    run = Run.open(self.places.inside(path))
                except RunError:
                    continue
                if run.complete:
                    return run
        raise RunError(
            f"the run {table.run}, which made {table.path.name}, is not in these folders; start the server with its folder"
        )

    def encoder(self, table: Table) -> Encoder:
        """Load the run that made a file. CounterpointError when its weights are not those of the file."""
        run = self.run(table)
        encoder = self._hold("encoder", _stamp(run.path / WEIGHTS), lambda: Encoder.load(run))
        assert isinstance(encoder, Encoder)
        check_key(encoder, self.embeddings(table))
        return encoder

    # ------------------------------------------------------------------------------------------------------------ search

    def search(
        self, table: Table, *, words: str = "", upload: bytes = b"", modality: str | None = None, k: int = 24
    ) -> tuple[str, list[Hit]]:
        """Return the modality that was searched, and the items most similar to words, an upload, or both.

        Words never name a file. Of a run of sequences, they are names of items, separated by commas.
        """
        if len(words) > WORDS:
            raise CounterpointError(f"a query has at most {WORDS:,} characters")
        encoder = self.encoder(table)
        asked: dict[str, Any] = {}
        if words and encoder.task == "sequences":
            (lists,) = (name for name in encoder.kinds if name != "item")
            asked[lists] = tuple(name.strip() for name in words.split(",") if name.strip())
        elif words:
            asked[self._modality(encoder, "text")] = words
        if upload:
            kind = kind_of(upload)
            name = self._modality(encoder, kind)
            asked[name] = _uploaded(upload, kind, encoder.transform.modalities[name])
        if not asked:
            raise CounterpointError("give words, a picture or a sound to search for")
        return find(encoder, self.embeddings(table), asked, k=k, modality=modality or None)

    def _modality(self, encoder: Encoder, kind: str) -> str:
        names = encoder.transform.of_kind(kind)
        if not names:
            raise CounterpointError(f"this run has no modality of the kind {kind}; it has {encoder.listed()}")
        return names[0]

    # ------------------------------------------------------------------------------------------------------------- items

    def row(self, found: Embeddings, split: str, item: int) -> int:
        """Return the row of an item. OutsideError when the file has no such item."""
        for row in np.flatnonzero(found.item == item).tolist():
            if found.split[row] == split:
                return int(row)
        raise OutsideError(f"there is no item {item} in the split {split}")

    def about(self, table: Table, row: int) -> dict[str, Any]:
        """Return an item's name, label and texts, and the modalities that `shown` can show."""
        found = self.embeddings(table)
        if not 0 <= row < len(found.split):
            raise OutsideError(f"there is no row {row}")
        return {
            "split": found.split[row],
            "item": int(found.item[row]),
            "label": found.label[row] or "",
            "name": found.source[row] or f"{found.split[row]} {found.item[row]}",
            "texts": {name: text for name, column in found.texts.items() if (text := column[row])},
            "shown": {
                n: kind for n, kind in found.modalities.items() if kind in ("image", "audio") and found.present[n][row]
            },
        }

    def shown(self, table: Table, split: str, item: int, modality: str) -> tuple[bytes, str]:
        """Return a thumbnail (PNG) or a sound (WAV) of an item, with its media type. DataError where that is not possible."""
        found = self.embeddings(table)
        row = self.row(found, split, item)
        path = (found.files.get(modality) or [None] * len(found.split))[row]
        if path is not None:
            file = self.places.inside(path)
            if found.modalities.get(modality) == "image":
                return base64.b64decode(png(np.array(decode(file, 192)), 192)), "image/png"
            raise DataError(f"{file.name} is played from its file")
        source = self._source(table)
        made = shown_items(source, found.modalities, split, item).get(modality, {}) if hasattr(source, split) else {}
        for kind, media in (("png", "image/png"), ("wav", "audio/wav")):
            if kind in made:
                return base64.b64decode(made[kind]), media
        raise DataError(f"item {item} has no picture and no sound in {modality}")

    def sound(self, table: Table, split: str, item: int, modality: str) -> Path | None:
        """Return the file of an item's sound, confined to the folders; None where it has none."""
        found = self.embeddings(table)
        path = (found.files.get(modality) or [None] * len(found.split))[self.row(found, split, item)]
        return None if path is None or found.modalities.get(modality) != "audio" else self.places.inside(path)

    def _source(self, table: Table) -> Any:
        """Load the data that a file was made from, to show items without files."""
        data = self.embeddings(table).data
        self.places.check_words(data)
        return self._hold("source", (data, table.run), lambda: Experiment.of_run(self.run(table)).source(data or None))

    # --------------------------------------------------------------------------------------------------------------- map

    def map(self, table: Table, modality: str) -> Map:
        """Return a map of one modality: a sample of its embeddings on their two main axes (PCA)."""
        key = (_stamp(table.path), modality)
        with self._lock:
            if key not in self._maps:
                found = self.embeddings(table)
                if modality not in found.modalities:
                    raise OutsideError(f"the file has no modality '{modality}'")
                self._maps = {kept: value for kept, value in self._maps.items() if kept[0] == key[0]}
                self._maps[key] = mapped(found, modality)
            return self._maps[key]


def mapped(found: Embeddings, modality: str) -> Map:
    """Project a random sample of a modality on its two main axes. The sample has a fixed seed."""
    from sklearn.decomposition import PCA

    there = np.flatnonzero(found.present[modality])
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(there, SAMPLE, replace=False)) if len(there) > SAMPLE else there
    if len(rows) < 3 or found.vectors[modality].shape[1] < 2:
        raise CounterpointError(f"a map needs at least 3 items with {modality}, and embeddings of at least 2 numbers")
    vectors = found.vectors[modality][rows]
    fit = vectors if len(rows) <= FITTED else vectors[rng.choice(len(rows), FITTED, replace=False)]
    pca = PCA(2, svd_solver="covariance_eigh").fit(fit)
    points = pca.transform(vectors)
    low, high = points.min(0), points.max(0)
    whole = np.round((points - low) / max(float((high - low).max()), 1e-12) * SCALE).astype(np.int64)
    share = tuple(float(value) if np.isfinite(value) else 0.0 for value in pca.explained_variance_ratio_)
    return Map(rows, whole, (share[0], share[1]), len(there))


def grouped(names: list[str | None]) -> tuple[list[str], list[int]]:
    """Return the names of groups, the most frequent first, and the group of each item. Rare names share the last group."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name or ""] = counts.get(name or "", 0) + 1
    order = sorted(counts, key=lambda name: (name == "", -counts[name], name))
    shown, rest = (order, []) if len(order) <= GROUPS + 1 else (order[:GROUPS], order[GROUPS:])
    number = {name: n for n, name in enumerate(shown)} | dict.fromkeys(rest, len(shown))
    titles = [name or "without a label" for name in shown] + ([counted(len(rest), "other")] if rest else [])
    return titles, [number[name or ""] for name in names]


def _whole(file: str) -> str:
    """Return the folder of a shard, and any other file itself."""
    path = Path(file)
    return str(path.parent) if is_shard(path.name) else file


def _stamp(path: Path) -> tuple[str, int]:
    return str(path), path.stat().st_mtime_ns


def _uploaded(content: bytes, kind: str, spec: Mapping[str, Any]) -> Any:
    """Decode an upload to what the run's transform takes. DataError where it is damaged or too large."""
    if kind == "audio":
        from counterpoint.data.sounds import decode_sound

        return np.array(decode_sound(content, spec["rate"], spec["samples"]).wave, np.float32)
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=[*set(PICTURES.values()), "WEBP"]) as image:
            if image.width * image.height > PIXELS:
                raise DataError(f"the picture has more than {PIXELS:,} pixels; make it smaller")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture cannot be read ({error})") from error
    return content
