"""Join repeated options that take several values: `--prompt A --prompt B` means `--prompt A B`.

Without this, the last repeat would replace the others. Of an option with one value, the last repeat counts, as usual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints


def joined(command: Any, words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the values of each repeated list option together, at the end.

    Args:
        command: The function or dataclass whose arguments are the options.
        words: The words that follow the command's name. Those after "--" stay as they are.
    """
    end = words.index("--") if "--" in words else len(words)
    times = Counter(name for name, _ in map(_option, words[:end]) if name)
    if max(times.values(), default=0) < 2:
        return list(words)
    several = {name for name in _lists(command) if times[name] > 1}
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    current = rest
    for word in words[:end]:
        name, value = _option(word)
        if name in several:
            found = values.setdefault(name, [])
            found += value
            current = rest if value else found  # after --prompt=A, a further word is no value
        else:
            current = rest if name else current
            current.append(word)
    return [*rest, *(word for name, found in values.items() for word in (f"--{name}", *found)), *words[end:]]


def _option(word: str) -> tuple[str, list[str]]:
    """Return an option's name, with hyphens, and the value after its "="; the name of other words is empty."""
    if not word.startswith("--"):
        return "", []
    name, sign, value = word[2:].partition("=")
    return name.replace("_", "-"), [value] if sign else []


def _lists(command: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of the options that take any number of values."""
    for field, kind in get_type_hints(command, include_extras=True).items():
        marks: list[Any] = []
        while get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            marks += more
        named = next((mark.name for mark in marks if getattr(mark, "name", None)), field.strip("_"))
        name = f"{prefix}{named.replace('_', '-')}"
        if is_dataclass(kind):
            yield from _lists(kind, prefix if "OmitArgPrefixes" in map(str, marks) else f"{name}.")
        elif any(map(_many, (kind, *get_args(kind)))):
            yield name


def _many(kind: Any) -> bool:
    """Tell whether values of this type come from any number of words."""
    return get_origin(kind) in (list, set, dict) or (get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis)
