"""Embed the items of a data source with a trained run. Write the embeddings to a file, or to a folder of shards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterpoint.data.memory import is_memory
from counterpoint.engine.run import WEIGHTS, Run
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.experiment import Experiment
from counterpoint.files import check_writable, held
from counterpoint.lab.cluster import Cluster, run_tasks
from counterpoint.search.encoder import Encoder, embeddable
from counterpoint.search.items import SPLITS, Items
from counterpoint.search.stored import arrow, check_local, shard_name, shards_of
from counterpoint.search.table import Batch, Layout, Maker, survey
from counterpoint.words import counted

SHARD = 65_536  # rows of a shard
TEXTS = ".texts"  # in a folder of shards, until it is complete: the embeddings of texts that occur more than once


@dataclass(frozen=True)
class Job:
    """A table to write, in a form that another process takes."""

    run: str
    data: str
    split: str
    layout: Layout
    texts: Path
    said: dict[str, Any]  # what the files say about themselves
    device: str

    @property
    def name(self) -> str:
        """All that tells this table from others."""
        return json.dumps(self.said, sort_keys=True)


def embed(
    path: Run | Path | str,
    out: Path | str,
    *,
    data: str | None = None,
    split: str = "all",
    shard_rows: int | None = None,
    jobs: int | None = 1,
    device: str = "cpu",
    cluster: Cluster | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Write the embeddings of a run's data, or of another source of the same modalities. Return the number of items.

    A row is an item. The columns are:

    - `item`: its position in its split;
    - `split`, `label` and its texts;
    - `source`: its file, or its row of a table;
    - `<modality>_file`: path of its image, sound or video where there is one;
    - `<modality>_embedding`: null where the item lacks the modality.

    The split "unpaired" has items in one modality each, where the data has such items. Equal texts have equal embeddings. Of a run
    of sequences, a row is a history or a set. Its split "items" has the items to recommend.

    The memory is bounded, whatever the number of items. A folder gets shards, `part-00000.parquet` and so on. Each appears when
    it is complete. So the same call continues where it was interrupted. The rows are those of one file, bit for bit.

    Args:
        path: A finished run of the task aligned, views, labelled, regression, tokens, dialogs, sequences or federations.
        out: A file that ends in .parquet, or a folder; checked for writing before the work begins. A name without an ending, or
            with a slash at its end, is a folder.
        data: Another data source. Default: the run's own.
        split: One of all, train, valid, test, unpaired, items.
        shard_rows: Rows of a shard at most, at least 1, in whole batches of 256. Default: 65,536 in a folder.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps. Several processes share it.
        jobs: Number of processes that write shards, at least 1. None: on a cluster, as many as it has room for.
        cluster: The cluster whose machines write the shards. Default: this machine alone.
        say: Receives notes, and a line for each shard.

    Raises CounterpointError for another task, data that does not fit, and an unknown split. So do shards of other weights, data
    or settings in the folder. Raises DataError and RunError for files.
    """
    check_local(out, "embeddings are written to a file")
    if not isinstance(path, Run):
        check_local(path, "a run is a folder")
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    folder = _is_folder(out, shard_rows)
    out = Path(out)
    if shard_rows is not None and shard_rows < 1:
        raise CounterpointError(f"a shard needs at least 1 row, got {shard_rows}")
    if not folder and (jobs != 1 or cluster is not None):
        raise CounterpointError("several processes write shards: name a folder, -o embeddings/")
    check_writable(out / shard_name(0) if out.is_dir() else out)
    run = path if isinstance(path, Run) else Run.open(path)
    if not (run.path / WEIGHTS).is_file():
        run.load_weights()  # raises, with the reason
    experiment = embeddable(run)
    spec = data or experiment.data
    if is_memory(spec) and (jobs != 1 or cluster is not None):
        raise CounterpointError("an object in memory is embedded by this process alone; save the data as files")
    source = experiment.source(data)
    for note in source.notes:
        say(f"note: {note}")
    encoder = Encoder.load(run, device=device)
    items = Items.of(source, encoder, split)
    said = {"run": str(encoder.run.path), "key": encoder.key, "data": spec, "modalities": encoder.kinds, "split": split}
    if not folder:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as texts:
            layout = survey(items, encoder, Path(texts))
            maker = Maker(items, encoder, layout, Path(texts))
            with _bar(layout.rows) as maker.progress:
                return maker.write(layout.batches, out, _metadata(said))
    out.mkdir(exist_ok=True)
    with held(out, "embeds into"):
        job = _job(items, encoder, out, said | {"shard_rows": shard_rows or SHARD}, device)
        try:
            _HELD["maker"] = job.name, Maker(items, encoder, job.layout, job.texts)
            _write_shards(job, out, jobs, cluster, say)
        finally:
            _HELD.clear()
        shutil.rmtree(job.texts)
    return job.layout.rows


def _is_folder(out: Path | str, shard_rows: int | None) -> bool:
    """Return whether an output is a folder of shards. CounterpointError for names that are neither folder nor .parquet file."""
    place = Path(out)
    folder = str(out).endswith(("/", os.sep)) or place.is_dir() or not place.suffix
    if folder and place.is_file():
        raise CounterpointError(f"{place} is a file; name a folder for shards, or a file that ends in .parquet")
    if not folder and place.suffix != ".parquet":
        raise CounterpointError(f"embeddings are written as Parquet; name a file that ends in .parquet, not {place}")
    if not folder and shard_rows is not None:
        raise CounterpointError(f"shards are written to a folder, and {place} is a file; name a folder, -o embeddings/")
    return folder


