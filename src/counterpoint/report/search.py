"""The page of a search: what was asked, and each hit with its picture, its player, its words and where it comes from."""

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
        path: the page.
        queries: (modality, thing) of what was asked with. A thing is {"text"}, {"png"} (base64), {"wav"} (base64),
            {"numbers"}, {"audio"} or {"video"} (address), {"link", "name"} or {"gone"} (why it cannot be shown).
        target: modality that was searched in.
        hits: fields of each hit (see `counterpoint.search.Hit`).
        things: for each hit its modalities as things.
        embeddings: the file that was searched.
    """
    asked = " + ".join(str(thing.get("text") or name) for name, thing in queries)
    page = Page(f"Search: {asked}", f"The items of {embeddings} that are nearest in {target}.")
    page.section("Asked", parts.part("asked", queries), anchor="asked")
    rows = [dict(hit) | {"things": shown} for hit, shown in zip(hits, things, strict=True)]
    found = parts.part("hits", rows) if rows else parts.text(f"No item has {target}.")
    page.section("Found", found, anchor="found")
    return page.write(path)
