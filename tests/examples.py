"""Run the examples of docstrings with every annotated shape and type checked; `test_examples.py` calls it.

python tests/examples.py counterpoint.core counterpoint.systems,counterpoint.views.images
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import sys

import torch
from jaxtyping import install_import_hook

# Before anything imports the package.
install_import_hook(["counterpoint.core", "counterpoint.systems", "counterpoint.views.images"], "typechecker.check")

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules(names: list[str]) -> list[str]:
    """Name the modules of these packages, or the modules themselves, in order."""
    found = []
    for name in names:
        module = importlib.import_module(name)
        found.append(name)
        if hasattr(module, "__path__"):
            found += [row.name for row in pkgutil.walk_packages(module.__path__, f"{name}.")]
    return found


def cases(rooms: list[str]) -> int:
    """Call each public function of these rooms with the valid arguments of the table; return how many there were."""
    from function_cases import CASES
    from test_functional import arguments, function_of

    chosen = [place for place in CASES if place.startswith(tuple(rooms))]
    for place in chosen:
        for dtype in (torch.float32, torch.float64):
            function_of(place)(*arguments(CASES[place], 4, dtype))
    return len(chosen)


def main(rooms: list[str]) -> int:
    """Run the examples of each group of rooms, whose names commas join. Return the number that failed.

    For each group, a line that begins with its name gives the numbers of examples and of functions called.
    """
    failed = 0
    for group in rooms:
        names, tried = group.split(","), 0
        for name in modules(names):
            result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS, extraglobs={"torch": torch})
            failed, tried = failed + result.failed, tried + result.attempted
        print(f"{group}: {tried} examples, {cases(names)} functions called")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 99))
