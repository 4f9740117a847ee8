"""Assign roles to the columns of a table: modalities, label, split, id, by their names or by the user's options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from counterpoint.errors import CounterpointError, DataError, unknown

# A column's kind by a word of its name; the first kind that fits is used.
KINDS: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "text": ("text", "txt", "caption", "captions", "title", "description", "sentence", "transcript"),
    "audio": ("audio", "sound", "wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "speech"),
    "video": ("video", "mp4", "clip", "movie", "mov", "avi", "mkv", "webm"),
    "vector": ("vector", "embedding", "embeddings", "features", "feature", "npy", "sensor"),
}
WHOLE = {  # words that must be the whole name
    "label": ("label", "labels", "class", "cls", "category", "target"),
    "split": ("split",),
    "id": ("id", "item_id"),
    "domain": ("domain", "phase"),
    "target": (),  # a number to predict: only if the user names it
}
# Endings of names, such as `image_id` or `audio_rate`, that describe a modality and are not the modality.
ABOUT = ("id", "ids", "url", "width", "height", "size", "length", "len", "rate", "count", "hash", "seconds", "duration")
# Names that torch's ModuleDict reserves.
TAKEN = frozenset(
    ("keys", "values", "items", "pop", "clear", "update", "train", "eval", "type", "float", "half", "double")
)
# Usual names in sources with one picture and at most one text in each row, in the order of search.
IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_path", "file_name", "filename", "path", "file")
TEXT = ("caption", "text", "txt", "title", "description", "sentence", "captions")
LABEL = ("label", "labels", "class", "cls", "category", "target", "fine_label")
TARGET = ("target", "age", "score", "rating", "value", "y", "label")


@dataclass
class Role:
    """One modality: its name, the columns that it is read from, and its kind from `KINDS`.

    Several columns are alternatives: of each row, the first cell that is not empty is used.
    """

    name: str
    columns: list[str]
    kind: str

    @property
    def column(self) -> str:
        """The name of its columns for messages."""
        return " or ".join(self.columns)


@dataclass
class Roles:
    """The roles of a table's columns."""

    modalities: list[Role]
    label: str = ""
    domain: str = ""
    split: str = ""
    id: str = ""
    target: str = ""  # a column of numbers to predict
    guessed: str = ""  # roles that were guessed by names, for a note; empty where the user named all

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        names = [name for role in self.modalities for name in role.columns]
        return list(dict.fromkeys(filter(None, [*names, self.label, self.domain, self.target, self.split, self.id])))


def known_by_name(name: str, usual: Mapping[str, str]) -> str:
    """Return the role of a column by its name; empty where the name implies no role.

    Args:
        name: Name of the column.
        usual: Roles that are known without names, by column.
    """
    if name in usual:
        return usual[name]
    lower = name.lower().removeprefix("json.")
    for role, names in WHOLE.items():
        if lower in names:
            return role
    words = [word for word in re.split(r"[^a-z0-9]+", lower) if word]
    if not words or words[-1] in ABOUT:
        return ""
    for word in (words[-1], words[0]):  # `image_embedding` is a vector, `image_left` an image
        for kind, names in KINDS.items():
            if word in names or word.rstrip("0123456789") in names:  # mp4, but image2
                return kind
    return ""


def said_columns(place: str, names: Sequence[str], columns: str) -> dict[str, str]:
    """Parse the option `columns`, NAME:KIND separated by commas. Return the kind of each column.

    Raises CounterpointError for an invalid list, DataError for a column that the table lacks.
    """
    said: dict[str, str] = {}
    for part in filter(None, columns.split(",")):
        name, colon, kind = part.rpartition(":")
        if not colon or not name:
            raise CounterpointError(
                f"columns={columns}: '{part}' is not NAME:KIND (kinds: {', '.join([*KINDS, *WHOLE])})"
            )
        if kind not in KINDS and kind not in WHOLE:
            raise unknown(f"kind of the column '{name}'", kind, [*KINDS, *WHOLE])
        if name not in names and name.partition(".")[0] not in names:
            raise DataError(f"{place}: no column '{name}'; it has {some_names(names)}")
        said[name] = kind
    return said


