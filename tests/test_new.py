"""`make new` starts a system that trains, and whose tests fail until it is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from counterpoint import catalog

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    (tmp_path / "tests" / "systems").mkdir(parents=True)
    return tmp_path


def new(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "new.py"), *words, "--root", str(project)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_new_system_trains_and_its_tests_fail_where_it_is_to_be_written(project: Path) -> None:
    """A planned system of pictures and one of several modalities, in one run of pytest."""
    folders = {path.name for path in (ROOT / "src" / "counterpoint" / "systems").iterdir()}
    planned = [row for row in catalog.entries().values() if row.state == "planned" and row.task == "views"]
    own = ["my-pictures", "--title", "My pictures", "--area", "images", "--form", "views"]
    systems = (
        next(([row.slug] for row in planned if row.area in folders), own),
        ["my-way", "--title", "My way", "--area", "alignment", "--form", "aligned"],
    )
    for words in systems:
        assert new(project, *words).returncode == 0
    files = [f"tests/systems/test_{words[0].replace('-', '_')}.py" for words in systems]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project / "src"), "OMP_NUM_THREADS": "1"},
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert [sum(file in line for line in failed) for file in files] == [3, 3], done.stdout[-3000:]
    assert all("template_is_left" in line or "authors_numbers" in line for line in failed)
    assert "6 failed, 6 passed" in done.stdout
    for words in systems:
        again = new(project, *words)
        assert again.returncode == 2
        assert "is built already" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Obow"], "is no slug"),
        (["dcl"], "dcl is done already: see counterpoint.systems.images.dcl"),
        (["my-way"], "not in the catalogue: give TITLE= as well"),
        (["my-way", "--title", "x", "--area", "images", "--form", "tokens"], "no template of the form 'tokens'"),
        (["my-way", "--title", "x", "--area", "nowhere", "--form", "views"], "no folder"),
    ],
)
def test_names_that_do_not_fit_are_refused_and_nothing_is_written(project: Path, words: list[str], said: str) -> None:
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    done = new(project, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert before == {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
