"""Start the encoder of a learner from a finished run of any system on pictures (`--from RUN`)."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from counterpoint.errors import CounterpointError


def _room() -> Any:
    return importlib.import_module("counterpoint.experiment")  # above this package


def encoder_name(start: str) -> str:
    """Return the name of the encoder that a run trained.

    Args:
        start: RUN, run:RUN or fit:SLUG?data=SOURCE.

    Raises CounterpointError for a run without an encoder of pictures, RunError for a path that is no run.
    """
    kind, _, rest = start.partition(":")
    experiment = _room().of_spec(rest)[0] if kind == "fit" else _room().Experiment.of_run(start.removeprefix("run:"))
    name = getattr(experiment.config, "encoder", None) or getattr(experiment.config, "image_encoder", None)
    if name is None:
        raise CounterpointError(f"--from {start}: a run of {experiment.system.slug} has no encoder of pictures")
    return str(name)


def start_encoder(encoder: nn.Module, start: str, size: int) -> None:
    """Give an encoder the weights of a run's encoder.

    Args:
        encoder: the network, built by the run's name of it.
        start: see `encoder_name`.
        size: height and width of the pictures, in pixels, for the message.

    Raises CounterpointError for a run without an encoder of pictures, and for one of pictures of another size.
    """
    kind, _, rest = start.partition(":")
    before = _room().fitted(rest) if kind == "fit" else _room().load_learner(start.removeprefix("run:"))
    found = getattr(before, "encoder", None)
    if found is None:
        encoders = getattr(before, "encoders", {})
        found = encoders[before.image] if getattr(before, "image", None) in encoders else None
    if found is None:
        raise CounterpointError(f"--from {start}: the run has no encoder of pictures")
    try:
        encoder.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise CounterpointError(
            f"--from {start}: its encoder does not fit pictures of {size} pixels; use data of the run's size (?size=): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
