"""`counterpoint evaluate RUN`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Device, Text, say, unset


def main(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    data: Annotated[Text, unset(metavar="SOURCE")] = None,
    device: Device = "auto",
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Measure a trained run on its test data, or on another source's.

    Example: counterpoint evaluate runs/first --data glyphs --json

    Args:
        run: A run directory with trained weights.
        data: Another data source, with features of the same kind. Default: the run's own.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        json_: Print JSON.
    """
    from counterpoint import training

    metrics = training.evaluate(run, data=data, device=device, say=say if not json_ else lambda _: None)
    if json_:
        print(json.dumps({**metrics, "chance": metrics.chance} if metrics.chance else metrics))
        return 0
    for name, value in metrics.items():
        level = f"   chance {metrics.chance[name]:.4f}" if name in metrics.chance else ""
        say(f"{name:20s} {value:.4f}{level}")
    return 0
