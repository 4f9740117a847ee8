"""Measure codes of subjects: what they know of the subject, and what of its scene.

- `identity_purity`: share of pictures whose nearest other picture, by the codes, shows their subject.
- `nuisance_probe`: accuracy of a linear probe of the scene (the class) on codes of other subjects. Lower is purer.
- `similarity_rank`: Spearman's correlation of the codes' cosines with the real similarity, over pairs of different subjects.
- `picture_error`: mean squared error of generated pictures from the real ones of subject and caption, in 0..1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from counterpoint.tasks.measures.classes import linear_probe, purity
from counterpoint.tasks.measures.regression import rank_correlation


def subject_measures(
    codes: Float[Tensor, "n dim"],
    real: Float[Tensor, "n width"],
    subjects: Int[Tensor, " n"],
    scenes: Int[Tensor, " n"],
) -> dict[str, float]:
    """Compute the measures of codes. Those that the data do not allow are left out.

    Args:
        codes: rows of pictures.
        real: rows whose cosines are the real similarity.
        subjects: numbers of subjects, -1 for none.
        scenes: classes, -1 for none. The probe learns on half of the subjects, and is asked on the other half, both ways.

    >>> codes, subjects = torch.eye(3).repeat_interleave(2, 0), torch.arange(3).repeat_interleave(2)
    >>> subject_measures(codes, codes, subjects, torch.full((6,), -1))["identity_purity"]
    1.0
    """
    found = {"identity_purity": purity(codes, subjects, k=1)}
    names = subjects.unique()
    first = torch.isin(subjects, names[: len(names) // 2])
    known = scenes >= 0
    if bool((known & first).any()) and bool((known & ~first).any()):
        ways = [(first & known, ~first & known), (~first & known, first & known)]
        shares = [linear_probe(codes[a], scenes[a], codes[b], scenes[b])[0] for a, b in ways]
        found["nuisance_probe"] = sum(shares) / 2
    rows, columns = torch.triu_indices(len(codes), len(codes), 1)
    apart = subjects[rows] != subjects[columns]
    if bool(apart.any()):
        rows, columns = rows[apart], columns[apart]
        alike = [
            (F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T)[rows, columns] for x in (codes, real)
        ]
        found["similarity_rank"] = rank_correlation(*alike)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def picture_error(fake: UInt8[Tensor, "n 3 h w"], real: UInt8[Tensor, "n 3 h w"]) -> float:
    """Compute the mean squared error of pictures, as shares of full intensity.

    >>> picture_error(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    1.0
    """
    return float(((fake.double() - real.double()) / 255).square().mean())
