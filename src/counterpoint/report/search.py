"""Write the page of a search: the queries, and each hit with its image, player, text and source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoint.report import page as parts
from counterpoint.report.page import Page


def write_search_report(
    path: Path,
    queries: Sequence[tuple[str, Mapping[str, Any]]],
    target: str,
    hits: Sequence[Mapping[str, Any]],
    things: Sequence[Sequence[tuple[str, Mapping[str, Any]]]],
    embeddings: Path,
) -> Path:
    """Write the page of a search and return its path.

    Args:
        path: The page to write.
        queries: (modality, content) of each query. A content is {"text"}, {"png"} (base64), {"wav"} (base64), {"numbers"},
            {"audio"} or {"video"} (address), {"link", "name"} or {"gone"} (the reason why it cannot be shown).
        target: The modality that was searched.
        hits: Fields of each hit (see `counterpoint.search.Hit`).
        things: For each hit, its modalities with their contents.
        embeddings: The file that was searched.
    """
    asked = " + ".join(str(thing.get("text") or name) for name, thing in queries)
    page = Page(f"Search: {asked}", f"The items of {embeddings} that are most similar in {target}.")
    page.section("Asked", parts.part("asked", queries), anchor="asked")
    rows = [dict(hit) | {"things": shown} for hit, shown in zip(hits, things, strict=True)]
    found = parts.part("hits", rows) if rows else parts.text(f"No item has {target}.")
    page.section("Found", found, anchor="found")
    return page.write(path)
