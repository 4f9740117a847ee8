"""Data sources: built-in sets, and adapters for the user's own data. Listing them imports neither torch nor numpy.

The command line names a source as `NAME` or `NAME:ARGUMENT` (`arcade`, `xd-violence:/data/xd`). Options follow a question
mark (`arcade?train=100&seed=1`, `videos:/data/mine?visual=r3d_18`). Each source is one file of this package with a function
`load(argument: str | None, *, ...)`. Sources that read the same files through the same library share a file. A source that
serves several tasks returns the contract of the task that is asked for.
"""

from __future__ import annotations

import glob
import importlib
import inspect
import os
import re
from typing import Any

from counterpoint.data.sources import PLACES, SOURCES
from counterpoint.errors import CounterpointError, unknown

__all__ = ["PLACES", "SOURCES", "load", "source_name"]


def source_name(spec: str) -> str:
    """Return the name in `NAME:ARGUMENT?OPTIONS`; of a stream, that of its first source."""
    name, _, argument = spec.partition("?")[0].partition(":")
    if name != "stream" or not argument:
        return name
    from urllib.parse import unquote  # 20 ms of every start otherwise

    return source_name(unquote(argument.partition(",")[0]))


def load(spec: str, *, task: str | None = None, **options: Any) -> Any:
    """Load the data of a source.

    Args:
        spec: `NAME` or `NAME:ARGUMENT`, with `?OPTION=VALUE&OPTION=VALUE` after it if wanted. Brackets, asterisks and question
            marks of a path that exists belong to the path. `memory:...` names an object that this process holds (memory.py).
        task: aligned, bags, chats, demonstrations, dense, dialogs, episodes, federations, frames, generation, regions, sequences,
            targets, tokens or views. The result is that task's contract, in this order: `AlignedData`, `BagData`, `ChatData`,
            `DemonstrationData`, `DenseData`, `DialogData`, `EpisodeData`, `FederatedData`, `ClipData`, `GenerationData`,
            `RegionData`, `HistoryData`, `TargetData`, `TokenData`, `ImageData`. A source for aligned also serves generation,
            by its pictures and captions. Default: the source's first task.
        options: options of the source; they override those in `spec`.

    Raises CounterpointError for an unknown name or option, and for a missing or superfluous argument. Raises it too for a
    source that does not serve the task. Raises DataError for files that are missing or damaged.
    """
    name = spec.partition("?")[0].partition(":")[0]
    if name == "memory":
        from counterpoint.data.memory import load_memory

        return load_memory(spec, task)
    place, query = _place_and_query(spec)
    argument = place.partition(":")[2]
    if name not in SOURCES:
        if os.path.lexists(spec):
            ways = (f"{way}:{spec} ({what})" for way, what in PLACES.items())
            raise CounterpointError(f"'{spec}' is a path, not a data source; say how to read it: {', '.join(ways)}")
        raise unknown("data source", name, SOURCES)
    source = SOURCES[name]
    if source.argument and not argument:
        raise CounterpointError(f"data source '{name}' needs a path: --data {name}:{source.argument}")
    if task == "generation" and task not in source.tasks and "aligned" in source.tasks:  # of its pictures and captions
        from counterpoint.data.generation import of_aligned

        return of_aligned(load(spec, task="aligned", **options))
    if task is not None and task not in source.tasks:
        fit = ", ".join(other.name for other in SOURCES.values() if task in other.tasks)
        raise CounterpointError(
            f"data source '{name}' is for the task {' or '.join(source.tasks)}, not for {task}; "
            + (f"sources for that task: {fit}" if fit else "no source serves that task yet")
        )
    if argument and not source.argument and not source.may:
        raise CounterpointError(f"data source '{name}' takes no argument, got '{argument}'")
    loader = getattr(importlib.import_module(source.module), source.function)
    if task is not None and source.also:
        options["task"] = task
    return loader(argument or None, **(_options(name, query, loader) | options))


def _place_and_query(spec: str) -> tuple[str, str]:
    """Split a spec into `NAME:ARGUMENT` and the options that follow it.

    A question mark is part of the path where such a path exists, or where no `word=` follows it.
    """
    marks = [match.start() for match in re.finditer(r"\?", spec)]
    name, _, argument = spec.partition(":")
    if not marks or not argument or marks[0] < len(name):
        place, _, query = spec.partition("?")
        return place, query
    if os.path.lexists(argument):
        return spec, ""
    for at in reversed(marks):
        if os.path.lexists(spec[len(name) + 1 : at]):
            return spec[:at], spec[at + 1 :]
    at = next((at for at in reversed(marks) if re.match(r"\w+=", spec[at + 1 :])), marks[0])
    if not re.match(r"\w+=", spec[at + 1 :]) and glob.glob(argument):  # a pattern of its own
        return spec, ""
    return spec[:at], spec[at + 1 :]


def _options(name: str, query: str, loader: Any) -> dict[str, Any]:
    """Parse `key=value&...` as keyword arguments of `loader`, each as the type of its default."""
    known = {
        k: p.default
        for k, p in inspect.signature(loader).parameters.items()
        if p.kind is p.KEYWORD_ONLY and k != "task"
    }
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
