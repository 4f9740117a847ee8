"""The examples of docstrings give what they show, and annotated shapes and types hold where valid arguments come in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Rooms, how many examples stand there at least, and how many functions of the table are called.
ROOMS = [
    (["counterpoint.core"], 55, 8),
    (["counterpoint.systems", "counterpoint.views.images"], 80, 40),
    (
        [
            "counterpoint.engine",
            "counterpoint.lab",
            "counterpoint.functional",
            "counterpoint.tasks",
            "counterpoint.data",
        ],
        10,
        0,
    ),
]


@pytest.mark.parametrize(("rooms", "examples", "functions"), ROOMS, ids=lambda value: str(value)[:40])
def test_examples_and_annotations_hold(rooms: list[str], examples: int, functions: int) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "examples.py"), *rooms],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    words = done.stdout.splitlines()[-1].split()
    assert int(words[0]) >= examples
    assert int(words[2]) >= functions
