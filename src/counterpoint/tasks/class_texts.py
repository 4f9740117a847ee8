"""Write texts of classes: prompt templates filled with names, which a user's file may replace or enrich."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted


def templates_of(setting: str) -> list[str]:
    """Return the prompt templates of a setting: one, several between "|", or those of a text file, one a line.

    Raises CounterpointError for a template without {}, DataError for a file that cannot be read.

    >>> templates_of("a photo of a {}|a drawing of a {}")
    ['a photo of a {}', 'a drawing of a {}']
    """
    found = [part.strip() for part in setting.split("|")]
    if "{}" not in setting and Path(setting).suffix:
        found = [line.strip() for line in _read(setting).splitlines()]
    found = [template for template in found if template]
    if not found or any("{}" not in template for template in found):
        raise CounterpointError(
            f"templates must hold {{}} for the name of a class, such as 'a photo of a {{}}'; got '{setting}'"
        )
    return found


def names_of(classes: Sequence[str], file: str = "") -> list[str]:
    """Return the names of classes in texts: underscores become spaces, and a file may name them otherwise.

    Args:
        classes: the data's names.
        file: JSON {class: name}, or a text file with a line for each class in the data's order. Default: none.

    Raises DataError for names that are missing, empty or doubled.

    >>> names_of(["polar_bear"])
    ['polar bear']
    """
    found = [name.replace("_", " ").strip() for name in classes]
    if file:
        found = _of_file(classes, file, "name")
    doubled = [name for name, count in Counter(found).items() if count > 1]
    if doubled:
        raise DataError(
            f"{file or 'the classes'}: two classes have the same name '{doubled[0]}', so no text tells them apart; name each "
            "class by --class-names FILE"
        )
    return found


def texts_of(
    classes: Sequence[str], templates: str = "a photo of a {}", class_names: str = "", descriptions: str = ""
) -> list[list[str]]:
    """Return the texts of each class: every template with its name and, where given, its description after " . ".

    Args:
        classes: the data's names.
        templates: see `templates_of`.
        class_names: file of names, see `names_of`; default: the data's names.
        descriptions: file of descriptions in the same form; default: none.

    >>> texts_of(["polar_bear"])
    [['a photo of a polar bear']]
    """
    names = names_of(classes, class_names)
    more = _of_file(classes, descriptions, "description") if descriptions else [""] * len(names)
    return [
        [template.replace("{}", name) + (f" . {said}" if said else "") for template in templates_of(templates)]
        for name, said in zip(names, more, strict=True)
    ]


def _of_file(classes: Sequence[str], file: str, what: str) -> list[str]:
    text = _read(file)
    if Path(file).suffix.lower() == ".json":
        try:
            given = json.loads(text)
        except ValueError as error:
            raise DataError(f"{file}: no JSON ({error})") from error
        if not isinstance(given, dict):
            raise DataError(f"{file}: needs an object, {{class: {what}}}")
        missing = [name for name in classes if not str(given.get(name, "")).strip()]
        if missing:
            raise DataError(f"{file}: has no {what} of {counted(len(missing), 'class')}, such as '{missing[0]}'")
        return [str(given[name]).strip() for name in classes]
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) != len(classes) or not all(lines):
        raise DataError(
            f"{file}: has {counted(len(lines), 'line')} for {counted(len(classes), 'class')}; write one {what} a line, none empty"
        )
    return lines


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
