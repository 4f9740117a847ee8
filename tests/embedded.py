"""Write a teacher's embeddings of pictures and class texts into a file, as `--teacher file:X.npz` takes it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def embeddings(pictures: int, classes: int, /, dim: int = 6, folder: Path | None = None, **more: Any) -> str:
    """Return the name of a teacher with random embeddings; `more` replaces or adds arrays."""
    rng = np.random.default_rng(0)
    place = (folder or Path(tempfile.mkdtemp())) / f"teacher-{pictures}-{classes}.npz"
    arrays = {
        "train": rng.standard_normal((pictures, dim)).astype(np.float32),
        "text": rng.standard_normal((classes, dim)).astype(np.float32),
        "scale": np.float32(10.0),
    }
    np.savez(place, **{name: value for name, value in (arrays | more).items() if value is not None})
    return f"file:{place}"
