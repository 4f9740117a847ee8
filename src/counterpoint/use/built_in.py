"""The detector that the package contains, for a first look at videos without a run of one's own.

It is small, and was trained on drawn arcade clips (`tools/pretrain_detector.py`). It is not validated on real footage, and every
output names that. `card.json` beside its weights has its data, their licences, and its figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import counterpoint
from counterpoint.engine.run import Run

NAME = "arcade-small"
FOLDER = Path(counterpoint.__file__).parent / "pretrained" / NAME
# What every output says of it, and the warning that stands over it.
TOLD = f"the built-in model {NAME} (trained on drawn arcade clips, not validated on real footage)"
WARNING = (
    f"the built-in model {NAME} was trained on drawn arcade clips and is not validated on real footage. Take its moments as a "
    "first look, and train on videos of your own: counterpoint train macil-sd --data videos:DIR"
)


def built_in() -> Run:
    """Open the built-in detector as a run. RunError where the package lacks it."""
    return Run.open(FOLDER)


def is_built_in(run: Run) -> bool:
    """Return whether a run is the built-in detector."""
    return run.path.resolve() == FOLDER.resolve()


def card() -> dict[str, Any]:
    """Return what is known of the built-in detector: its data with licences, and its figures."""
    found: dict[str, Any] = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    return found