def manifest_roles(place: str, names: Sequence[str], usual: Mapping[str, str], columns: str, least: int = 2) -> Roles:
    """Return the roles of a manifest's columns, from the option `columns`, else by their names.

    Args:
        place: The place, for messages.
        names: Names of all columns.
        usual: Roles that are known without names.
        columns: The option. Empty: by the columns' names.
        least: Minimum number of modalities, 1 or 2 (a video counts as two).

    Raises DataError for fewer modalities, CounterpointError for invalid options.
    """
    said = said_columns(place, names, columns)
    found = said or {name: role for name in names if (role := known_by_name(name, usual))}
    if not said:
        have = {role for name, role in found.items() if not name.startswith("json.")}
        # A record beside an archive's members usually repeats their content.
        found = {name: role for name, role in found.items() if not (name.startswith("json.") and role in have)}
    roles = Roles([])
    for name, role in sorted(found.items(), key=lambda pair: names.index(pair[0]) if pair[0] in names else len(names)):
        if role in KINDS:
            roles.modalities.append(Role(modality_name(name, [m.name for m in roles.modalities]), [name], role))
        elif getattr(roles, role) and said:
            raise CounterpointError(f"columns names two columns as {role}: '{getattr(roles, role)}' and '{name}'")
        elif not getattr(roles, role):
            setattr(roles, role, name)
    kinds = [role.kind for role in roles.modalities]
    if len(kinds) < least and kinds != ["video"]:
        has = f"only '{roles.modalities[0].column}'" if kinds else "none"
        raise DataError(
            f"{place}: needs at least {('one column that is a modality', 'two columns that are modalities')[least - 1]}, and "
            f"has {has} among {some_names(names)}; name "
            f"them with ?columns=NAME:KIND,NAME:KIND (kinds: {', '.join(KINDS)})"
        )
    if not said and any(name not in usual for name in roles.columns):
        roles.guessed = _guess([*((m.column, m.kind) for m in roles.modalities), *_others(roles)])
        roles.guessed += "; ?columns=NAME:KIND,... names others"
    return roles


def image_roles(
    place: str,
    names: Sequence[str],
    usual: Mapping[str, str],
    image: str,
    label: str,
    text: str,
    domain: str = "",
    *,
    pairs: bool,
) -> Roles:
    """Return the roles of the columns of a source with one picture in each row.

    Args:
        place: The place, for messages.
        names: Names of all columns.
        usual: Roles that are known without names.
        image, label, text: The user's options. Empty: columns with usual names.
        domain: The user's option. Empty: no domains.
        pairs: Require a text beside the picture.

    Raises DataError when a column is missing.
    """
    picture = _column(place, names, usual, image, IMAGE, "image")
    roles = Roles([Role("image", picture, "image")])
    if pairs:
        roles.modalities.append(Role("text", _column(place, names, usual, text, TEXT, "text")[:1], "text"))
    roles.label = next(iter(_column(place, names, usual, label, LABEL, "label", needed=bool(label))), "")
    if domain:
        (roles.domain,) = _column(place, names, usual, domain, (), "domain")
    taken = roles.columns
    roles.split = next((n for n in names if known_by_name(n, usual) == "split" and n not in taken), "")
    roles.id = next((n for n in names if known_by_name(n, usual) == "id" and n not in taken), "")
    given = [("image", image, picture), ("label", label, [roles.label]), ("text", text, [])]
    if pairs:
        given[2] = ("text", text, roles.modalities[1].columns)
    guessed = [
        (column, what)
        for what, said, found in given
        for column in found
        if not said and column and usual.get(column) != what
    ]
    if guessed or any(name not in usual for _, name in _others(roles, label=False)):
        roles.guessed = _guess([*guessed, *_others(roles, label=False, usual=usual)])
        roles.guessed = roles.guessed and f"{roles.guessed}; ?image=, ?label= and ?text= name others"
    return roles


