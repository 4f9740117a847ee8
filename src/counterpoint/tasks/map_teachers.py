"""Make frozen teachers of feature maps that settings name, and check that their maps fit the student's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.maps import feature_map
from counterpoint.encoders.prefix_windows import PrefixWindows
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Cached, Frozen, frozen
from counterpoint.errors import CounterpointError
from counterpoint.tasks.images import ImageLearner


def map_teacher(setting: str, name: str, survey: Survey, dim: int, grid: int) -> Frozen:
    """Return a teacher that maps a batch to feature maps [n, dim, grid, grid] of its pictures.

    Args:
        setting: the user's setting, for messages.
        name: hf:NAME (SAM: its image embedding), timm:NAME or torchvision:NAME, with published weights; run:RUN or
            fit:SLUG?data=SOURCE: the encoder of a learner of pictures.
        survey: access to the pictures of the student.
        dim: channels of the student's map.
        grid: cells of a side of the student's map.

    Raises CounterpointError for a teacher that cannot be loaded, has no map, or maps of another grid or other channels.
    """
    batch = survey.batch("train", [0])
    try:
        found = frozen(name, _maps, size=batch["image"].shape[2]).to(batch["image"].device)
        maps: Tensor = found(batch)
    except (CounterpointError, RuntimeError) as error:
        raise CounterpointError(f"{setting}: {error}") from error
    if tuple(maps.shape[2:]) != (grid, grid):
        raise CounterpointError(
            f"{setting} gives a map of {maps.shape[2]} x {maps.shape[3]} cells, the student one of {grid} x {grid}; choose a "
            "teacher or a student with the other's patches"
        )
    if maps.shape[1] != dim:
        raise CounterpointError(f"{setting} gives maps of {maps.shape[1]} channels, the student of {dim}; set --dim")
    return found


def teachers_by_kind(natural: str, medical: str, survey: Survey, dim: int, grid: int) -> dict[str, Frozen]:
    """Return the teacher of natural pictures, and that of pictures of a modality where its name is not empty.

    Arguments and errors are those of `map_teacher`.
    """
    found = {"natural": map_teacher(f"--teacher {natural}", natural, survey, dim, grid)}
    if medical:
        found["medical"] = map_teacher(f"--medical-teacher {medical}", medical, survey, dim, grid)
    return found


def taught_maps(
    teachers: Mapping[str, Frozen], batch: dict[str, Any], known: Mapping[str, Cached] | None = None, grid: int = 0
) -> Float[Tensor, "n dim grid grid"]:
    """Return the maps of each picture's teacher: "medical", where there is one, for pictures of a modality, else "natural".

    Args:
        teachers: see `teachers_by_kind`.
        batch: pictures with their `domain`, -1 for natural ones.
        known: maps of training pictures that were computed before, by the teacher's name and the batch's `index`.
        grid: cells of a side of these maps.
    """
    found = {}
    for name, teacher in teachers.items():
        if known and name in known:
            found[name] = known[name][batch["index"]].unflatten(1, (-1, grid, grid))
        else:
            found[name] = teacher(batch)
    if len(found) == 1:
        return found["natural"]
    return torch.where((batch["domain"] >= 0)[:, None, None, None], found["medical"], found["natural"])


def _maps(network: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    encoder: Any = network.encoder if isinstance(network, ImageLearner) else network

    def teacher_maps(batch: dict[str, Any]) -> Tensor:
        if isinstance(encoder, PrefixWindows):
            return encoder.features(batch["image"], batch.get("domain"))
        return feature_map(encoder, batch["image"])

    return teacher_maps
