"""`counterpoint calibrate RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Device, Probability, say, unset


def main(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    data: Annotated[str, arg(metavar="SOURCE")],
    recall: Annotated[Probability, unset(metavar="SHARE")] = None,
    alarms_per_hour: Annotated[Probability, unset(metavar="N")] = None,
    method: str = "auto",
    device: Device = "auto",
) -> int:
    """Choose the threshold of a detector from labelled videos, and turn its scores into probabilities.

    Only the valid split of the source is used. The threshold meets a goal: a share of true moments found, or a number of false
    alarms in an hour without violence. The map from scores to probabilities is fitted on the same videos. Both are kept in the
    run, with intervals and a page, and `counterpoint detect` uses them from then on.

    Example: counterpoint calibrate runs/mine --data videos:mine --recall 0.9

    Args:
        run: A trained run that can detect.
        data: A source of labelled videos, such as videos:DIR. The run's backbones compute its features.
        recall: Wanted share of true moments found, above 0 and up to 1. Default: 0.9, where no other goal is given.
        alarms_per_hour: Wanted number of false alarms in an hour without violence, 0 or more.
        method: isotonic, platt, or auto: isotonic from 100 videos on, else platt.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
    """
    from counterpoint.engine.run import CALIBRATION, Run
    from counterpoint.use.calibrate import calibrate

    made, page = calibrate(
        Run.open(run), data, recall=recall, alarms_per_hour=alarms_per_hour, method=method, device=device, say=say
    )
    facts = made.facts
    say(f"Calibrated: {facts['said']}")
    for name, key, digits in (("recall", "recall", 2), ("false alarms an hour", "false_alarms_per_hour", 1)):
        found = facts[key]
        say(
            f"{name:22s} {found['value']:.{digits}f}  (95 %: {found['low']:.{digits}f} to {found['high']:.{digits}f}; each video "
            f"by the others' threshold: {found['crossed']:.{digits}f})"
        )
    before, after = facts["raw"], facts["calibrated"]
    say(f"{'calibration error':22s} {before['ece']:.3f} before, {after['ece']:.3f} calibrated (cross-fitted)")
    say(f"Kept: {run / CALIBRATION}  Page: {page}")
    return 0
