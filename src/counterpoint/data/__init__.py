"""Data sources: what is built in, and adapters for the user's own. Listing them imports neither torch nor numpy.

A source is named on the command line as `NAME` or `NAME:ARGUMENT` (`arcade`, `xd-violence:/data/xd`), with options after
a question mark (`arcade?train=100&seed=1`, `videos:/data/mine?visual=r3d_18`). Each lives in one file of this package
that has `load(argument: str | None, *, ...)`.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from counterpoint.errors import CounterpointError, unknown


@dataclass(frozen=True)
class Source:
    """One row of `counterpoint data`."""

    name: str
    task: str
    module: str
    gives: str
    licence: str
    size: str
    argument: str | None = None  # what follows the colon, None when nothing does
    needs: str = ""  # the extra that must be installed


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "arcade",
            "bags",
            "counterpoint.data.arcade",
            "audio-visual game clips: violent (explosions, hits, hurts, lasers) or not; sound late or off-screen in part",
            "CC0 (sprites and sounds of the arcade package)",
            "320 + 200 clips, 3.5 h of video in all, drawn once (about a minute) into 30 MB of features",
            needs="demo",
        ),
        Source(
            "async-bags",
            "bags",
            "counterpoint.data.async_bags",
            "synthetic bags of feature rows with audio-visual asynchrony and known truth: the setting of MACIL-SD's claim",
            "made on the spot",
            "320 + 200 bags, made in a second",
        ),
        Source(
            "xd-violence",
            "bags",
            "counterpoint.data.xd_violence",
            "the XD-Violence benchmark in its published I3D + VGGish feature layout",
            "the user's copy",
            "4,754 videos, about 60 GB of features",
            argument="DIR",
        ),
        Source(
            "videos",
            "bags",
            "counterpoint.data.videos",
            "your own video files in DIR/train/{violent,normal} and DIR/test/{violent,normal}, with DIR/truth.csv",
            "yours",
            "what you have",
            argument="DIR",
            needs="video",
        ),
    )
}


def source_name(spec: str) -> str:
    """The name in `NAME:ARGUMENT?OPTIONS`."""
    return spec.partition("?")[0].partition(":")[0]


def load(spec: str, **options: Any) -> Any:
    """Load the source named `NAME` or `NAME:ARGUMENT`, with `?OPTION=VALUE&OPTION=VALUE` after it if wanted.

    `options` go to the source and win over those in `spec`. Raises CounterpointError for an unknown name or option, or
    an argument missing or not wanted; DataError for what is on disk.
    """
    place, _, query = spec.partition("?")
    name, argument = source_name(spec), place.partition(":")[2]
    if name not in SOURCES:
        raise unknown("data source", name, SOURCES)
    source = SOURCES[name]
    if source.argument and not argument:
        raise CounterpointError(f"data source '{name}' needs a place: --data {name}:{source.argument}")
    if argument and not source.argument:
        raise CounterpointError(f"data source '{name}' takes no argument, got '{argument}'")
    loader = importlib.import_module(source.module).load
    return loader(argument or None, **(_options(name, query, loader) | options))


def _options(name: str, query: str, loader: Any) -> dict[str, Any]:
    """`key=value&...` as keyword arguments of `loader`, read as the types of their defaults."""
    known = {k: p.default for k, p in inspect.signature(loader).parameters.items() if p.kind is p.KEYWORD_ONLY}
    out: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in known:
            raise unknown(f"'{name}' option", key, known)
        try:
            out[key] = type(known[key])(value)
        except ValueError as error:
            raise CounterpointError(
                f"data source '{name}': {key}={value} is not a {type(known[key]).__name__}"
            ) from error
    return out
