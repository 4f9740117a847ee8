"""`counterpoint embed RUN`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Text, say, unset


def main(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    *,
    data: Annotated[Text, unset(metavar="SOURCE")] = None,
    out: Annotated[str, arg(aliases=["-o"], metavar="FILE")] = "embeddings.parquet",
    split: Annotated[str, arg(metavar="all|train|valid|test|unpaired|items")] = "all",
) -> int:
    """Write the embeddings of every item in every modality to a Parquet file, for `search` or your own tools.

    Each row of FILE names the file, or the table's row, that its item comes from. Of a run of sequences, a row is a user's history,
    a set, or an item to recommend.

    Example: counterpoint embed runs/first --data manifest:mine.csv -o mine.parquet

    Args:
        run: A finished run of the task aligned, views, labelled, regression, tokens, sequences or federations.
        data: Another source with the same modalities. Default: the data the run was trained on.
        out: The file to write, .parquet.
        split: Embed only the items of this split. `items`, for a run of sequences: the items to recommend.
    """
    from counterpoint import search as room

    count = room.embed(run, out, data=data, split=split, say=say)
    say(f"{count} items: {out}   Search it: counterpoint search {run} QUERY --in {out}")
    return 0
