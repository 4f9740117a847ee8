"""Compute the features of training images by a teacher that a setting names: a network, or the source's own features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, cached, frozen
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.tasks.images import ImageLearner
from counterpoint.views.images import MEAN, STD

LIBRARIES = ("hf", "timm", "torchvision")
KINDS = (*LIBRARIES, "run", "fit")


def check_teacher(name: str) -> None:
    """Raise CounterpointError for a name that is of no kind of teacher. Runs before data are read."""
    kind, colon, rest = name.partition(":")
    if name != "data" and (kind not in KINDS or not colon or not rest):
        raise unknown("teacher", name, ["data", *(f"{known}:NAME" for known in KINDS)])


def teacher_features(name: str, survey: Survey, size: int, device: torch.device) -> Tensor:
    """Return the teacher's features [examples, dim] of all training images, without augmentation.

    Args:
        name: hf:NAME, timm:NAME or torchvision:NAME: an image encoder with its published weights. run:RUN or
            fit:SLUG?data=SOURCE: a learner of images. data: the features that come with the source.
        survey: access to the images.
        size: height and width to which a library's encoder gets the images enlarged, in pixels.
        device: device of the teacher.

    A network's features are kept in the cache. Raises CounterpointError for a teacher that cannot be loaded or gives no
    features, and for features that are not finite. Raises DataError for a source without features.
    """
    if name == "data":
        own = getattr(survey.split("train"), "features", None)
        if own is None:
            raise DataError(
                "--teacher data: the source brings no features; name a network, such as --teacher run:RUN or "
                "--teacher hf:openai/clip-vit-base-patch32"
            )
        found = torch.from_numpy(np.asarray(own, np.float32))
    else:
        found = cached(image_teacher(name, size).to(device), survey, "train")[torch.arange(survey.examples)]
    if not bool(found.isfinite().all()):
        raise CounterpointError(f"--teacher {name} gives features that are NaN or infinite")
    return found


def image_teacher(name: str, size: int = 224) -> Frozen:
    """Load the network of a teacher that a setting names. Called with a batch of images, it returns features.

    Args:
        name: hf:NAME, timm:NAME or torchvision:NAME: an image encoder with its published weights. run:RUN or
            fit:SLUG?data=SOURCE: a learner of images.
        size: height and width to which a library's encoder gets the images enlarged, in pixels; by default 224.

    A library's encoder gets images of the means and deviations that it was trained with, where the library has them.
    Raises CounterpointError for a teacher that cannot be loaded or gives no features.
    """
    library = name.partition(":")[0] in LIBRARIES

    def enlarged(network: nn.Module) -> Any:
        mean, std = _statistics(name, network)
        same = (mean, std) == (tuple(MEAN), tuple(STD))

        def image_features(batch: dict[str, Any]) -> Tensor:
            images = batch["image"]
            if not same:
                ours, theirs = (
                    [images.new_tensor(part).view(3, 1, 1) for part in two] for two in ((MEAN, STD), (mean, std))
                )
                images = (images * ours[1] + ours[0] - theirs[0]) / theirs[1]
            found: Tensor = network(F.interpolate(images, size, mode="bilinear", antialias=True))
            return found

        return image_features

    try:
        teacher = frozen(name, enlarged if library else None, size=size)
    except CounterpointError as error:
        raise CounterpointError(
            f"--teacher {name}: {error}. Any finished run can teach, too: --teacher run:RUN"
        ) from error
    if not library and not isinstance(teacher.module, ImageLearner):
        raise CounterpointError(
            f"--teacher {name} has no features of single images; name a run of a system of images, such as simclr"
        )
    return teacher


def _statistics(name: str, network: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return means and deviations of the channels that a library's encoder was trained with; ImageNet's where it tells none."""
    library, _, model = name.partition(":")
    if library == "timm":
        known = getattr(network.model, "pretrained_cfg", None) or {}
        return tuple(known.get("mean") or MEAN), tuple(known.get("std") or STD)
    if library == "hf":
        from transformers import AutoImageProcessor

        try:
            seen: Any = AutoImageProcessor.from_pretrained(model)
            return tuple(seen.image_mean or MEAN), tuple(seen.image_std or STD)
        except (OSError, ValueError, AttributeError):  # a folder with the weights alone
            pass
    return tuple(MEAN), tuple(STD)


def features_of(teacher: Frozen, batch: dict[str, Any]) -> Tensor:
    """Compute the features [n, dim] of an `image_teacher` for a batch with normalised images at "image"."""
    found = teacher(batch)
    rows: Tensor = found["feature"] if isinstance(found, Mapping) else found
    return rows.float().flatten(1)
