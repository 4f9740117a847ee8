"""Check settings: each check raises an error that names the setting and its value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from counterpoint.errors import CounterpointError, unknown


class CheckedSettings:
    """Base of a dataclass of settings, whose `__post_init__` calls these checks.

    Attributes:
        late: Settings that count first epochs without a part of the method. Each has the name of that part, and the number of
            epochs that are added to the setting.
    """

    late: ClassVar[Mapping[str, tuple[str, int]]] = {}

    def need_sound_values(self) -> None:
        """Raise CounterpointError for the first setting with a number that is NaN or infinite, or with an unknown word.

        A word is known when the annotation of the setting has it, a `Literal` or a tuple of such words.
        """
        kind: Any = type(self)
        for field in fields(kind):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple | list) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise CounterpointError(f"{field.name} must be finite, got {number}")
        for name, known in _words(kind).items():
            value = getattr(self, name)
            for word in value if isinstance(value, tuple | list) else (value,):
                if word not in known:
                    raise unknown(name, str(word), map(str, known))

    def need_positive(self, *names: str) -> None:
        """Raise CounterpointError for the first of these settings that is not > 0, or not finite."""
        for name in names:
            if not getattr(self, name) > 0:
                raise CounterpointError(f"{name} must be > 0, got {getattr(self, name)}")
            if getattr(self, name) == math.inf:
                raise CounterpointError(f"{name} must be finite, got {getattr(self, name)}")

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

    def need_below_one(self, *names: str) -> None:
        """Raise CounterpointError for the first of these settings outside 0..1, 1 not included."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise CounterpointError(f"{name} must lie in 0..1, 1 not included, got {getattr(self, name)}")

    def need_weight(self, *names: str) -> None:
        """Raise CounterpointError for the first of these settings that is negative or not finite."""
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise CounterpointError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


def fitted(config: Any, name: str, value: Any) -> Any:
    """Return a value as the setting's annotation has it: a list as a tuple, a whole float as an int.

    Args:
        config: The settings: a dataclass, or its type.
        name: The setting's name.
        value: A value given by name, in Python, in YAML or in a claim.

    Raises CounterpointError for a number where the setting has words, and so on. Annotations besides bool, int, float, str,
    tuples and None of these are not checked.
    """
    kind = _types(config if isinstance(config, type) else type(config)).get(name, Any)
    found = _as(value, kind)
    if found is UNFIT:
        raise CounterpointError(f"{name} takes {_said(kind)}, got {value!r}")
    return found


UNFIT: Any = object()  # no value of a setting


def _as(value: Any, kind: Any) -> Any:
    """Return the value as the annotation has it; UNFIT where it does not fit."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return next((found for one in inner if (found := _as(value, one)) is not UNFIT), UNFIT)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return UNFIT
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        parts = tuple(map(_as, value, kinds))
        return UNFIT if len(kinds) != len(value) or any(part is UNFIT for part in parts) else parts
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real):
            return UNFIT
        whole = isinstance(value, Integral) or float(value).is_integer()
        number: Any = value
        return number if kind is float else int(number) if whole else UNFIT
    plain: dict[Any, Any] = {bool: bool, str: (str, PurePath), NoneType: NoneType}
    return value if kind not in plain or isinstance(value, plain[kind]) else UNFIT


def _said(kind: Any) -> str:
    """Return the words of a message for an annotation."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", NoneType: "none"}
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_said, inner))
    if origin is tuple:
        return f"a list of {_said(inner[0]).removeprefix('a ')}s" if inner[1:] == (...,) else f"a list of {len(inner)}"
    return words.get(kind, "another value")


@cache
def _types(config: Any) -> dict[str, Any]:
    """Return the annotation of each setting."""
    return get_type_hints(config)


@cache
def _words(config: Any) -> dict[str, tuple[Any, ...]]:
    """Return the values of each setting that is annotated as `Literal`, or as a tuple of such words."""
    types = _types(config)
    kinds = {field.name: types[field.name] for field in fields(config)}
    kinds = {name: get_args(kind)[0] if get_origin(kind) is tuple else kind for name, kind in kinds.items()}
    return {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}
