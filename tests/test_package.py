"""What an installed package holds: every file that the source tree has, and extras under the names that messages give."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import counterpoint
from counterpoint import cli, commands
from counterpoint.errors import EXTRA_OF

HERE = Path(counterpoint.__file__).parent
PROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture(scope="module")
def declared():
    return tomllib.loads(PROJECT.read_text(encoding="utf-8"))


def test_every_file_that_is_no_module_is_declared_as_package_data(declared):
    patterns = declared["tool"]["setuptools"]["package-data"]["counterpoint"]
    packed = {path for pattern in patterns for path in HERE.glob(pattern)}
    files = {path for path in HERE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(files) > 80
    assert sorted(files - packed) == []
    assert [pattern for pattern in patterns if not any(HERE.glob(pattern))] == []


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in HERE.rglob("*.py")}
    assert sorted(folder for folder in folders if not (folder / "__init__.py").is_file()) == []


def test_every_extra_in_a_message_is_an_extra_of_the_project(declared):
    extras = declared["project"]["optional-dependencies"]
    named = {}
    for path in HERE.rglob("*.py"):
        for words in re.findall(r"counterpoint\[([\w,-]+)\]", path.read_text(encoding="utf-8")):
            named |= dict.fromkeys(words.split(","), path.name)
    assert len(named) > 10
    assert {name: file for name, file in named.items() if name not in extras} == {}


def test_a_library_that_only_an_extra_brings_is_named_with_it(declared, monkeypatch, capsys):
    extras = declared["project"]["optional-dependencies"]
    assert set(EXTRA_OF.values()) <= set(extras)
    base = {re.split(r"[<>=;\[ ]", one)[0].lower().replace("-", "_") for one in declared["project"]["dependencies"]}
    assert base.isdisjoint(EXTRA_OF)
    for name, needed in (("transformers.models", "language"), ("starlette", "serve")):

        def absent(words, name=name):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        monkeypatch.setattr(commands, "_run", absent)
        assert cli.main(["train", "switchgpt"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert f"pip install 'counterpoint[{needed}]'" in line
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train", "switchgpt", "--debug"])
    monkeypatch.setattr(commands, "_run", lambda words: __import__("counterpoint.no_such_module"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train", "switchgpt"])
