"""Align, contrast and distil representations of any modality: published systems, each one readable file on one fast core.

    import counterpoint as cp

    cp.systems("*clip*")                                        the systems, by pattern: name, title, verdict of the claim
    cp.settings("simclr")                                       the settings of a system, with their defaults
    run = cp.train("simclr", data="digits", epochs=5)           train; a run with .metrics, .page, .encode(...)
    run = cp.load("runs/first")                                 a finished run, also "hf:user/name" or a folder of a hub
    z = run.encode(images=["a.png", "b.png"])                   embeddings [2, dim], numpy or torch
    cp.embed(run, "emb.parquet")                                the embeddings of a whole set, in one file
    cp.search(run, "a red arrow", "emb.parquet")                the items most similar to a text, a picture or a sound
    run.export("encoder.onnx")                                  the encoder for other programs, checked
    learner = cp.create("simclr", encoder="timm:resnet18", size=32)   an untrained nn.Module for your own loop
    cp.compare("simclr", "dcl", data="digits")                  paired differences on the same seeds, with intervals
    cp.register(SYSTEM)                                         a system of your own, known by its name
    cp.train("clip", data=frame)                                your own DataFrame, datasets.Dataset, torch Dataset, arrays

    cp.losses, cp.functional                                    each loss as a module, each paper's functions
    cp.data                                                     the data sources and their contracts

`help(cp.train)` explains a function, `print(cp.systems())` lists all systems, `counterpoint --help` shows the command line.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterpoint.catalog import register
    from counterpoint.errors import CounterpointError
    from counterpoint.face.creating import create
    from counterpoint.face.functions import compare, embed, load, own, resume, train
    from counterpoint.face.listing import settings
    from counterpoint.face.trained import Trained

__version__ = "0.1.0"

# Loaded when first used, so that importing this package imports no torch.
_PLACES = {
    **dict.fromkeys(("train", "resume", "load", "own", "compare", "embed"), "counterpoint.face.functions"),
    "create": "counterpoint.face.creating",
    "settings": "counterpoint.face.listing",
    "Trained": "counterpoint.face.trained",
    "register": "counterpoint.catalog",
    "CounterpointError": "counterpoint.errors",
}
# Packages; of these, `systems` and `search` are called like functions, too.
_ROOMS = ("data", "functional", "losses", "search", "systems")
__all__ = [
    "CounterpointError",
    "Trained",
    "compare",
    "create",
    "data",
    "embed",
    "functional",
    "load",
    "losses",
    "own",
    "register",
    "resume",
    "search",
    "settings",
    "systems",
    "train",
]


class Room(types.ModuleType):
    """A package that is called as the function of its name: `counterpoint.systems("*clip*")`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function of the package's name (see `counterpoint.face`)."""
        module = {"systems": "listing", "search": "functions"}[self.__name__.rpartition(".")[2]]
        function = getattr(importlib.import_module(f"counterpoint.face.{module}"), self.__name__.rpartition(".")[2])
        return function(*args, **options)


def __getattr__(name: str) -> Any:
    """Import and return a public name. Raise AttributeError with near matches for an unknown name."""
    if name in _ROOMS:
        return importlib.import_module(f"counterpoint.{name}")
    if name not in _PLACES:
        if name.startswith("_"):
            raise AttributeError(name)
        from counterpoint.errors import unknown

        raise AttributeError(f"counterpoint: {unknown('name', name, __all__)}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
