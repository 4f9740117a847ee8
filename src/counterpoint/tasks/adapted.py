"""Train low-rank adapters of an encoder of pictures instead of its own weights (`--lora RANK`)."""

from __future__ import annotations

from typing import Any

import torch

from counterpoint.encoders.adapters import LoRA, add_adapters, check_extra
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.errors import CounterpointError, unknown


def lora_of(config: Any) -> LoRA:
    """Return the settings of adapters that a learner's settings hold."""
    return LoRA(config.lora, config.lora_alpha, tuple(config.lora_targets))


def check_adapters(config: Any) -> None:
    """Raise CounterpointError for settings of adapters that do not fit, before data are read."""
    if config.start and not (config.adapts or config.own_start):
        raise CounterpointError("--from: this system trains no encoder that another run could start")
    if config.lora_statistics not in ("frozen", "train"):
        raise unknown("lora_statistics", config.lora_statistics, ["frozen", "train"])
    if not config.lora:
        given = [name for name in ("lora_alpha", "lora_targets") if getattr(config, name)]
        if given or config.lora_statistics != "frozen":
            raise CounterpointError(
                f"{(given or ['lora_statistics'])[0]} needs adapters: set their rank, as in --lora 8"
            )
        return
    lora_of(config)
    if not config.adapts:
        raise CounterpointError("--lora: this system trains no encoder of its own that adapters could change")
    if not (config.start or config.pretrained):
        raise CounterpointError(
            "--lora adapts trained weights, and this encoder's are random; give --from RUN or --pretrained"
        )
    check_extra()


def adapt(encoder: ImageEncoder, config: Any, size: int, channels: int) -> None:
    """Add adapters to an encoder. By default its running statistics stay from now on, also in training mode.

    Args:
        encoder: an encoder without adapters.
        config: settings with `lora`, `lora_alpha`, `lora_targets`, `lora_statistics`.
        size: height and width of the pictures, in pixels.
        channels: number of their channels.
    """
    add_adapters(encoder, lora_of(config), lambda: encoder(torch.zeros(1, channels, size, size)))
    encoder.still = config.lora_statistics == "frozen"
    encoder.train(encoder.training)
