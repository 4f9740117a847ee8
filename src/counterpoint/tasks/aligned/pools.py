"""Collect the items that an encoder can learn from alone, without their partners in other modalities."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from counterpoint.data.pairs import AlignedSplit, Indices
from counterpoint.engine.survey import Survey
from counterpoint.errors import DataError


class Pool(NamedTuple):
    """The items of a split that have one modality, which is an image, a sound or a vector."""

    name: str
    split: AlignedSplit
    rows: Indices  # positions of the items

    def draw(self, most: int, generator: torch.Generator) -> Indices:
        """Draw the positions of `most` different items, or of all in random order if there are fewer."""
        chosen = torch.randperm(len(self.rows), generator=generator)[:most]
        return self.rows[chosen.numpy()]

    def values(self, positions: Indices) -> Shaped[Tensor, "n ..."]:
        """Return these items, images as [n, 3, height, width]."""
        found = torch.from_numpy(np.asarray(self.split.column(self.name, positions)))
        return found.permute(0, 3, 1, 2) if found.ndim == 4 else found


def pool(survey: Survey, name: str) -> Pool:
    """Return the items of a modality in the split `unpaired`; if it has none, those of the training split.

    Args:
        survey: access to the data.
        name: the modality.

    Raises DataError if fewer than two items have it.
    """
    split, unpaired = survey.split("train"), survey.split("unpaired")
    if unpaired is not None and unpaired.present(name, np.arange(len(unpaired))).any():
        split = unpaired
    rows = np.flatnonzero(split.present(name, np.arange(len(split))))
    if len(rows) < 2:
        raise DataError(f"the data has {len(rows)} items of {name} to pre-train on, at least 2 are needed")
    return Pool(name, split, rows)
