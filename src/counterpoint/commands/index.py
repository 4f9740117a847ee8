"""`counterpoint index FILE`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import say


def main(embeddings: Annotated[Positional[str], arg(metavar="FILE")]) -> int:
    """Build an index of a file or folder of embeddings, for a million items and more; smaller files are searched exactly.

    Report the share of the exact neighbours that the index finds. Where the share is below 0.95, search stays exact.

    Example: counterpoint index embeddings.parquet

    Args:
        embeddings: A file or folder that `counterpoint embed` wrote.
    """
    from counterpoint import search as room

    for file in room.index(embeddings, say=say):
        say(str(file))
    return 0
