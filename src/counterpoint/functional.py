"""Every paper's functions and the classics in one flat namespace, loaded when first used.

>>> import counterpoint.functional as fn
>>> fn.info_nce.__module__
'counterpoint.core.contrast'

Where papers give one name to different things, the flat name is the classic baseline's, or that of the system the
catalogue lists last; `of` gives each system's own:

>>> fn.of("audio-sheet-retrieval").nt_xent is fn.nt_xent   # its rows are unit already, SimCLR's function makes them so
False
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from counterpoint import catalog
from counterpoint.errors import unknown


def _places() -> dict[str, str]:
    return {
        place.partition(":")[2]: place.partition(":")[0]
        for entry in catalog.entries().values()
        for place in entry.functions
    }


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    places = _places()
    if name not in places:
        raise AttributeError(f"counterpoint.functional: {unknown('function', name, places)}")
    value = getattr(importlib.import_module(places[name]), name)
    globals()[name] = value
    return value


def of(slug: str) -> SimpleNamespace:
    """The functions of one system, by the names its paper's card has; CounterpointError for an unknown system."""
    found = (place.partition(":")[::2] for place in catalog.get(slug).functions)
    return SimpleNamespace(**{name: getattr(importlib.import_module(module), name) for module, name in found})


def __dir__() -> list[str]:
    return sorted([*_places(), "of"])
