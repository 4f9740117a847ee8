"""Define the functions of `import counterpoint as cp`. Each imports its packages when it is called."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterpoint.errors import CounterpointError
from counterpoint.words import counted

if TYPE_CHECKING:
    from counterpoint.data.memory import Own
    from counterpoint.face.finding import Hits
    from counterpoint.face.trained import Trained
    from counterpoint.search.stored import Embeddings

Say = Callable[[str], None]


def train(
    system: str,
    *,
    data: Any = None,
    seed: int = 0,
    out: Path | str = "runs",
    name: str | None = None,
    parent: Path | str | Trained | None = None,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> Trained:
    """Train a system and return the finished run.

    Args:
        system: A name of `counterpoint.systems()`, or a composition such as "moco-v2+mochi".
        data: The name of a source (see `counterpoint data`), such as "digits" or "imagefolder:photos". Or an object: a pandas
            DataFrame, a datasets.Dataset, a torch Dataset, arrays (see `counterpoint.own`). Default: the system's own source.
        seed: Seed of initialisation, order of the data and dropout.
        out: The folder in which the run directory is made.
        name: The name of the run directory. Default: the system and the time.
        parent: A finished run of the same system, to start from its weights. Default: none.
        quiet: Print nothing and show no bar.
        callbacks: Objects of `counterpoint.engine.services.Callback`. Default: none.
        settings: Settings of the system, such as temperature=0.1 or epochs=5 (`counterpoint train SYSTEM --help` lists them).
            Write a part's settings as **{"mochi.hardest": 16}. Also options of the loop: precision, device, accumulate,
            compile, ema, patience, fsdp, log, checkpoint_minutes (see `counterpoint.engine.options.Loop`).

    Returns the run (see `counterpoint.Trained`). Raises CounterpointError for unknown names, with near matches, and for data that
    do not fit the system. It then leaves nothing on disk.

    >>> import counterpoint as cp
    >>> run = cp.train("simclr", data="digits", epochs=1, precision="bf16")   # doctest: +SKIP
    """
    from counterpoint import training
    from counterpoint.data.memory import plainly
    from counterpoint.experiment import Experiment, finished, silent
    from counterpoint.face.finding import source_of
    from counterpoint.face.trained import Trained

    with plainly():
        origin = None if parent is None else finished(_path(parent), system)
        spec, own = source_of(data)
        if origin is None:
            start = Experiment.resolve(system, spec, check=False)
            config = start.config
        else:
            before = Experiment.of_run(origin)
            config, spec = before.config, spec or before.data
            start = Experiment.resolve(before.system, spec, config=config, check=False)
        loop, chosen = divided(
            system, config, settings, ("data", "seed", "out", "name", "parent", "quiet", "callbacks")
        )
        experiment = Experiment.resolve(start.system, spec, config=config, overrides=chosen)
        run = training.train(
            system,
            experiment.config,
            data=spec,
            seed=seed,
            out=Path(out),
            name=name,
            parent=None if origin is None else origin.path,
            loop=loop,
            say=silent if quiet else print,
            callbacks=callbacks,
            **({"bar": False} if quiet else {}),
        )
    return Trained(run, own)


def divided(system: str, config: Any, given: Mapping[str, Any], also: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Divide keyword arguments into options of the loop and settings of a system.

    Args:
        system: The name of the system, for messages.
        config: Its settings.
        given: Keyword arguments. A mapping holds the settings of a part.
        also: Further names that the caller accepts, for near matches.

    Returns the Loop and the settings. Raises CounterpointError for a name that is neither, with near matches.
    """
    from counterpoint.engine.options import Loop
    from counterpoint.systems.settings import flat

    of_loop = {f.name for f in fields(Loop)}
    parts = set(getattr(config, "parts", {}))
    known = set(flat(config))
    loop = {name: value for name, value in given.items() if name in of_loop}
    chosen = {name: value for name, value in given.items() if name not in of_loop}
    for name in chosen:
        if name in known or name.partition(".")[0] in parts:  # a setting of a part is checked with the part
            continue
        ends = [full for full in known if full.rpartition(".")[2] == name]
        near = ends or difflib.get_close_matches(name, [*known, *of_loop, *also], n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(known))}"
        if ends:
            hint += f' Write it as **{{"{ends[0]}": ...}}'
        raise CounterpointError(f"{system} has no setting {name}; {hint}")
    if "precision" in loop:
        loop["precision"] = str(loop["precision"])
    if isinstance(loop.get("log"), str):
        loop["log"] = (loop["log"],)
    return Loop(**loop), chosen


