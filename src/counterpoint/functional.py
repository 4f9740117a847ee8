"""Offer every paper's functions in one flat namespace, loaded when first used.

>>> import counterpoint.functional as fn
>>> fn.info_nce.__module__
'counterpoint.core.contrast'

Where two systems give one name to different functions, the flat name raises. `of` returns each system's own function:

>>> fn.nt_xent
Traceback (most recent call last):
counterpoint.errors.CounterpointError: counterpoint.functional: two systems give the name nt_xent to different functions; \
write functional.of("audio-sheet-retrieval").nt_xent or functional.of("kd3").nt_xent
>>> fn.of("simclr").nt_xent.__module__
'counterpoint.core.nt_xent'
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from counterpoint import catalog
from counterpoint.errors import CounterpointError, unknown


def _places() -> dict[str, dict[str, str]]:
    """Map each function's name to the modules that define it, and each module to the first system that lists it."""
    found: dict[str, dict[str, str]] = {}
    for entry in catalog.entries().values():
        for place in entry.functions:
            module, _, name = place.partition(":")
            found.setdefault(name, {}).setdefault(module, entry.slug)
    return found


def __getattr__(name: str) -> Any:
    """Import and return a function. AttributeError for an unknown name, CounterpointError for a name of two functions."""
    if name.startswith("__"):
        raise AttributeError(name)
    places = _places()
    if name not in places:
        raise AttributeError(f"counterpoint.functional: {unknown('function', name, places)}")
    modules = places[name]
    if len(modules) > 1:
        # Not an AttributeError: `from counterpoint.functional import ...` would drop its message.
        ways = " or ".join(f'functional.of("{slug}").{name}' for slug in modules.values())
        count = {2: "two", 3: "three"}.get(len(modules), str(len(modules)))
        raise CounterpointError(
            f"counterpoint.functional: {count} systems give the name {name} to different functions; write {ways}"
        )
    value = getattr(importlib.import_module(next(iter(modules))), name)
    globals()[name] = value
    return value


def of(slug: str) -> SimpleNamespace:
    """Return the functions of one system by name.

    Args:
        slug: The system's name, as `counterpoint systems` lists it.

    Raises CounterpointError for an unknown system.
    """
    found = (place.partition(":")[::2] for place in catalog.get(slug).functions)
    return SimpleNamespace(**{name: getattr(importlib.import_module(module), name) for module, name in found})


def __dir__() -> list[str]:
    return sorted([*(name for name, modules in _places().items() if len(modules) == 1), "of"])
