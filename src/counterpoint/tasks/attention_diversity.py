"""Measure how diverse the attention of vision transformers is, and draw it, with the tokens that survive a dropping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.core.tokens import attention_distance, attention_nmi, token_relations
from counterpoint.data.shown import png
from counterpoint.encoders.inside import Inside, TokenNetwork
from counterpoint.engine.survey import Survey

MEASURED = 256  # pictures of which attention is measured
LAST = 2  # layers of which attention is measured
SHOWN = 4  # pictures of the page
BLANK = (210, 215, 225)  # colour of dropped patches

# A network, and its function of normalised pictures and numbers of layers
Looked = tuple[TokenNetwork, Callable[..., Inside]]


def head_diversity(looked: Looked, survey: Survey, split: str) -> Tensor:
    """Return distance, in patches, and NMI of the attention among patches of every head, [2, layers, heads].

    They are the means over at most 256 pictures of a split. The network keeps all tokens.
    """
    network, look = looked
    layers = range(network.depth)

    def measured(batch: dict[str, Any]) -> Tensor:
        inside = look(batch["image"], layers)
        distance, nmi = [], []
        for n in layers:
            qkv = inside.layers[n]
            patches = token_relations(qkv.query, qkv.key)[:, :, network.prefix :, network.prefix :]
            patches = patches / patches.sum(-1, keepdim=True).clamp(min=1e-12)
            distance.append(attention_distance(patches, network.grid))
            nmi.append(attention_nmi(patches))
        return torch.stack([torch.stack(distance, 1), torch.stack(nmi, 1)], 1)

    rows = np.arange(min(MEASURED, len(survey.split(split))))
    return survey.over(split, measured, rows).double().mean(0)


def diversity(networks: Mapping[str, Looked], survey: Survey, split: str) -> dict[str, float]:
    """Return the diversity of attention in the last two layers of networks, by name; "" is the student.

    Measures: nmi and distance, the means over heads; distance_spread, the deviation over a layer's heads.
    """
    found: dict[str, float] = {}
    for name, looked in networks.items():
        distance, nmi = head_diversity(looked, survey, split)[:, -LAST:]
        prefix = f"{name}_" if name else ""
        found |= {
            f"{prefix}nmi": float(nmi.mean()),
            f"{prefix}distance": float(distance.mean()),
            f"{prefix}distance_spread": float(distance.std(1, correction=0).mean()),
        }
    return found


def diversity_figures(networks: Mapping[str, Looked], survey: Survey) -> dict[str, Any]:
    """Draw the attention distance and the NMI of every head, a point each, on test pictures."""
    points: list[dict[str, Any]] = [{}, {}]
    for shift, (name, looked) in enumerate(networks.items()):
        for part, values in zip(points, head_diversity(looked, survey, "test"), strict=True):
            at = np.arange(len(values)) / max(1, len(values) - 1) + 0.02 * shift
            label = name.replace("_", " ") or "student"
            part[label] = [[float(x), float(y)] for x, row in zip(at, values, strict=True) for y in row]
    depth = "depth, from the first layer (0) to the last (1)"
    return {
        "Distance of attention": {
            "kind": "points",
            "points": points[0],
            "axes": [depth, "mean distance, in patches"],
            "caption": "A point is a head: the mean distance between a patch and what it attends to, on test pictures.",
        },
        "NMI of attention": {
            "kind": "points",
            "points": points[1],
            "axes": [depth, "normalised mutual information"],
            "caption": "A point is a head: 0 if all patches attend alike, 1 if each attends to one patch of its own.",
        },
    }


@torch.no_grad()
def survivors(
    look: Callable[[Tensor, Sequence[int]], Inside], layers: Sequence[int], grid: tuple[int, int], survey: Survey
) -> dict[str, Any]:
    """Draw the patches of test pictures that a student keeps before each of these layers.

    Args:
        look: maps normalised pictures and numbers of layers to the student's inside.
        layers: layers before which tokens are dropped.
        grid: number of patches down and across.
        survey: access to the pictures.
    """
    rows = np.arange(min(SHOWN, len(survey.split("test"))))
    alive = look(survey.batch("test", rows)["image"], layers).alive_at
    pictures = survey.split("test").images(rows)
    size, (down, across) = pictures.shape[1], grid
    scale = -(-64 // size)  # pictures of a few pixels are shown larger
    drawn = []
    for number, picture in enumerate(pictures):
        row = [picture]
        for layer in layers:
            kept = alive[layer]
            there = np.zeros(down * across)
            there[slice(None) if kept is None else kept[number].cpu().numpy()] = 1
            mask = there.reshape(down, across).repeat(size // down, 0).repeat(size // across, 1)[..., None]
            row.append((picture * mask + np.array(BLANK) * (1 - mask)).astype(np.uint8))
        drawn.append([png(each.repeat(scale, 0).repeat(scale, 1)) for each in row])
    columns = ["picture", *(f"layer {n}" for n in layers)]
    caption = "Patches of test pictures that survive the dropping before each of these layers; the others are blank."
    return {"Surviving tokens": {"kind": "pictures", "columns": columns, "rows": drawn, "caption": caption}}
