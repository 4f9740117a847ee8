"""Make the model card of a run from its record: data with licence, figures with intervals, settings, versions, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterpoint import catalog
from counterpoint.data import SOURCES, source_name
from counterpoint.data.memory import is_memory, said
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.files import replacing
from counterpoint.use.hub import LIBRARY, Published, public

LOOKED = 200  # folders beside a run that are looked through for other seeds
USE = {
    "bags": "scores = run.learner.timeline(audio, visual)",
    "dense": "logits = run.learner.segment(pictures)  # normalised; [n, classes, height, width]",
    "restored": "large = run.learner.restore(small)  # [n, 3, height, width] in 0..1, of any size",
    **dict.fromkeys(
        ("aligned", "federations"),
        "z = run.encode(texts=['...'])  # or images=, sounds=, vectors=: whatever it was trained on",
    ),
    **dict.fromkeys(("tokens", "dialogs"), "z = run.encode(texts=['...'])"),
    "regression": "z = run.encode(images=['picture.png'])  # or vectors=: whatever it was trained on",
    "sequences": "z = run.encode(inputs={'item': ['NAME']})  # or histories or sets, see run.modalities",
    **dict.fromkeys(("views", "labelled"), "z = run.encode(images=['picture.png'])"),
}


def card(run: Run, *, library: str = LIBRARY, use: Sequence[str] = ()) -> str:
    """Return the model card of a run as Markdown.

    Args:
        run: A finished run, or one in the layout of a hub.
        library: The library that loads the files beside the card, for the card's header.
        use: Lines of Python that load them. Default: those of Counterpoint.
    """
    config = public(run.config)
    entry = catalog.get(run.slug)
    tags = [LIBRARY, run.slug, entry.task, "contrastive-learning", *(["model_hub_mixin"] if library == LIBRARY else [])]
    lines = ["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {run.slug}", ""]
    lines.append(f"{entry.title}{f' (arXiv {entry.arxiv})' if entry.arxiv else ''}, trained with Counterpoint.")
    if entry.claim:
        lines += ["", f"The paper's claim, as Counterpoint tests it: {entry.claim}"]
        if verdict := catalog.verdicts().get(run.slug):
            lines += ["", f"The verdict of Counterpoint's own record of this claim, on the claim's data: {verdict}."]
    lines += ["", "## Use", "", "```python", *(use or _own(entry.task)), "```"]
    lines += ["", "## Data", "", *_data(config)]
    lines += ["", "## Figures on the test split", "", *_figures(run)]
    lines += ["", "## Settings", "", *_settings(run)]
    if versions := {name: value for name, value in run.environment().items() if isinstance(value, str)}:
        lines += ["", "## Versions", "", ", ".join(f"{name} {value}" for name, value in versions.items()) + "."]
    return "\n".join([*lines, ""])


def write_card(run: Run, path: Path, *, library: str = LIBRARY, use: Sequence[str] = ()) -> Path:
    """Write the model card of a run to a file, and return its path. See `card`."""
    with replacing(path) as file:
        file.write(card(run, library=library, use=use).encode())
    return path


def _own(task: str) -> list[str]:
    return [
        "import counterpoint as cp",
        "",
        'run = cp.load("hf:USER/NAME")  # or the path of a folder with the run',
        USE.get(task, "learner = run.learner  # the trained nn.Module, in evaluation mode"),
    ]


def _data(config: dict[str, Any]) -> list[str]:
    spec = str(config.get("data", "unknown"))
    if is_memory(spec):
        return [f"An object in memory: {said(spec)}, seed {config.get('seed', 'unknown')}. Licence: the owner's."]
    lines = [f"`{spec}`{' (without its folder)' if ':' in spec else ''}, seed {config.get('seed', 'unknown')}."]
    if source := SOURCES.get(source_name(spec)):
        lines += ["", f"{source.gives[0].upper()}{source.gives[1:]}.", "", f"Licence: {source.licence}."]
    return lines


def _figures(run: Run) -> list[str]:
    rows, levels = run.metrics(required=False), run.chance()
    found = {k.removeprefix("test/"): v for k, v in (rows[-1] if rows else {}).items() if k.startswith("test/")}
    if not found:
        return ["None are recorded."]
    several = over_seeds(run)
    column = several.get("seeds", 0) > 1
    lines = [f"| measure | value | chance level |{' mean over seeds, 95 % interval |' if column else ''}"]
    lines.append("|---|---|---|---|" if column else "|---|---|---|")
    for name, value in found.items():
        line = f"| {name} | {value:.4f} | {f'{levels[name]:.4f}' if name in levels else ''} |"
        if column:
            mean, low, high = several["figures"].get(name, (None, None, None))
            line += "  |" if mean is None else f" {mean:.4f} ({low:.4f} to {high:.4f}) |"
        lines.append(line)
    if column:
        lines += ["", f"The interval is a t interval over {several['seeds']} runs that differ in nothing but the seed."]
    else:
        lines += ["", "One run with one seed: the figures have no interval."]
    return lines


def _settings(run: Run) -> list[str]:
    kept = run.config.get("config")
    if not isinstance(kept, dict):
        return ["None are recorded."]
    try:
        changed: Any = Experiment.of_run(run).changed
    except CounterpointError:
        changed = {}
    shown = {name: kept[name] for name in ("epochs", "batch_size", "lr") if name in kept} | changed
    lines = ["Those that differ from the paper's, with epochs, batch size and rate of learning.", ""]
    return [*lines, "| setting | value |", "|---|---|", *(f"| {k} | {_short(v)} |" for k, v in shown.items())]


def _short(value: Any) -> str:
    """Return a value of a setting for a table. Of a path, also one behind "hf:" or "run:", keep the last part.

    >>> _short("hf:/home/me/models/bert"), _short("hf:user/bert"), _short(0.1)
    ('hf:bert', 'hf:user/bert', '0.1')
    """
    head, colon, place = str(value).rpartition(":")
    return (head + colon + (Path(place).name if place.startswith(("/", "~", ".")) else place)).replace("|", "\\|")


def over_seeds(run: Run) -> dict[str, Any]:
    """Return means and 95 % intervals of a run's figures over the finished runs beside it with other seeds.

    Runs count whose folder lies beside this one, with the same system, data and settings. One run for each seed counts, at most
    200 folders are read. A run in the layout of a hub has the result in its config.json.

    Returns {"seeds": number of seeds, "figures": {name: (mean, low, high)}}, or {} for a single seed.
    """
    if isinstance(run, Published):
        return dict(run.content.get("over_seeds", {}))
    if not isinstance(run, Run):
        return {}
    from counterpoint.lab.statistics import interval

    of_seed = {run.config.get("seed"): run}
    same = ("slug", "data", "config", "parent")
    for folder in sorted(run.path.resolve().parent.iterdir())[:LOOKED]:
        if not (folder / "config.yaml").is_file():
            continue
        try:
            other = Run.open(folder)
            if other.complete and all(other.config.get(key) == run.config.get(key) for key in same):
                of_seed.setdefault(other.config.get("seed"), other)
        except CounterpointError:
            continue
    if len(of_seed) < 2:
        return {}
    last = [(other.metrics(required=False) or [{}])[-1] for other in of_seed.values()]
    names = [name for name in last[0] if name.startswith("test/") and all(name in row for row in last)]
    figures = {name.removeprefix("test/"): interval([row[name] for row in last]) for name in names}
    return {"seeds": len(of_seed), "figures": {name: list(found) for name, found in figures.items()}}
