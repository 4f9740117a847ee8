"""The handwritten digits of scikit-learn, read from its file, because importing scikit-learn takes a second."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from counterpoint.errors import DataError


def load_digits() -> SimpleNamespace:
    """Return the same as `sklearn.datasets.load_digits`: data [1797, 64], images [1797, 8, 8], target [1797].

    Pixels are floats from 0 to 16. Raises DataError when the installed scikit-learn lacks the file.
    """
    package = find_spec("sklearn")
    file = Path(str(package.origin)).parent / "datasets" / "data" / "digits.csv.gz" if package else None
    if file is None or not file.is_file():
        raise DataError(
            f"{file or 'scikit-learn'}: no such file; reinstall it: pip install --force-reinstall scikit-learn"
        )
    with gzip.open(file, "rt", encoding="utf-8") as rows:
        found = np.loadtxt(rows, delimiter=",")
    data = found[:, :-1]
    return SimpleNamespace(data=data, images=data.reshape(-1, 8, 8), target=found[:, -1].astype(int))
