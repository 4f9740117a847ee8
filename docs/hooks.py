"""Make pages when the site is built, so that none is outdated.

They are the program's help, the catalogue, the recorded claims, and the documents of the repository's root.
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib
import inspect
import io
import itertools
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]

from docstrings import lists  # noqa: E402
from notebook_pages import pages as notebook_pages  # noqa: E402
from records import performance, with_verdicts  # noqa: E402

from counterpoint import catalog  # noqa: E402
from counterpoint.commands import COMMANDS, main  # noqa: E402
from counterpoint.data import SOURCES  # noqa: E402
from counterpoint.lab.loss_checks.report import markdown as losses_table  # noqa: E402
from counterpoint.report.claim import by_unit, label, rule_said  # noqa: E402
from counterpoint.report.figures import effects  # noqa: E402
from counterpoint.systems.settings import flat  # noqa: E402

WIDTH = 88  # of what the program prints, in characters
# Documents of the root and the pages they become.
DOCUMENTS = {
    "RESULTS.md": "results.md",
    "SYSTEMS.md": "systems-table.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
ROOMS = {
    "face": "What `import counterpoint` offers",
    "training": "Training, evaluating and resuming by name",
    "experiment": "System, settings and data, resolved once",
    "use": "A trained run: detect, predict, ask, generate, export, share on a hub",
    "search": "Embeddings of a set, and search in them",
    "lab": "Claims, comparisons and sweeps",
    "losses": "Every loss as a module",
    "functional": "Every function in one namespace",
    "systems": "What a system's file declares",
    "tasks": "Task contracts",
    "engine": "Fit, resume, runs on disk",
    "data": "Data sources and their contracts",
    "encoders": "Networks: frozen backbones, encoders of each modality, language models, generators",
    "views": "Changed copies of a modality",
    "core": "Shared mathematics",
    "report": "Pages of runs, claims and detections",
    "catalog": "The catalogue of systems",
    "errors": "Errors that a user can correct",
}


def built() -> list[catalog.Entry]:
    return [entry for entry in catalog.entries().values() if entry.state == "done"]


def rooms() -> dict[str, str]:
    return {room: said for room, said in ROOMS.items() if list((ROOT / "src" / "counterpoint").glob(f"{room}*"))}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of the systems and of the rooms to the navigation."""
    more = {
        "systems/index.md": [f"systems/{entry.slug}.md" for entry in built()],
        "api/index.md": [f"api/{room}.md" for room in rooms()],
    }

    def grow(items: list[Any]) -> None:
        for item in items:
            for value in item.values() if isinstance(item, dict) else ():
                if isinstance(value, list):
                    grow(value)
        for index, pages in more.items():
            if index in items:
                items.extend(pages)

    grow(config.nav or [])
    config.watch = [*config.watch, *(str(ROOT / name) for name in ("src", "results", *DOCUMENTS))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "cli.md": command_line(),
        "performance.md": performance(),
        "systems/index.md": systems_index(),
        "api/index.md": api_index(),
    }
    pages |= {f"systems/{entry.slug}.md": system_page(entry) for entry in built()}
    pages |= {f"api/{room}.md": api_page(room) for room in rooms()}
    pages |= {page: document(name) for name, page in DOCUMENTS.items()}
    for uri, content in (pages | notebook_pages()).items():
        files.append(File.generated(config, uri, content=content))
    for drawing in ("results/bench/contrast.svg", "results/claims/claims.svg"):  # RESULTS.md shows them
        files.append(File.generated(config, drawing, abs_src_path=str(ROOT / drawing)))
    for entry in built():
        record = ROOT / "results" / "claims" / f"{entry.slug}.html"
        if record.is_file():
            uri = f"systems/{entry.slug}-claim.html"
            files.append(File.generated(config, uri, abs_src_path=str(record)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = with_verdicts(markdown.replace("<!-- checked losses -->", checked_losses()))
    return markdown.replace("<!-- sources -->", sources())


def checked_losses() -> str:
    """Return the table of the losses that benchmarks/check_losses.py has checked."""
    record = json.loads((ROOT / "results" / "check-loss.json").read_text(encoding="utf-8"))
    return losses_table(record["losses"])


def sources() -> str:
    """Return the table of data sources, as `counterpoint data` lists them."""
    rows = ["| source | task | gives | extra |", "|---|---|---|---|"]
    for source in SOURCES.values():
        name = f"{source.name}:{source.argument}" if source.argument else source.name
        rows.append(f"| `{name}` | {source.task} | {cell(source.gives)} | {source.needs and f'`{source.needs}`'} |")
    return "\n".join(rows)


# --- documents of the root --------------------------------------------------------------------------------------------


def document(name: str) -> str:
    """Return a document of the repository's root. Its links lead to the site's pages; others become plain text."""
    text = (ROOT / name).read_text(encoding="utf-8")
    pages = {"README.md": "index.md", **DOCUMENTS}

    def link(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        if path in pages:
            return f"[{label}]({pages[path]}{'#' + anchor if anchor else ''})"
        if path.startswith("docs/"):
            return f"[{label}]({target.removeprefix('docs/')})"
        return match[0] if "://" in target or not path else label

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)


# --- the command line -------------------------------------------------------------------------------------------------


def printed(*words: str) -> str:
    """Return the output of `counterpoint WORDS --help`, in the width of a page."""
    before = dict(os.environ)
    os.environ.update(COLUMNS=str(WIDTH), NO_COLOR="1", TERM="dumb")
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    if "usage:" not in out.getvalue():
        raise PluginError(f"counterpoint {' '.join(words)} --help prints no help")
    return "\n".join(wrapped(line.rstrip()) for line in out.getvalue().strip().splitlines())


def wrapped(line: str) -> str:
    """Wrap a long line. The program wraps its tables, but leaves its sentences to the terminal."""
    return line if len(line) <= WIDTH else "\n".join(textwrap.wrap(line, WIDTH, break_on_hyphens=False))


def command_line() -> str:
    parts = [
        "# Command line",
        "What the program itself prints, taken when this page was built. `counterpoint --version` prints the version; "
        "`--debug` after any command adds the traceback to an error. Exit codes: 0, 2 for an error you can mend, 130 when "
        "interrupted.",
        block(printed()),
    ]
    for name in COMMANDS:
        parts += [f"## {name}", block(printed(name))]
        if name == "train":
            for entry in built():
                parts += [
                    f"### train {entry.slug}",
                    "With the settings of the system.",
                    block(printed(name, entry.slug)),
                ]
    return "\n\n".join(parts)


def block(text: str) -> str:
    return f"```text\n{text}\n```"


# --- the systems ------------------------------------------------------------------------------------------------------


def systems_index() -> str:
    rows = ["| system | paper | area | task | state |", "|---|---|---|---|---|"]
    for entry in catalog.entries().values():
        name = f"[{entry.slug}]({entry.slug}.md)" if entry.state == "done" else f"`{entry.slug}`"
        state = f"**{entry.state}**" if entry.state == "done" else entry.state
        rows.append(f"| {name} | {cell(paper(entry))} | {entry.area} | {entry.task} | {state} |")
    count = len(catalog.entries())
    return "\n\n".join(
        [
            "---\nhide: [toc]\n---",
            "# Systems",
            f"{len(built())} of {count} built: 63 papers and the classic baselines they are measured against. "
            "`counterpoint systems` lists the same.",
            "\n".join(rows),
        ]
    )


def paper(entry: catalog.Entry) -> str:
    return f"{entry.title} ({entry.arxiv})" if entry.arxiv else entry.title


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def system_page(entry: catalog.Entry) -> str:
    system = catalog.load_system(entry.slug)
    module = importlib.import_module(entry.module.partition(":")[0])
    said = inspect.getdoc(module) or ""
    title, _, rest = said.partition("\n")
    # Of an addition what it brings is shown: its own settings, and its part or the learner it puts around the base's.
    config: Any = module.SYSTEM.config if entry.addition else system.config
    learner: Any = (module.SYSTEM.part or module.SYSTEM.around) if entry.addition else system.learner
    parts = [
        f"# {entry.slug}",
        f"**{paper(entry)}**",
        f"Area {entry.area}, task {entry.task}, module `{module.__name__}`.",
        f"**{title}**",
        lists(rest.strip()),
        "## Use",
        "```console\n"
        f"$ counterpoint train {entry.slug}\n$ counterpoint train {entry.slug} --help\n$ counterpoint verify {entry.slug}\n"
        "```",
        "## Claim",
        claim(entry),
        "## Settings",
        settings(system),
        "## Functions",
        f'`counterpoint.functional.of("{entry.slug}")` has all of these, and so has `counterpoint.functional`, but for names that '
        "another system gives to another function.",
        # What stands in a room of its own has its anchor there; here it is only shown.
        *(directive(p.replace(":", "."), shared=not p.startswith(module.__name__)) for p in entry.functions),
        "## Configuration and learner",
        directive(f"{config.__module__}.{config.__qualname__}", members=False),
        # A learner of the task itself stands in the reference; twice it would be two targets of one link.
        directive(f"{learner.__module__}.{learner.__qualname__}")
        if ".systems." in learner.__module__
        else f"Its learner is [{learner.__qualname__}][{learner.__module__}.{learner.__qualname__}].",
    ]
    return "\n\n".join(parts)


def directive(name: str, *, shared: bool = False, members: bool = True) -> str:
    options = [f"members: {'null' if members else 'false'}"]
    options += ["heading_level: 3", "show_root_full_path: false", f"skip_local_inventory: {str(shared).lower()}"]
    return f"::: {name}\n    options:\n" + "\n".join(f"      {option}" for option in options)


def settings(system: Any) -> str:
    """Return the table of the Config's fields, with their defaults and the values of each recipe."""
    plain = system.config()
    said = field_docs(type(plain))
    for slug, part in getattr(plain, "parts", {}).items():
        said |= {f"{slug}.{name}": text for name, text in field_docs(type(part)).items()}
    recipes = system.recipes
    head = ["setting", "paper", *(f"`{name}`" for name in recipes), "what it is"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, default in flat(plain).items():
        values = [str(recipe[name]) if name in recipe else "" for recipe in recipes.values()]
        rows.append(f"| `{name}` | {default} | {' | '.join([*values, cell(said.get(name, ''))])} |")
    return "\n\n".join(
        [
            "Defaults are the paper's. Where a data source is far from the paper's scale, the recipe under its name replaces "
            "some; on the command line each is an option (`--batch-size`).",
            "\n".join(rows),
        ]
    )


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstrings under the fields of a dataclass and of its bases, by field."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def claim(entry: catalog.Entry) -> str:
    file = ROOT / "results" / "claims" / f"{entry.slug}.json"
    if not file.is_file():
        return f"{entry.claim}\n\nNot verified yet: `counterpoint verify {entry.slug}`."
    record = json.loads(file.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"> {record['claim']}",
        f"Verdict: **{record['verdict']}** ({record['kind']}), on {len(record['seeds'])} seeds.",
    ]
    parts += outcome(record)
    for name, variant in record.get("variants", {}).items():
        parts += [f"### Variant: {name}", variant["claim"], *outcome(variant)]
    page = file.with_suffix(".html")
    if page.is_file():
        parts.append(f'<a href="{entry.slug}-claim.html">Every seed and the whole setting</a>, on a page of its own.')
    parts.append(f"Recorded with {versions}, on {record['machine']['cores']} cores.")
    return "\n\n".join(parts)


def outcome(record: dict[str, Any]) -> list[str]:
    """Return the section of a claim or a variant: conjuncts, drawings by unit, means, setting, deficiencies."""
    heads = ("part", "comparison", "measure", "test", "mean gain", "interval", "detectable", "verdict")
    rows = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in (*record["conjuncts"], *record["reported"]):
        shown = ["none", "none", "none"]
        if row.get("mean") is not None:
            interval = "none" if row["low"] is None else f"{row['low']:+.4f} .. {row['high']:+.4f}"
            shown = [
                f"{row['mean']:+.4f}",
                interval,
                "none" if row["detectable"] is None else f"{row['detectable']:.4f}",
            ]
        cells = [label(row), f"`{row['metric']}`", rule_said(row), *shown, row.get("verdict", "reported")]
        rows.append(f"| {row['says']} | {' | '.join(str(text).replace(' ', '&nbsp;') for text in cells)} |")
    drawn = [
        f'<figure class="effects">{effects([{**row, "label": label(row)} for row in found], metric=unit)}</figure>'
        for unit, found in by_unit(record["conjuncts"]).items()
    ]
    metrics = list(dict.fromkeys(row["metric"] for row in record["conjuncts"]))
    means = [f"| arm | {' | '.join(f'`{name}`' for name in metrics)} |", f"|{'---|' * (len(metrics) + 1)}"]
    for arm, seeds in record["results"].items():
        found = [[run[name] for run in seeds.values() if run.get(name) is not None] for name in metrics]
        means.append(f"| {arm} | {' | '.join(f'{sum(v) / len(v):.4f}' if v else 'none' for v in found)} |")
    setting = ", ".join(f"{name} {value}" for name, value in record["setting"].items())
    missing = [f"- {html.escape(said)}" for said in record.get("missing", ())]
    return [
        f"Data `{record['data']}`. Intervals are paired t intervals at the levels of Holm's procedure.",
        "\n".join(rows),
        *drawn,
        "Means over the seeds:",
        "\n".join(means),
        f"Setting, where it is not the paper's: {setting}.",
        "\n".join(f"- {html.escape(note)}" for note in record["notes"]),
        *(["What this record lacks to be sound:", "\n".join(missing)] if missing else []),
    ]


# --- the API ----------------------------------------------------------------------------------------------------------


def api_index() -> str:
    rows = [f"- [`counterpoint.{room}`]({room}.md): {said}" for room, said in rooms().items()]
    return "\n\n".join(["# Python", "The modules of the package, from the top down.", "\n".join(rows)])


def api_page(room: str) -> str:
    if room == "functional":
        return functional_page()
    folder = ROOT / "src" / "counterpoint" / room
    names = [f"counterpoint.{room}"]
    if folder.is_dir():
        # Systems have pages of their own; what they declare is in base.py.
        found = (
            ["base"] if room == "systems" else sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
        )
        whole = bool((folder / "__init__.py").read_text(encoding="utf-8").strip()) and room != "systems"
        names = [*(names if whole else []), *(f"counterpoint.{room}.{name}" for name in found)]
    return "\n\n".join([f"# counterpoint.{room}", f"{ROOMS[room]}.", *(f"::: {name}" for name in names)])


def functional_page() -> str:
    rows = ["| function | stands in | of |", "|---|---|---|"]
    for entry in built():
        for place in entry.functions:
            module, _, name = place.partition(":")
            # Files in a folder of a room have no page of their own.
            paged = module.startswith("counterpoint.systems.") or module.count(".") < 3
            shown = f"[`{name}`][{module}.{name}]" if paged else f"`{name}`"
            rows.append(f"| {shown} | `{module}` | [{entry.slug}](../systems/{entry.slug}.md) |")
    text = inspect.getdoc(importlib.import_module("counterpoint.functional")) or ""
    told = [f"```pycon\n{part}\n```" if part.startswith(">>>") else part for part in text.split("\n\n")]
    return "\n\n".join(["# counterpoint.functional", *told, "\n".join(rows)])
