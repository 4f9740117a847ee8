"""Name the subsets of several modalities, and corrupt one of them, to measure a method that takes any.

A learner of the task `dense` returns logits for each subset and corruption under these names. The evaluation measures each, and
their means `subset_miou` and `corrupted_miou`.

    rde          the modalities rgb, depth and event alone, by the first letters that tell them apart
    noise_d      all modalities, but depth is noise
    night        all modalities, but the first is nearly black
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.views.images import denormalise, normalise

MOST = 6  # modalities up to which all subsets are measured
DARK = 0.05  # brightness of a night, in shares of the picture's


def initials(modalities: Sequence[str]) -> list[str]:
    """Return the shortest beginnings that tell the modalities apart.

    >>> initials(["rgb", "depth", "dolp"])
    ['r', 'de', 'do']
    """
    found = []
    for name in modalities:
        others = [other for other in modalities if other != name]
        length = next((n for n in range(1, len(name)) if not any(o.startswith(name[:n]) for o in others)), len(name))
        found.append(name[:length])
    return found


def subsets(modalities: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the non-empty subsets by name, as positions of modalities, from one to all.

    Of more than 6 modalities these are the single ones, all but one, and all.

    >>> subsets(["rgb", "depth"])
    {'r': (0,), 'd': (1,), 'rd': (0, 1)}
    """
    short, count = initials(modalities), len(modalities)
    sizes = range(1, count + 1) if count <= MOST else (1, count - 1, count)
    return {"".join(short[n] for n in at): at for size in sizes for at in combinations(range(count), size)}


class Corruption(NamedTuple):
    """A change of one modality."""

    kind: str  # "noise" or "night"
    modality: int


def corruptions(modalities: Sequence[str]) -> dict[str, Corruption]:
    """Return the corruptions to measure, by name; none of a single modality.

    >>> list(corruptions(["rgb", "depth"]))
    ['night', 'noise_r', 'noise_d']
    """
    if len(modalities) < 2:
        return {}
    noise = {f"noise_{short}": Corruption("noise", n) for n, short in enumerate(initials(modalities))}
    return {"night": Corruption("night", 0)} | noise


def corrupted(
    pictures: Float[Tensor, "n 3 height width"], kind: str, index: Int[Tensor, " n"]
) -> Float[Tensor, "n 3 height width"]:
    """Return pictures as uniform noise, always the same for an index, or nearly black.

    Args:
        pictures: normalised pictures of one modality.
        kind: "noise" or "night".
        index: positions of the pictures, the seeds of their noise.
    """
    if kind == "night":
        return normalise(denormalise(pictures) * DARK)
    each = [torch.rand(pictures.shape[1:], generator=torch.Generator().manual_seed(int(n))) for n in index]
    return normalise(torch.stack(each).to(pictures))