def resume(
    run: Path | str,
    *,
    data: Any = None,
    device: str = "auto",
    checkpoint_minutes: float = 10.0,
    quiet: bool = False,
) -> Trained:
    """Continue an interrupted run. Its final metrics are those of an uninterrupted run.

    Args:
        run: The run directory.
        data: The object that the run was trained on, for a run on an object in memory. Default: the data that the run names.
        device: Device to train on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        checkpoint_minutes: Minutes between checkpoints within an epoch, >= 0.
        quiet: Print nothing and show no bar.

    Returns the finished run. Raises RunError for a run that is complete, DataError for an object with other contents.
    """
    from counterpoint import training
    from counterpoint.data.memory import plainly
    from counterpoint.engine.options import Loop
    from counterpoint.engine.run import Run
    from counterpoint.experiment import silent
    from counterpoint.face.finding import held_again
    from counterpoint.face.trained import Trained

    with plainly():
        own = held_again(Run.open(run), data)
        loop = Loop(device=device, checkpoint_minutes=checkpoint_minutes)
        say = silent if quiet else print
        return Trained(training.resume(run, loop=loop, say=say, **({"bar": False} if quiet else {})), own)


def load(source: Path | str | Trained, *, data: Any = None, revision: str | None = None) -> Trained:
    """Load a finished run.

    Args:
        source: A run directory, "runs/x". A model of the hub, "hf:user/name". Or a folder that `save_pretrained` wrote.
        data: The object that the run was trained on, to read it again, for a run on an object in memory. Default: none.
        revision: Branch, tag or commit of a model of the hub. Default: the latest.

    Returns the run (see `counterpoint.Trained`). Raises RunError for a folder that is no finished run, and when the hub cannot be
    reached.

    >>> import counterpoint as cp
    >>> cp.load("runs/first").encode(images=["a.png"]).shape   # doctest: +SKIP
    (1, 512)
    """
    from counterpoint.data.memory import plainly
    from counterpoint.experiment import finished
    from counterpoint.face.finding import held_again
    from counterpoint.face.trained import Trained
    from counterpoint.use import hub

    if isinstance(source, Trained):
        return source
    with plainly():
        if str(source).startswith("hf:"):
            folder = hub.found(str(source).removeprefix("hf:"), revision=revision)
            found = Trained(hub.Published.open(folder) if hub.is_published(folder) else finished(folder))
        elif hub.is_published(Path(source)):
            found = Trained(hub.Published.open(source))
        else:
            found = Trained(finished(source))
        if data is not None:
            found.own = held_again(found.run, data)
    return found


def own(data: Any, **options: Any) -> Own:
    """Take an object as data, with options. Without options, give the object itself as `data=`.

    Args:
        data: One of these. pandas and datasets are imported only where the object comes from them.
                - a pandas DataFrame, with columns as `manifest:` takes them: a path, bytes or an image for an image, a string for a
                  text, a list of numbers for a vector, and label, split, id
                - a datasets.Dataset or DatasetDict; Image, Audio and ClassLabel are recognised by their types
                - a torch Dataset with a length, whose items are an image, (image, label), or a dictionary of named values.
                  Leave out random transforms and Normalize: the system makes its own views
                - an array of images, uint8 [N, H, W, 3] or [N, H, W], or a tuple (images, labels)
                - a dictionary of arrays or lists, one for each modality: {"image": [N, H, W, 3], "text": N strings,
                  "vector": [N, dim], "audio": [N, samples], "label": [N], "split": N names}
                - a list of images, as paths or Pillow images, or of records, a dictionary for each row
                - for systems of the task bags: {"visual": N arrays [T, dim], "audio": N arrays [T, dim], "label": [N]}
                - a dictionary by split: {"train": ..., "test": ...}, each one of the above except bags
        options: size (pixels), rate (samples a second), seconds (of sounds), columns ("photo:image,title:text", or a dictionary),
            groups (a column, or one value for each row: rows of a group stay in one split), test, valid (a fraction, or the name
            of a split), max_bad.

    The same rows always get the same splits. Rows that share an image, a text, a sound, a vector or a group are never separated.
    Returns an object for `data=`. Raises DataError for an object of another kind.

    >>> import counterpoint as cp, numpy as np
    >>> pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    >>> cp.own((pictures, [0, 1] * 20), size=32)
    <own data: arrays of 40 rows (digest 7f9ab34e1bdc2274)>
    """
    from counterpoint.data.memory import Own, plainly

    with plainly():
        return Own.of(data, **options)


