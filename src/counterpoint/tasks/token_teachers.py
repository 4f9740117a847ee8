"""Make a frozen teacher of tokens that a setting names: a vision transformer whose tokens and attention can be read.

Sources of the teacher:

    hf:NAME, timm:NAME     a published transformer (CLIP, DINO, ViT-MAE, DeiT, ...)
    run:RUN                the encoder of a finished run (mae, dino, kd, ...)
    fit:SLUG?data=SOURCE   the encoder of a learner that is trained once and kept in the cache

A published one sees the student's picture at the size at which its patches form the student's grid. It gets its own mean and
deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.encoders.images import check_image_encoder
from counterpoint.encoders.inside import Inside, TokenNetwork
from counterpoint.engine.teachers import Frozen, frozen
from counterpoint.errors import CounterpointError, unknown
from counterpoint.tasks.images import ImageLearner
from counterpoint.tasks.scene_teachers import resized
from counterpoint.views.images import MEAN, STD, denormalise, normalise

KINDS = ("hf", "timm", "run", "fit")
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_token_teacher(setting: str, name: str) -> None:
    """Raise CounterpointError for a name that is of no kind of teacher. Runs before data are read."""
    kind, _, rest = name.partition(":")
    if kind not in KINDS or not rest:
        raise CounterpointError(f"{setting}: {unknown('teacher', name, [f'{known}:NAME' for known in KINDS])}")


def _look(
    network: TokenNetwork,
    mean: Sequence[float],
    std: Sequence[float],
    images: Float[Tensor, "n 3 own own"],
    layers: Sequence[int] = (),
) -> Inside:
    """Scale the student's normalised pictures to the teacher's size, normalise them as it needs, and look inside it."""
    if (*mean, *std) != (*MEAN, *STD):
        images = normalise(denormalise(images), mean, std)
    return network(resized(images, network.size), layers)


def token_teacher(setting: str, name: str, grid: tuple[int, int]) -> Frozen:
    """Return a frozen `TokenNetwork` whose patches form the student's grid; teacher(images, layers) gives an `Inside`.

    Args:
        setting: the user's setting, for messages.
        name: hf:NAME, timm:NAME, run:RUN or fit:SLUG?data=SOURCE.
        grid: the student's patches down and across.

    Raises CounterpointError for a teacher that cannot be loaded, is no vision transformer, or has another grid.
    """
    check_token_teacher(setting, name)
    said = f"{setting} {name}"
    library = name.partition(":")[0] in ("hf", "timm")
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    try:
        if library:
            check_image_encoder(name)
            size = grid[0] * _patch(name)
            encoder: Any = frozen(name, size=size).module
            mean, std = _normalisation(name, encoder)
        else:
            learner: Any = frozen(name).module
            if not isinstance(learner, ImageLearner):
                raise CounterpointError(
                    "it has no encoder of pictures; name a run of mae, dino, kd or another such system"
                )
            encoder, size = learner.encoder, learner.size
        network = TokenNetwork(encoder, "its encoder" if not library else "it", size)
    except CounterpointError as error:
        raise CounterpointError(f"{said}: {error}") from error
    if network.grid != grid:
        raise CounterpointError(
            f"{said} cuts a picture into {network.grid[0]} x {network.grid[1]} patches, the student into {grid[0]} x {grid[1]}; "
            "choose a teacher or a student with the other's grid (--encoder, or size= of the data)"
        )
    return Frozen(network, name, partial(_look, network, mean, std))


def _patch(name: str) -> int:
    """Return the side of a published transformer's patches, in pixels, without its weights."""
    library, _, place = name.partition(":")
    if library == "timm":
        import timm

        with torch.device("meta"):
            model: Any = timm.create_model(place, pretrained=False)
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    else:
        try:
            from transformers import AutoConfig

            config: Any = AutoConfig.from_pretrained(place)
        except Exception as error:  # transformers' and its HTTP client's own kinds
            text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CounterpointError(
                f"could not be loaded: {text[:300].rstrip('.')}. A model that is not on this machine is downloaded. Without a "
                "network, name a finished run: run:RUN"
            ) from error
        patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if patch is None:
        raise CounterpointError("it is no vision transformer, since it has no patches")
    return int(patch[0] if isinstance(patch, list | tuple) else patch)


def _normalisation(name: str, encoder: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and deviation of the channels of a published network's pictures."""
    library, _, place = name.partition(":")
    if library == "timm":
        known = getattr(encoder.model, "pretrained_cfg", None) or {}
        return known.get("mean", MEAN), known.get("std", STD)
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(place)
        return tuple(processor.image_mean), tuple(processor.image_std)
    except Exception:  # without a processor's file: CLIP's numbers for CLIP, else ImageNet's
        return CLIP if "clip" in str(encoder.model.config.model_type) else (MEAN, STD)
