"""Train low-rank adapters of encoders instead of their own weights (`--lora RANK`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.encoders.adapters import LoRA, add_adapters, check_extra, keep_statistics
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.errors import CounterpointError, unknown


def lora_of(config: Any) -> LoRA:
    """Return the settings of adapters that a learner's settings hold."""
    return LoRA(config.lora, config.lora_alpha, tuple(config.lora_targets))


def check_adapters(config: Any) -> None:
    """Raise CounterpointError for settings of adapters that do not fit, before data are read."""
    if config.start and not (config.adapts or config.own_start):
        raise CounterpointError("--from: this system trains no encoder that another run could start")
    if _asked(config) and not (config.start or config.pretrained):
        raise CounterpointError(
            "--lora adapts trained weights, and this encoder's are random; give --from RUN or --pretrained"
        )


def check_aligned_adapters(config: Any) -> None:
    """Raise CounterpointError for settings of adapters that do not fit a learner of several modalities.

    The kinds of modalities are not known before data are read, so `adapted_names` checks the encoders.
    """
    _asked(config, "lora_modalities")


def _asked(config: Any, *more: str) -> bool:
    """Return whether settings ask for adapters. Raises CounterpointError for options that do not fit."""
    if config.lora_statistics not in ("frozen", "train"):
        raise unknown("lora_statistics", config.lora_statistics, ["frozen", "train"])
    if not config.lora:
        given = [name for name in ("lora_alpha", "lora_targets", *more) if getattr(config, name)]
        if given or config.lora_statistics != "frozen":
            raise CounterpointError(
                f"{(given or ['lora_statistics'])[0]} needs adapters: set their rank, as in --lora 8"
            )
        return False
    lora_of(config)
    if not config.adapts:
        raise CounterpointError("--lora: this system trains no encoder of its own that adapters could change")
    check_extra()
    return True


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


# --- several modalities


def published(config: Any, kind: str) -> bool:
    """Return whether the encoder of a kind of modality starts from published weights."""
    name = {"text": config.text_encoder, "audio": config.audio_encoder}.get(kind, "")
    return bool(config.pretrained) if kind == "image" else name == "minilm" or name.startswith("hf:")


def adapted_names(config: Any, kinds: Mapping[str, str], frozen: str = "") -> list[str]:
    """Return the modalities whose encoders get adapters: those named, or those with published weights.

    Args:
        config: settings with `lora`, `lora_modalities`, and the names of the encoders.
        kinds: modality -> kind.
        frozen: modality whose encoder does not train. Default: none.

    Raises CounterpointError for an unknown modality, for the frozen one, and where no encoder has published weights.
    """
    if not config.lora:
        return []
    for name in config.lora_modalities:
        if name not in kinds:
            raise unknown("modality of lora_modalities", name, list(kinds))
        if name == frozen:
            raise CounterpointError(f"lora_modalities: the encoder of {name} is frozen; leave it out")
    if config.lora_modalities:
        return [name for name in kinds if name in config.lora_modalities]
    found = [name for name, kind in kinds.items() if name != frozen and published(config, kind)]
    if not found:
        raise CounterpointError(
            "--lora adapts trained weights, and all encoders that train have random ones; give --pretrained with a library's image "
            "encoder, or --text-encoder minilm or hf:NAME. To adapt a run: --continue RUN --lora-modalities NAME"
        )
    return found


def adapt_modality(encoder: nn.Module, config: Any, spec: Mapping[str, Any]) -> None:
    """Add adapters to the encoder of one modality.

    Args:
        encoder: an encoder without adapters.
        config: settings with `lora`, `lora_alpha`, `lora_targets`.
        spec: facts of the modality.
    """
    add_adapters(encoder, lora_of(config), lambda: encoder(*_example(spec)))


def _example(spec: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the input of an encoder for one item of zeros."""
    of: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "image": lambda: (torch.zeros(1, 3, spec["size"], spec["size"]),),
        "text": lambda: (torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)),
        "audio": lambda: (torch.zeros(1, spec["samples"]),),
        "vector": lambda: (torch.zeros(1, spec["dim"]),),
    }
    return of[spec["kind"]]()


def keep_adapted(encoders: nn.ModuleDict, config: Any, names: list[str]) -> None:
    """Put layers with running statistics of adapted encoders into evaluation mode, unless these statistics may train."""
    for name in names if config.lora_statistics == "frozen" else ():
        keep_statistics(encoders[name])
