"""`counterpoint generate RUN`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Device, Place, complain, say, unset
from counterpoint.words import counted


def main(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    *,
    prompt: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]")],
    subject: Annotated[Place, unset(metavar="FOLDER")] = None,
    number: int = 8,
    out: Path = Path("generated"),
    seed: int = 0,
    device: Device = "auto",
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Generate pictures of prompts by a finished run.

    Example: counterpoint generate runs/first --prompt "a small red seven at the top left" --number 4 --out pictures

    Args:
        run: A finished run of the task generation.
        prompt: Texts in the style of the training captions. The option may be repeated.
        subject: A folder of pictures of one subject, for a run that takes one. Prompts then call it "subject". Default: none.
        number: Pictures of each prompt, at least 1.
        out: A new or empty folder for the pictures and their page, index.html.
        seed: Seed of the noise, which is the same on every device.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        json_: Print JSON.
    """
    from counterpoint.use.generate import PAGE, generate

    found = generate(run, prompt, out, number=number, seed=seed, subject=subject, device=device)
    for one in found:
        if one.unknown:
            complain(f"'{one.prompt}': the run does not know {', '.join(one.unknown)}")
    if json_:
        rows = [
            {"prompt": one.prompt, "files": [str(file) for file in one.files], "unknown": one.unknown} for one in found
        ]
        print(json.dumps(rows, indent=2))
    else:
        say(f"{counted(sum(len(one.files) for one in found), 'picture')}: {out}")
        say(f"Page: {out / PAGE}")
    return 0