def _metadata(said: dict[str, Any]) -> dict[bytes, bytes]:
    return {b"counterpoint": json.dumps(said).encode()}


# ---------------------------------------------------------------------------------------------------------------- shards


def _job(items: Items, encoder: Encoder, out: Path, said: dict[str, Any], device: str) -> Job:
    """Return the job of a folder of shards. CounterpointError when the folder has shards of another table."""
    earlier = [(file, _said(file)) for file in shards_of(out)]
    reasons = {
        "key": "of other weights",
        "data": "of other data",
        "modalities": "of other modalities",
        "split": "of another split",
        "shard_rows": "with another number of rows a shard",
    }
    for file, found in earlier:  # before the survey, which may take minutes
        _refuse(file, found, said, reasons)
    texts = out / TEXTS
    if (marker := texts / "key").is_file() and marker.read_text() != encoder.key:
        shutil.rmtree(texts)
    texts.mkdir(exist_ok=True)
    marker.write_text(encoder.key)
    layout = survey(items, encoder, texts)
    said |= {"content": layout.content, "rows": layout.rows}
    for file, found in earlier:
        _refuse(file, found, said, {"content": "of data that have changed since"})
    return Job(str(encoder.run.path), said["data"], said["split"], layout, texts, said, device)


def _said(file: Path) -> dict[str, Any]:
    """Return what a shard says about itself. DataError where `embed` did not write it."""
    pa, pq = arrow()
    try:
        return dict(json.loads((pq.read_metadata(file).metadata or {})[b"counterpoint"]))
    except (KeyError, ValueError, TypeError, OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: not a shard that counterpoint embed wrote, or damaged; remove it") from error


def _refuse(file: Path, found: dict[str, Any], said: dict[str, Any], reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        if found.get(name) != said[name]:
            detail = {"key": f" ({found.get('run')})", "content": ""}.get(name, f" ({found.get(name)})")
            raise CounterpointError(
                f"{file} has embeddings {reason}{detail}; name another folder, or remove {file.parent}"
            )


def _shards(layout: Layout, rows: int) -> list[tuple[Batch, ...]]:
    """Group consecutive batches into shards of at most `rows` rows, or of one batch where that has more."""
    shards: list[list[Batch]] = []
    count = 0
    for batch in layout.batches:
        if not shards or count + len(batch.rows) > rows:
            shards.append([])
            count = 0
        shards[-1].append(batch)
        count += len(batch.rows)
    return [tuple(shard) for shard in shards]


def _write_shards(job: Job, out: Path, jobs: int | None, cluster: Cluster | None, say: Callable[[str], None]) -> None:
    """Write the shards that a folder lacks."""
    for torn in out.glob(".part-*.parquet.*"):  # of a process that was killed
        torn.unlink()
    shards = _shards(job.layout, job.said["shard_rows"])
    there = {file.name for file in shards_of(out)}
    missing = [number for number in range(len(shards)) if shard_name(number) not in there]
    if len(missing) < len(shards):
        say(f"{len(shards) - len(missing)} of {counted(len(shards), 'shard is', 'shards are')} in {out}")
    here = cluster is None and (jobs == 1 or len(missing) <= 1)
    threads = 0 if here else max(1, int(cluster.cpus)) if cluster is not None else 1
    with _bar(sum(len(batch.rows) for number in missing for batch in shards[number])) as advance:
        if here:
            _HELD["maker"][1].progress = advance

        def finish(name: str, rows: int) -> None:
            say(f"{out / name}: {counted(rows, 'row')}")
            if not here:
                advance(rows)

        tasks = (
            (shard_name(n), (job, shards[n], out / shard_name(n), {"shard": n, "shards": len(shards)}, threads))
            for n in missing
        )
        run_tasks(write_shard, tasks, finish, jobs=1 if here else jobs, cluster=cluster)


_HELD: dict[str, tuple[str, Maker]] = {}  # the maker of this process; a worker writes many shards with one


def write_shard(job: Job, batches: Sequence[Batch], path: Path, said: dict[str, Any], threads: int) -> int:
    """Write one shard, in this process. Return its number of rows.

    Args:
        job: The table.
        batches: The shard's part of it.
        path: The file.
        said: What this shard says about itself beside the table's own facts.
        threads: Number of threads; 0 leaves it as it is.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    if _HELD.get("maker", ("",))[0] != job.name:
        encoder = Encoder.load(job.run, device=job.device)
        items = Items.of(Experiment.of_run(encoder.run).source(job.data), encoder, job.split)
        _HELD["maker"] = job.name, Maker(items, encoder, job.layout, job.texts)
    return _HELD["maker"][1].write(batches, path, _metadata(job.said | said))


@contextlib.contextmanager
def _bar(rows: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of so many rows on standard error. Yield a function that advances it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("items"), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    quiet = not console.is_terminal  # rich would write an empty line
    with Progress(TextColumn("embedding"), *columns, console=console, transient=True, disable=quiet) as shown:
        bar = shown.add_task("", total=rows)
        yield lambda count: shown.advance(bar, count)
