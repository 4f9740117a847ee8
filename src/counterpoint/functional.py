"""Every paper's functions and the classics in one flat namespace, loaded when first used.

>>> import counterpoint.functional as fn
>>> fn.info_nce.__module__
'counterpoint.core.contrast'
"""

from __future__ import annotations

import importlib
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


def __dir__() -> list[str]:
    return sorted(_places())
