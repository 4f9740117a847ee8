"""Check settings: each check raises an error that names the setting and its value."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from counterpoint.errors import CounterpointError, unknown


class CheckedSettings:
    """Base of a dataclass of settings, whose `__post_init__` calls these checks."""

    def need_known_words(self) -> None:
        """Raise CounterpointError for the first setting annotated as `Literal` with a value that is not in the annotation."""
        kind: Any = type(self)
        for name, known in _words(kind).items():
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), map(str, known))

    def need_positive(self, *names: str) -> None:
        """Raise CounterpointError for the first of these settings that is not > 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise CounterpointError(f"{name} must be > 0, got {getattr(self, name)}")

    def need_count(self, *names: str) -> None:
        """Raise CounterpointError for the first of these settings that is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise CounterpointError(f"{name} must be at least 1, got {getattr(self, name)}")

    def need_share(self, *names: str) -> None:
        """Raise CounterpointError for the first of these settings outside 0..1."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise CounterpointError(f"{name} must lie in 0..1, got {getattr(self, name)}")

    def need_weight(self, *names: str) -> None:
        """Raise CounterpointError for the first of these settings that is negative or not finite."""
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise CounterpointError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


@cache
def _words(config: type[Any]) -> dict[str, tuple[Any, ...]]:
    """Return the values of each setting that is annotated as `Literal`."""
    types = get_type_hints(config)
    return {
        field.name: get_args(types[field.name]) for field in fields(config) if get_origin(types[field.name]) is Literal
    }
