"""`counterpoint finetune RUN --data SOURCE`: the command `train finetune --from RUN`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from counterpoint.commands import train
from counterpoint.errors import CounterpointError

ABOUT = "RUN is a finished run of any system on pictures. The command is `counterpoint train finetune --from RUN`."


def main() -> int:
    """Train a classifier on the encoder of a finished run: whole, its last blocks, or the classifier alone.

    Example: counterpoint finetune runs/first --data imagefolder:photos --tune last --blocks 2
    """
    raise AssertionError("`prepare` gives the command that runs")


def prepare(argv: Sequence[str]) -> tuple[Any, list[str], str]:
    """Return the command `train finetune` that starts from the named run, the words left to parse, and the program's name."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        if not {"--data", "--resume", "--help", "-h"} & {word.partition("=")[0] for word in words}:
            raise CounterpointError(
                "which labelled data? counterpoint finetune RUN --data SOURCE (see: counterpoint data)"
            )
        command, rest, _ = train.prepare(["finetune", "--from", words[0], *words[1:]])
    elif {"--help", "-h", "--resume"} & {word.partition("=")[0] for word in words}:  # a run to resume names its encoder
        command, rest, _ = train.prepare(["finetune", *words])
    else:
        raise CounterpointError(
            "which run? counterpoint finetune RUN --data SOURCE (see: counterpoint finetune --help)"
        )
    summary, _, example = (inspect.getdoc(main) or "").partition("\n\n")
    defaults = (command.__doc__ or "").partition("\n\n")[2]
    command.__doc__ = f"{summary}\n\n{ABOUT}\n\n{defaults}\n\n{example}"
    return command, rest, "counterpoint finetune RUN"
