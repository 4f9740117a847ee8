"""Start the encoder of a learner from a finished run of any system on pictures (`--from RUN`)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from counterpoint.encoders.adapters import load_base, merged_state
from counterpoint.engine.run import Run
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
    if kind == "fit":
        experiment = _room().of_spec(rest)[0]
        name = encoder_name(inner) if (inner := _started(experiment.config)) else None
    else:
        experiment = _room().Experiment.of_run(start.removeprefix("run:"))
        name = started_encoder(Run.open(start.removeprefix("run:")))
    name = name or getattr(experiment.config, "encoder", None) or getattr(experiment.config, "image_encoder", None)
    if name is None:
        raise CounterpointError(
            f"--from {start}: a run of {experiment.system.slug} has no encoder of pictures; name a run of a system on "
            "pictures, such as simclr or kd"
        )
    return str(name)


def started_encoder(run: Run) -> str | None:
    """Return the name of the encoder that a run took from another run; None for one that trained its own."""
    return run.facts().get("encoder") if (run.config.get("config") or {}).get("start") else None


def _started(config: Any) -> str:
    return str(getattr(config, "start", "")) if getattr(config, "adapts", False) else ""


def start_encoder(learner: Any, start: str) -> None:
    """Give the encoder of a learner the weights of a run's encoder, under its adapters if it has some.

    Copies of the encoder inside the learner, such as a momentum teacher's, start with the same weights. Adapters of the run's
    encoder are merged.

    Args:
        learner: a learner of pictures with `encoder`, built by the run's name of it, and `size`.
        start: see `encoder_name`.

    Raises CounterpointError for a run without an encoder of pictures, and for one of pictures of another size.
    """
    kind, _, rest = start.partition(":")
    before = _room().fitted(rest) if kind == "fit" else _room().load_learner(start.removeprefix("run:"))
    found = getattr(before, "encoder", None)
    if found is None:
        encoders = getattr(before, "encoders", {})
        found = encoders[before.image] if getattr(before, "image", None) in encoders else None
    if found is None:
        raise CounterpointError(
            f"--from {start}: it has no encoder for pictures alone; name a run of a system on pictures, such as simclr or kd"
        )
    state = merged_state(found)
    copies = [twin for twin in learner.modules() if _same(twin, learner.encoder)]
    try:
        for twin in (learner.encoder, *copies):
            load_base(twin, state)
    except RuntimeError as error:
        raise CounterpointError(
            f"--from {start}: its encoder does not fit pictures of {learner.size} pixels; use data of the run's size (?size=): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def _same(module: nn.Module, encoder: nn.Module) -> bool:
    """Return whether a module is a copy of the encoder with the same values."""
    if module is encoder or type(module) is not type(encoder):
        return False
    one, other = module.state_dict(), encoder.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
