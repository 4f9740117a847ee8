"""The examples of docstrings give what they show, and annotated shapes and types hold where valid arguments come in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Rooms -> how many examples stand there at least, and how many functions of the table are called.
ROOMS = {
    "counterpoint.core": (55, 8),
    "counterpoint.systems,counterpoint.views.images": (80, 40),
    "counterpoint.losses,counterpoint.encoders": (190, 0),
    "counterpoint.engine,counterpoint.lab,counterpoint.functional,counterpoint.tasks,counterpoint.data": (10, 0),
}


@pytest.mark.slow
def test_examples_and_annotations_hold() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "examples.py"), *ROOMS],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    said = dict(line.split(": ") for line in done.stdout.splitlines() if line.endswith("functions called"))
    assert set(said) == set(ROOMS)
    for rooms, (examples, functions) in ROOMS.items():
        words = said[rooms].split()
        assert int(words[0]) >= examples, rooms
        assert int(words[2]) >= functions, rooms
