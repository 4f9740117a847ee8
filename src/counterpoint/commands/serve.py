"""`counterpoint serve`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Place, Text, say, unset
from counterpoint.errors import CounterpointError, needs_extra


def main(
    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER")] = (Path("."),),
    *,
    host: str = "127.0.0.1",
    port: int = 8377,
    token: Annotated[Text, unset(metavar="TOKEN")] = None,
    name: Annotated[tuple[str, ...], unset(metavar="NAME [NAME ...]")] = (),
    out: Annotated[Place, unset(metavar="DIR")] = None,
) -> int:
    """Serve a local page over runs, claims, embeddings and detections.

    Show runs with live curves, sort and compare them. Search embeddings by words, picture or sound, and label them on a map. Review
    detections by keyboard. Start and stop trainings. Only this machine can open the page, unless --host names another address.

    Example: counterpoint serve . /data/videos --port 8400

    From another machine, a tunnel needs no token: ssh -L 8377:localhost:8377 THAT-MACHINE

    Args:
        folders: The folders that the page may read: runs, records of claims, embeddings, detections, and the pictures and videos
            of these. Runs are found up to three folders deep.
        host: The address to bind. Any other than 127.0.0.1, ::1 or localhost demands a token.
        port: The port; 0: any free one.
        token: The token, at least 16 characters; also $COUNTERPOINT_TOKEN, which other users of the machine cannot see. Default: a
            new one where it is demanded.
        name: Further names of this machine that browsers use, such as a proxy's. Default: none.
        out: The folder in which trainings make their runs, inside FOLDER. Default: runs in the first FOLDER.
    """
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise needs_extra("the page", "serve")
    if not 0 <= port <= 65535:
        raise CounterpointError(f"--port must be 0 to 65535, got {port}")
    from counterpoint.serve.app import run

    run(
        folders or (Path("."),),
        host=host,
        port=port,
        token=token or os.environ.get("COUNTERPOINT_TOKEN"),
        names=name,
        out=out,
        say=say,
    )
    return 0
