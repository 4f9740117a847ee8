"""Write and read a run's last.ckpt, from which a fit resumes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from counterpoint.engine.run import Run
from counterpoint.errors import RunError


def write_checkpoint(run: Run, state: dict[str, Any]) -> None:
    """Write a fit's state as a whole: a reader sees the checkpoint before, or this one."""
    half = run.path / ".last.ckpt.half"
    torch.save(state, half)
    os.replace(half, run.checkpoint)


def read_checkpoint(run: Run, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a run's last.ckpt. Raise RunError, naming the file, when it is damaged or of an older version."""
    if _of_lightning(run.checkpoint):
        raise RunError(
            f"{run.checkpoint} is from an older version of counterpoint, and this version cannot resume it; finish the run "
            "with the older version, or delete the file to start this run over"
        )
    try:
        state = dict(torch.load(run.checkpoint, map_location=device, weights_only=True))
        state["position"] = dict(state["position"])
        missing = {"examples", "trainable", "teachers", "turns", "rows"} - state.keys()
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    except Exception as error:  # of any kind: the message must name the file
        raise RunError(
            f"{run.checkpoint} cannot be resumed from ({type(error).__name__}); delete it to start this run over, or restore it "
            "from a copy"
        ) from error
    return state


def _of_lightning(path: Path) -> bool:
    """Return whether a version of this package that trained with PyTorch Lightning wrote a checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return any(b"pytorch-lightning_version" in archive.read(name) for name in names)
    except (OSError, zipfile.BadZipFile):
        return False
