"""Imports inside the package: downward only, without a cycle, those for types and those in functions included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "counterpoint"
# The rooms from the roof to the ground, as ARCHITECTURE.md draws them in its first block of text.
DRAWN = re.search(
    r"^```text\n(.*?)^```$", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
ROOMS = re.findall(r"^  (\w+)(?:\.py|/) ", DRAWN[1] if DRAWN else "", re.MULTILINE)
KINDS = ("module", "types", "function")


class Import(NamedTuple):
    """One module of the package that another one imports; where: at its top, for type checkers alone, or in a function."""

    importer: str
    imported: str
    kind: str


def modules(source: Path) -> dict[str, Path]:
    """List every module below a folder by its dotted name inside the package; the package itself is ""."""
    return {
        ".".join(part for part in file.relative_to(source).with_suffix("").parts if part != "__init__"): file
        for file in sorted(source.rglob("*.py"))
    }


@cache
def imports(source: Path = SOURCE) -> list[Import]:
    """List every import of a module of the package by another one."""
    known = modules(source)
    found = []
    for name, file in known.items():
        for target, kind in _imports(ast.parse(file.read_text(encoding="utf-8")), known, "module"):
            if target not in ("", name):
                found.append(Import(name, target, kind))
    return found


def _imports(node: ast.AST, known: dict[str, Path], kind: str) -> Iterator[tuple[str, str]]:
    """List the package's modules that are imported below a node of the syntax tree, with the kind of each import."""
    for child in ast.iter_child_nodes(node):
        inner = kind
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and kind == "module":
            inner = "function"
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = "types"
        paths = [alias.name for alias in child.names] if isinstance(child, ast.Import) else []
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name the whole path"
            paths = [f"{child.module}.{alias.name}" for alias in child.names]
        for path in paths:
            top, _, inside = path.partition(".")
            if top == "counterpoint":
                yield inside if inside in known else inside.rpartition(".")[0], inner
        yield from _imports(child, known, inner)


def cycle(found: list[Import]) -> list[str]:
    """List the modules of a cycle in order, the first one repeated at the end; empty when there is none."""
    below: dict[str, set[str]] = {}
    for one in found:
        below.setdefault(one.importer, set()).add(one.imported)
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(below.get(name, ())):
            if circle := visit(other, [*way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(below) if (circle := visit(name, []))), [])


def upward(found: list[Import], rooms: list[str]) -> list[str]:
    """List the imports that do not run downward."""
    height = {room: -number for number, room in enumerate(rooms)}
    pairs = [(one, one.importer.partition(".")[0], one.imported.partition(".")[0]) for one in found]
    return [
        f"{one.importer} imports {one.imported} ({one.kind})"
        for one, room, other in pairs
        if room in height and other in height and height[other] > height[room]
    ]


def test_every_room_is_drawn():
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {room for room in there if not room.startswith("__")} == set(ROOMS)


@pytest.mark.parametrize("kind", KINDS)
def test_imports_run_downward_only(kind):
    found = [one for one in imports() if one.kind == kind]
    assert found, "the test reads no import of this kind"
    assert upward(found, ROOMS) == []


def test_no_module_imports_itself_on_a_detour():
    assert cycle(imports()) == []


def test_no_system_imports_another():
    inside = [one for one in imports() if one.importer.startswith("systems.") and one.imported.startswith("systems.")]
    shared = {"systems.base", "systems.parts", "systems.settings"}
    assert [one for one in inside if one.imported not in shared] == []


def test_pages_read_no_files_of_a_run():
    """A page takes an open run; what its files are called is known to `engine.run` alone."""
    for file in (SOURCE / "report").glob("*.py"):
        words = re.findall(r"open\(|read_text|read_bytes|safe_load|json\.load", file.read_text(encoding="utf-8"))
        assert not words or file.name in ("page.py", "detection.py"), (file.name, words)


def test_the_reading_of_imports_finds_each_kind_and_a_hidden_cycle(tmp_path):
    (tmp_path / "report").mkdir()
    for name, text in {
        "__init__": "",
        "files": "import os\n",
        "report/__init__": "",
        "report/run": "if TYPE_CHECKING:\n    from counterpoint.detect import Detection\n",
        "detect": "from counterpoint import files, training\n",
        "training": "def shown():\n    from counterpoint.report.run import write\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = imports(tmp_path)
    assert set(found) == {
        ("report.run", "detect", "types"),
        ("detect", "files", "module"),
        ("detect", "training", "module"),
        ("training", "report.run", "function"),
    }
    assert cycle(found) == ["detect", "training", "report.run", "detect"]
    assert cycle([one for one in found if one.kind != "types"]) == []
    assert upward(found, ["detect", "training", "report", "files"]) == ["report.run imports detect (types)"]
