"""List the systems of the catalogue by pattern, each with its settings and the verdict on its claim."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from counterpoint import catalog
from counterpoint.errors import unknown


@dataclass(frozen=True)
class Listed:
    """One system of the catalogue."""

    slug: str
    title: str
    """The paper's title."""
    verdict: str
    """Verdict of the recorded claim: holds, partly, no difference, reversed; empty where no claim is recorded."""
    state: str
    """State: "done"; "built" (it trains, but its claim or its speed is not measured yet); "planned"."""
    area: str
    task: str
    """The form of data that it learns from, such as views, labelled, aligned or bags."""
    arxiv: str
    claim: str
    """The paper's claim, in a sentence."""

    def __repr__(self) -> str:
        return f"{self.slug}: {self.title}{f' [claim: {self.verdict}]' if self.verdict else ''}"


class Listing(list[Listed]):
    """A list of systems. The repr is a table."""

    def __repr__(self) -> str:
        if not self:
            return "no systems"
        wide = max(len(row.slug) for row in self)
        lines = [f"{row.slug:{wide}}  {row.task:8}  {_claim(row):13}  {_cut(row.title)}" for row in self]
        return "\n".join([f"{'system':{wide}}  {'task':8}  {'claim':13}  title", *lines])

    @property
    def slugs(self) -> list[str]:
        """Return only the names."""
        return [row.slug for row in self]


def _claim(row: Listed) -> str:
    return row.verdict or ("planned" if row.state == "planned" else "-")


def _cut(text: str, width: int = 72) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def systems(pattern: str = "*", *, task: str = "", area: str = "", state: str = "", planned: bool = False) -> Listing:
    """List the systems whose name or title fits a pattern.

    Args:
        pattern: A name or a title with wildcards, such as "*clip*". Case is ignored. Default: all.
        task: Only systems of this form of data, such as views, labelled, aligned or bags. Default: all.
        area: Only systems of this area, such as "classics". Default: all.
        state: Only systems of this state: done, built, planned. Default: those that train, done and built.
        planned: Also list systems that are only planned.

    Returns the systems in the order of the catalogue, or an empty list where none fits. Raises CounterpointError for an unknown
    task, area or state.

    >>> import counterpoint as cp
    >>> cp.systems("*sim*lr").slugs
    ['simclr']
    """
    rows = list(catalog.entries().values())
    for name, wanted in (("task", task), ("area", area), ("state", state)):
        known = catalog.STATES if name == "state" else sorted({getattr(row, name) for row in rows})
        if wanted and wanted not in known:
            raise unknown(name, wanted, known)
    told = catalog.verdicts()
    found = Listing()
    for row in rows:
        if not any(fnmatchcase(text.lower(), pattern.lower()) for text in (row.slug, row.title)):
            continue
        if (task and row.task != task) or (area and row.area != area) or (state and row.state != state):
            continue
        if row.state == "planned" and not planned and state != "planned":
            continue
        verdict = told.get(row.slug, "")
        found.append(Listed(row.slug, row.title, verdict, row.state, row.area, row.task, row.arxiv, row.claim))
    return found


class Settings(dict[str, Any]):
    """Settings by name. The repr includes their meaning."""

    said: dict[str, str]

    def __repr__(self) -> str:
        wide = max((len(name) for name in self), default=0)
        lines = []
        for name, value in self.items():
            words = textwrap.fill(self.said.get(name, ""), 116, initial_indent="    ", subsequent_indent="    ")
            lines.append(f"{name:{wide}}  {value!r}\n{words}")
        return "\n".join(lines)


def settings(system: str, data: str | None = None) -> Settings:
    """Return the default settings of `train`: the paper's, changed by the system's recipe for the data.

    Args:
        system: A name of `counterpoint.systems()`, or a composition such as "moco-v2+mochi".
        data: The name of a source; "own" for objects and files of your own. Default: the system's own source.

    Returns a dictionary by name, printed with each setting's meaning. A part's setting begins with the part: "mochi.hardest".
    Raises CounterpointError for an unknown system and an unknown source.

    >>> import counterpoint as cp
    >>> cp.settings("simclr")["temperature"]
    0.5
    """
    from counterpoint.data import SOURCES, source_name
    from counterpoint.experiment import Experiment
    from counterpoint.systems.settings import flat

    if data is not None and data != "own" and source_name(data) not in SOURCES:
        raise unknown("data source", source_name(data), (*SOURCES, "own"))
    config = Experiment.resolve(system, data, check=False).config
    found = Settings(flat(config))
    found.said = _meanings(type(config))
    for slug, part in getattr(config, "parts", {}).items():
        found.said |= {f"{slug}.{name}": text for name, text in _meanings(type(part)).items()}
    return found


def _meanings(kind: type) -> dict[str, str]:
    """Return the docstrings under the fields of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for field, text in itertools.pairwise(getattr(tree, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found
