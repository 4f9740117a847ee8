"""`counterpoint embed RUN`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from counterpoint.commands.common import HERE, Count, Device, Machines, Text, say, unset
from counterpoint.errors import CounterpointError
from counterpoint.words import counted


def main(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    *,
    data: Annotated[Text, unset(metavar="SOURCE")] = None,
    out: Annotated[Text, unset(aliases=["-o"], metavar="FILE|FOLDER")] = None,
    split: Annotated[str, arg(metavar="all|train|valid|test|unpaired|items")] = "all",
    shard_rows: Annotated[Count, unset(metavar="INT")] = None,
    jobs: Annotated[Count, unset(aliases=["--workers"], metavar="INT")] = None,
    device: Device = "auto",
    machines: OmitArgPrefixes[Machines] = HERE,
) -> int:
    """Write the embeddings of every item in every modality to Parquet, for `search` or your own tools.

    Each row names the file, or the table's row, that its item comes from. Of a run of sequences, a row is a user's history,
    a set, or an item to recommend. The memory is bounded, whatever the number of items.

    A folder gets shards. The same command continues an interrupted one with the first missing shard. The rows are those of one
    file.

    Example: counterpoint embed runs/first --data manifest:mine.csv -o mine.parquet

    Example: counterpoint embed runs/first --data manifest:million.csv -o million/ --workers 2

    Args:
        run: A finished run of the task aligned, views, labelled, regression, tokens, dialogs, sequences or federations.
        data: Another source with the same modalities. Default: the data the run was trained on.
        out: The file to write, .parquet, or a folder of shards. Default: embeddings.parquet, with --shard-rows embeddings/.
        split: Embed only the items of this split. `items`, for a run of sequences: the items to recommend.
        shard_rows: Rows of a shard at most, in whole batches of 256. Default: 65536.
        jobs: Number of processes that write shards, with one thread each where there are several. Default: 1, on Ray all that
            there is room for.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps. Several processes share it.
        machines: Where the shards are made.
    """
    from counterpoint import search as room
    from counterpoint.files import quoted

    if any(count is not None and count < 1 for count in (shard_rows, jobs)):
        raise CounterpointError("--shard-rows and --workers must be at least 1")
    place = out or ("embeddings/" if shard_rows else "embeddings.parquet")
    count = room.embed(
        run,
        place,
        data=data,
        split=split,
        shard_rows=shard_rows,
        jobs=machines.jobs(jobs, 1),
        cluster=machines.cluster(),
        device=device,
        say=say,
    )
    say(f"{counted(count, 'item')}: {place}   Search it: counterpoint search {quoted(run)} QUERY --in {quoted(place)}")
    return 0