def target_roles(
    place: str, names: Sequence[str], usual: Mapping[str, str], image: str, series: str, columns: str, target: str
) -> Roles:
    """Return the roles of the columns of a source with a real-valued target.

    The inputs are the picture, else the series, else all other columns, which then hold one number each.

    Args:
        place: The place, for messages.
        names: Names of all columns.
        usual: Roles that are known without names.
        image: The user's option. Empty: a column with a usual name, if `series` and `columns` are empty too.
        series: Column of lists of numbers. Empty: a column that is named as vectors are, if the others are empty too.
        columns: Columns of numbers, joined by commas.
        target: Column of numbers to predict. Empty: a column with a usual name.

    Raises DataError for a missing column, CounterpointError for more than one of image, series and columns.
    """
    if sum(map(bool, (image, series, columns))) > 1:
        raise CounterpointError(f"{place}: name the inputs by one of image=, series= and columns=, not by several")
    (found, *_) = _column(place, names, usual, target, TARGET, "target")
    split, id = (
        next((n for n in names if known_by_name(n, usual) == role and n != found), "") for role in ("split", "id")
    )
    others = [name for name in names if name not in (found, split, id)]
    pictures = _column(place, others, usual, image, IMAGE, "image", needed=bool(image))
    vectors = [name for name in others if known_by_name(name, usual) == "vector"]
    if pictures and not series and not columns:
        role = Role("image", pictures, "image")
    elif series or (vectors and not columns):
        role = Role("series", _column(place, others, usual, series, vectors, "series")[:1], "vector")
    else:
        chosen = [name.strip() for name in columns.split(",") if name.strip()] or others
        for name in chosen:
            if name not in others:
                raise DataError(f"{place}: no column of inputs '{name}'; it has {some_names(others)}")
        if not chosen:
            raise DataError(f"{place}: no column beside the target '{found}' to predict it from")
        role = Role("table", chosen, "numbers")
    roles = Roles([role], target=found, split=split, id=id)
    guessed = [(name, "target") for name in ([] if target else [found])]
    guessed += [(name, role.name) for name in role.columns if not (image or series or columns)][:10]
    roles.guessed = _guess([*guessed, *_others(roles, label=False, usual=usual)])
    roles.guessed = roles.guessed and f"{roles.guessed}; ?target=, ?image=, ?series= and ?columns= name others"
    return roles


def _others(roles: Roles, *, label: bool = True, usual: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    wanted = ("label", "split", "id") if label else ("split", "id")
    found = [(getattr(roles, role), role) for role in wanted]
    return [(name, role) for name, role in found if name and name not in (usual or {})]


def _guess(pairs: Sequence[tuple[str, str]]) -> str:
    said = ", ".join(f"'{column}' as {role}" for column, role in pairs)
    return f"columns are taken by their names: {said}" if said else ""


def _column(
    place: str,
    names: Sequence[str],
    usual: Mapping[str, str],
    named: str,
    wanted: Sequence[str],
    what: str,
    *,
    needed: bool = True,
) -> list[str]:
    """Return the column `named`, else the columns known as `what`, else those with usual names, in their order."""
    if named:
        if named not in names and named.partition(".")[0] not in names:
            raise DataError(f"{place}: no column '{named}'; it has {some_names(names)}. Name one with ?{what}=COLUMN")
        return [named]
    lower = {name.lower(): name for name in reversed(names)}
    found = [name for name, role in usual.items() if role == what and name in names]
    found += [lower[name] for name in wanted if name in lower and lower[name] not in found]
    if not found:  # in archives, a record beside the picture may have it
        found = [lower[f"json.{name}"] for name in wanted if f"json.{name}" in lower]
    if not found and needed:
        raise DataError(f"{place}: no {what} column among {some_names(names)}; name it with ?{what}=COLUMN")
    return found


def some_names(names: Sequence[str]) -> str:
    """Return the first ten names as text, with the number of further names."""
    more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
    return ", ".join([*names[:10], *more])


def modality_name(column: str, used: Sequence[str]) -> str:
    """Return a name for a column's modality that is valid for modules and metrics."""
    name = re.sub(r"\W+", "_", column.removeprefix("json.")).strip("_") or "column"
    name = f"{name}_" if name in TAKEN else name
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(used) + 3))) if n not in used)