@dataclass(frozen=True)
class Comparison:
    """The result of `counterpoint.compare`. `record` holds all of it, as in the record on disk."""

    record: dict[str, Any]
    page: Path
    """The HTML page."""

    @property
    def metric(self) -> str:
        """Return the name of the metric."""
        return str(self.record["metric"])

    @property
    def means(self) -> dict[str, float]:
        """Return the mean of the metric over the seeds, by system."""
        return {
            slug: sum(run[self.metric] for run in runs.values()) / len(runs)
            for slug, runs in self.record["results"].items()
        }

    def __repr__(self) -> str:
        pairs = {pair["arm"]: pair for pair in self.record["comparisons"]}
        lines = [f"{self.metric} on {self.record['data']}, {counted(len(self.record['seeds']), 'seed')}"]
        for slug, mean in self.means.items():
            line = f"  {slug:20} {mean:.4f}"
            if pair := pairs.get(slug):
                interval = "" if pair["low"] is None else f" ({pair['low']:+.4f} .. {pair['high']:+.4f})"
                line += f"  {pair['mean']:+.4f}{interval}  {pair['verdict']}"
            lines.append(line)
        return "\n".join([*lines, f"page: {self.page}"])


def compare(
    *systems: str,
    data: Any,
    seeds: int = 3,
    metric: str | None = None,
    leave_one_domain_out: bool = False,
    jobs: int = 2,
    out: Path | str = "results/compare",
    **settings: Any,
) -> Comparison:
    """Train several systems on the same seeds, and compare each with the first.

    Args:
        systems: At least two names.
        data: The name of a source, or an object (see `counterpoint.own`). With an object all runs are made in this process.
        seeds: Number of seeds, from 0 on, at least 1.
        metric: The metric to compare. Default: the task's headline metric, on the test split after the last epoch.
        leave_one_domain_out: Leave each domain of the data out in turn, measure on it, and average over the domains.
        jobs: Number of parallel runs, one thread each; at least 1.
        out: The folder of the record and the page.
        settings: Settings for all systems, such as epochs=5.

    Returns means, paired differences with their 95 % intervals, and a page. Finished runs are kept, so that an interrupted
    comparison continues. Raises CounterpointError for systems that cannot be compared.

    >>> import counterpoint as cp
    >>> cp.compare("simclr", "dcl", data="digits", epochs=2, seeds=5)   # doctest: +SKIP
    """
    import torch

    from counterpoint.data.memory import plainly
    from counterpoint.face.finding import source_of
    from counterpoint.lab import compare as room
    from counterpoint.report.claim import write_comparison_report

    names = [name for given in systems for name in ([given] if isinstance(given, str) else given)]
    threads = torch.get_num_threads()
    try:
        with plainly():
            spec, held = source_of(data)
            # Another process would not have the object.
            record = room.compare(
                names,
                str(spec),
                seeds=seeds,
                jobs=jobs if held is None else 1,
                out=Path(out),
                metric=metric,
                overrides=dict(settings),
                leave_one_domain_out=leave_one_domain_out,
            )
    finally:
        torch.set_num_threads(threads)  # a run sets it to one
    return Comparison(record, write_comparison_report(record, Path(out) / f"{record['name']}.html"))


def embed(
    run: Path | str | Trained,
    out: Path | str,
    *,
    data: Any = None,
    split: str = "all",
    device: str = "cpu",
    quiet: bool = True,
) -> Embeddings:
    """Write the embeddings of a whole set in every modality to a Parquet file, or to a folder of shards.

    Args:
        run: A finished run, or its path.
        out: The file to write, .parquet, or a folder, which gets shards.
        data: A source of the same modalities: a name or an object. Default: the data that the run was trained on.
        split: One of all, train, valid, test, unpaired, items.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        quiet: Leave out the notes on the data.

    Returns the embeddings: `.vectors` by modality, [n, dim], and `.label`, `.split`, `.source` of each item.
    """
    from counterpoint.face import finding

    return finding.embed(load(run).run, out, data=data, split=split, device=device, quiet=quiet)


def search(
    run: Path | str | Trained,
    query: Any,
    embeddings: Path | str,
    *,
    k: int = 10,
    modality: str | None = None,
    html: Path | str | None = None,
) -> Hits:
    """Return the k items most similar to a query.

    Args:
        run: The run that made the embeddings, or its path.
        query: Words, or the path of an image, a sound or a vector (.npy). The queries of a list are combined, as the system
            combines modalities. "MODALITY=QUERY" names the modality, for a run with several modalities of one kind. For a run
            of sequences: names of items.
        embeddings: The file or folder that `embed` wrote.
        k: Number of items, at least 1.
        modality: The modality to search in. Default: the first modality that no query has.
        html: A page to write, with thumbnails and players. Default: none.

    Returns hits, each with rank, similarity, label, texts and source.

    Raises CounterpointError where the run has no modality for a query, DataError for a file that cannot be read.
    """
    from counterpoint.face import finding

    return finding.search(load(run).run, query, embeddings, k=k, modality=modality, html=html)


def _path(run: Path | str | Trained) -> Path | str:
    return run if isinstance(run, (str, Path)) else run.path
