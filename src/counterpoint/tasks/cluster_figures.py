"""Draw clusters of pictures: cosines with their centres, and pictures beside others of the same cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.operands import unit
from counterpoint.data.images import Indices
from counterpoint.data.shown import png
from counterpoint.engine.survey import Survey
from counterpoint.words import counted

COMPARED = 512  # class centres to compare with, at most
SHOWN = 8  # pictures of the gallery, and clusters of each
SIDE = 48  # pixels of a picture as shown, at least


def cluster_figures(
    survey: Survey,
    positions: Indices,
    u: Float[Tensor, "shown dim"],
    labels: Int[Tensor, "examples labels"],
    centers: Float[Tensor, "classes dim"],
) -> dict[str, Any]:
    """Show pictures with their clusters, and their cosines with the centres of these clusters and of others.

    Args:
        survey: access to the training pictures.
        positions: positions of the pictures.
        u: their unit embeddings.
        labels: clusters of every training picture, the nearest first.
        centers: centre of each cluster, not normalised.
    """
    own = labels[positions]
    classes = torch.cat([own.flatten(), torch.arange(len(centers))[:COMPARED]]).unique()
    cosine = u @ unit(centers[classes]).T
    positive = (own[:, :, None] == classes).any(1)
    edges = np.linspace(-1, 1, 61)
    series = {
        name: [((edges[1:] + edges[:-1]) / 2).tolist(), np.histogram(part, edges, density=True)[0].tolist()]
        for name, part in (("own clusters", cosine[positive]), ("other clusters", cosine[~positive]))
    }
    caption = (
        f"Density, {counted(len(positions), 'training image')} and {len(classes)} of {counted(len(centers), 'class')}."
    )
    curves = {"kind": "curves", "series": series, "xlabel": "cosine with a class centre", "caption": caption}
    gallery = _gallery(survey, positions, labels, cosine, classes)
    return {"Images and their clusters": gallery, "Cosines with class centres": curves}


def _gallery(
    survey: Survey, positions: Indices, labels: Tensor, cosine: Float[Tensor, "shown classes"], classes: Tensor
) -> dict[str, Any]:
    """Show a few pictures, and for each of their clusters another picture whose nearest cluster it is."""
    tags, truth, rows = survey.tags, survey.labels, list[dict[str, Any]]()
    for number in range(0, len(positions), -(-len(positions) // SHOWN)):
        query, found = int(positions[number]), []
        for label in labels[query][:SHOWN]:
            members = (labels[:, 0] == label).nonzero().flatten()
            for item in members[members != query][:1].tolist():
                alike = truth is None or bool(truth[query] == truth[item])
                alike = alike if tags is None else bool((tags[query] & tags[item]).any())
                near = float(cosine[number, torch.searchsorted(classes, label)])
                found.append({"item": item, "similarity": near, "right": alike})
        rows.append({"query": query, "found": sorted(found, key=lambda cell: -cell["similarity"])})
    wanted = sorted({row["query"] for row in rows} | {cell["item"] for row in rows for cell in row["found"]})
    pictures = survey.split("train").images(np.array(wanted))
    items = {f"image/{n}": {"png": png(p, least=SIDE)} for n, p in zip(wanted, pictures, strict=True)}
    return {"kind": "gallery", "parts": [{"query": "image", "key": "image", "rows": rows}], "items": items}
