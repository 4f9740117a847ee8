"""Make the page of a search: the queries and the hits, with thumbnails and players."""

from __future__ import annotations

import base64
import mimetypes
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from counterpoint.data.images import decode
from counterpoint.data.shown import NUMBERS, png
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.search.encoder import Encoder
from counterpoint.search.items import shown_items
from counterpoint.search.stored import WORDED, Embeddings, Hit
from counterpoint.tasks.histories import BETWEEN

EMBEDDED = 300_000  # maximum bytes of a sound or video to embed in the page; a larger file is linked
ROOM = 8_000_000  # maximum bytes of all embedded files together
THUMBNAIL = 96  # pixels


class _Files:
    """Files in the form that a page shows. `room` is the number of bytes that may still be embedded."""

    def __init__(self, page: Path) -> None:
        self.folder = os.path.abspath(page.parent)
        self.room = ROOM

    def __call__(self, path: str | Path) -> dict[str, Any]:
        """Return a thumbnail, a player, or the reason why a file cannot be shown."""
        kind = mimetypes.guess_type(str(path))[0] or ""
        try:
            if not os.path.isfile(path):
                return {"gone": f"{path}: no such file"}
            if kind.startswith("image"):
                return {"png": png(np.array(decode(Path(path), THUMBNAIL)))}
            if not kind.startswith(("audio", "video")):
                return {"link": self._link(path), "name": os.path.basename(path)}
            size = os.path.getsize(path)
            if size <= min(EMBEDDED, self.room):
                self.room -= size
                content = base64.b64encode(Path(path).read_bytes()).decode()
                return {kind.partition("/")[0]: f"data:{kind};base64,{content}"}
            return {kind.partition("/")[0]: self._link(path)}
        except (OSError, DataError) as error:
            return {"gone": f"{path}: {error}"}

    def _link(self, path: str | Path) -> str:
        return quote(os.path.relpath(path, self.folder))


def write_page(
    page: Path,
    encoder: Encoder,
    found: Embeddings,
    asked: Mapping[str, Any],
    target: str,
    hits: Sequence[Hit],
    *,
    say: Callable[[str], None],
) -> Path:
    """Write the page of a search and return its path.

    Images, sounds and videos are read from their files. Items without files are read again from the data source. Where that
    fails, `say` receives a note and the page shows texts and names.
    """
    from counterpoint.report.search import write_search_report

    files = _Files(page)
    source = None
    lacking = {name for name, kind in found.modalities.items() if kind not in WORDED}
    if any(lacking - set(hit.files) for hit in hits):
        try:
            source = Experiment.of_run(encoder.run).source(found.data)
        except CounterpointError as error:
            say(f"note: {page} has no thumbnails of items without files: {error}")
    things = [_things(hit, found, source, files, say) for hit in hits]
    queries = [(name, _query_shown(value, encoder.kinds[name], files)) for name, value in asked.items()]
    return write_search_report(page, queries, target, [vars(hit) for hit in hits], things, found.path)


def _query_shown(value: Any, kind: str, files: _Files) -> dict[str, Any]:
    if kind in WORDED:
        return {"text": value if isinstance(value, str) else BETWEEN.join(value)}
    if kind == "vector":
        return {"numbers": [round(float(x), 3) for x in np.load(value).ravel()[:NUMBERS]]}
    return files(value)


def _things(
    hit: Hit, found: Embeddings, source: Any, files: _Files, say: Callable[[str], None]
) -> list[tuple[str, dict[str, Any]]]:
    """Return each modality of a hit in the form that the page shows."""
    made: dict[str, dict[str, Any]] = {name: {"text": text} for name, text in hit.texts.items()}
    if source is not None:
        part = getattr(source, hit.split, None)
        if part is None or hit.item >= len(part):
            say(f"note: {hit.name} is no longer in {found.data}; it is shown without a thumbnail")
        else:
            made = shown_items(source, found.modalities, hit.split, hit.item)
    made |= {name: files(path) for name, path in hit.files.items()}
    return [(name, made[name]) for name in found.modalities if name in made]
