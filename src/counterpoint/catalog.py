"""Read catalog.toml: every system's paper, area, task, state, module and functions.

The command line's list, `counterpoint.functional`, the table of SYSTEMS.md and the docs are made from it. This module imports no
torch.

    python -m counterpoint.catalog SYSTEMS.md [--check]    rewrites (or checks) the table between the two markers
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterpoint.errors import CounterpointError, unknown

if TYPE_CHECKING:
    from counterpoint.systems.base import System

BEGIN, END = "<!-- systems:begin -->", "<!-- systems:end -->"
STATES = ("done", "built", "planned")


@dataclass(frozen=True)
class Entry:
    """A row of the catalogue: one system."""

    slug: str
    title: str
    area: str
    task: str
    state: (
        str  # of STATES. "done"; "built": it trains, but its claim is not verified or its speed not measured; "planned"
    )
    arxiv: str = ""
    module: str = ""
    functions: tuple[str, ...] = ()  # "module:name", each offered as counterpoint.functional.<name>
    claim: str = ""  # the central claim at laptop scale, in a sentence
    addition: bool = False  # whether other systems can be trained with it: BASE+SLUG

    @property
    def built(self) -> bool:
        """Whether the system can be trained: its state is "built" or "done"."""
        return self.state in ("built", "done")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, fit for JSON."""
        return {**asdict(self), "functions": list(self.functions)}


@cache
def entries() -> dict[str, Entry]:
    """Return all systems by slug, in catalogue order: the papers by area, the classic baselines last."""
    text = resources.files("counterpoint").joinpath("catalog.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["system"]
    return {row["slug"]: Entry(**{**row, "functions": tuple(row.get("functions", ()))}) for row in rows}


def get(slug: str) -> Entry:
    """Return the entry of a system, or one made for a composition BASE+ADDITION. CounterpointError for an unknown name."""
    if slug in entries():
        return entries()[slug]
    base, *additions = slug.split("+")
    parts = [base, *additions]
    for part in parts:
        if part not in entries():
            raise unknown("system", part, entries())
    first = entries()[base]
    return replace(
        first,
        slug=slug,
        title=" + ".join(entries()[part].title for part in parts),
        state="built" if all(entries()[part].built for part in parts) else "planned",
        functions=tuple(dict.fromkeys(f for part in parts for f in entries()[part].functions)),
        claim="",
    )


_REGISTERED: dict[str, System] = {}  # systems of the user's own, by slug


def register(system: System, *, title: str = "") -> None:
    """Add a system of your own to the catalogue, for this process: `train`, `compare`, `load` and `systems` know its name.

    Args:
        system: the declaration (`counterpoint.systems.base.System`). A system with the same name that was registered before is
            replaced.
        title: its title in lists. Default: its name.

    Raises CounterpointError for a name of the catalogue, and for one that is not lower-case words joined by hyphens.
    """
    slug = system.slug
    if slug in entries() and slug not in _REGISTERED:
        raise CounterpointError(f"'{slug}' is a system of the catalogue; choose another name")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise CounterpointError(
            f"'{slug}' is no name of a system: use lower-case words joined by hyphens, such as my-method"
        )
    module = str(getattr(system.learner, "__module__", ""))
    entries()[slug] = Entry(slug, title or slug, "own", system.task, "built", module=module)
    _REGISTERED[slug] = system


def verdicts() -> dict[str, str]:
    """Return the verdict of each recorded claim, by system. `counterpoint claims` writes the file from the records."""
    file = resources.files("counterpoint").joinpath("claims/verdicts.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {slug: str(verdict) for slug, verdict in found.items()}


def modules(slug: str) -> list[str]:
    """Return the names of the modules that a system or a composition consists of.

    An addition without a base stands over a default system (`over` in its record); that system's modules come first.
    """
    base, *additions = slug.split("+")
    below = modules(_record(base).over) if get(base).addition else []
    return [*below, *(get(part).module.partition(":")[0] for part in (base, *additions))]


def load_system(slug: str) -> System:
    """Import a system and return its SYSTEM record; CounterpointError when it is planned but not built.

    `BASE+ADDITION[+ADDITION]` composes: "moco-v2+mochi" is MoCo v2 with MoCHi's synthetic negatives.
    """
    base, *additions = slug.split("+")
    found = _record(base)
    system: System = found.onto(load_system(found.over), alone=True) if get(base).addition else found
    for name in additions:
        if not get(name).addition:
            raise CounterpointError(
                f"'{name}' cannot be added to another system: it is no addition; {additions_said()}"
            )
        system = _record(name).onto(system)
    return system


def _record(slug: str) -> Any:
    """Return the record that a system's file declares as SYSTEM."""
    entry = get(slug)
    if not entry.built:
        built = [row.slug for row in entries().values() if row.built]
        raise CounterpointError(
            f"'{slug}' is in the catalogue but not built yet; choose one that is built: {', '.join(built)}"
        )
    if slug in _REGISTERED:
        return _REGISTERED[slug]
    module, _, name = entry.module.partition(":")  # the row of a file with two systems has the record's name
    return getattr(importlib.import_module(module), name or "SYSTEM")


def additions_said() -> str:
    """Return the list of additions as text, for a message."""
    return "additions: " + ", ".join(row.slug for row in entries().values() if row.addition)


def markdown_table() -> str:
    """Return the table of systems, one row each, as Markdown."""
    lines = ["| system | paper | area | task | state |", "|---|---|---|---|---|"]
    for row in entries().values():
        paper = f"{row.title} ({row.arxiv})" if row.arxiv else row.title
        state = "**done**" if row.state == "done" else row.state
        lines.append(f"| `{row.slug}` | {paper.replace('|', '/')} | {row.area} | {row.task} | {state} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """Replace the part of `text` between the two markers by the table. ValueError when a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text has no block {BEGIN} ... {END}; add both markers where the table belongs")
    return f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}"


def _main(argv: list[str]) -> int:
    check, names = "--check" in argv, [a for a in argv if a != "--check"]
    stale = []
    for name in names:
        path = Path(name)
        old = path.read_text(encoding="utf-8")
        new = with_table(old)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(("stale: " if check else "rewritten: ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
