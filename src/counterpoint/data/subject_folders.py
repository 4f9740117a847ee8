"""`subjects:FOLDER`: your own subjects, a folder of pictures for each.

    FOLDER/teapot/1.jpg, 2.jpg, ..., captions.jsonl
    FOLDER/clock/...

A line of the optional captions.jsonl is {"file_name": "1.jpg", "text": "a subject on a table"}. A caption calls the subject
"subject". A picture without a caption has this word alone. Whole subjects are held out for the valid and the test split.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.generation import PLACEHOLDER, GenerationData, GenerationSplit
from counterpoint.data.images import ArrayImages, Pixels, checked_size, decode, split_positions
from counterpoint.data.valid import SHARE, carve, checked_share
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CAPTIONS = "captions.jsonl"


def load(place: str, *, size: int = 32, valid: float = SHARE, test: float = 0.2) -> GenerationData:
    """Read the subjects.

    Args:
        place: the folder of folders.
        size: height and width of the pictures in pixels, even; they are cut to squares.
        valid: share of the subjects outside the test split that form the valid split, between 0 and 1.
        test: share of the subjects in the test split, between 0 and 1.

    Pictures that cannot be read are left out and counted. Raises DataError for fewer than 4 subjects, a subject with
    equal pictures, and captions that do not fit.
    """
    checked_size(size)
    checked_share("subjects", valid)
    root = Path(place)
    if not root.is_dir():
        raise DataError(f"{place}: is not a folder; name one with a folder of pictures for each subject")
    accounts = Accounts(place, str(size))
    names: list[str] = []
    pictures: list[Pixels] = []
    captions: list[str] = []
    subjects: list[int] = []
    plain = 0
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        given = _captions(folder)
        files = picture_files(folder)
        accounts.find("pictures", len(files))
        found: list[tuple[Path, Pixels]] = []
        for path in files:
            try:
                found.append((path, decode(path, size)))
            except DataError as error:
                accounts.leave(Line(str(path), None, str(error), unit="pictures"))
        need_different(found)
        if not found:
            continue
        for path, pixels in found:
            text = given.get(path.name)
            plain += text is None
            captions.append(PLACEHOLDER if text is None else text)
            pictures.append(pixels)
            subjects.append(len(names))
        names.append(folder.name)
    accounts.read("pictures", len(pictures))
    accounts.check()
    accounts.write()
    if len(names) < 4:
        raise DataError(
            f"{place}: has {counted(len(names), 'subject')} with a picture that can be read, and needs 4: a folder for each"
        )
    kinds, stack = np.array(subjects), np.stack(pictures)
    rest, held = split_positions(len(kinds), test, together=kinds)
    train, watched = carve("subjects", rest, valid, together=kinds[rest])
    one, two, three = (
        GenerationSplit(ArrayImages(stack[rows]), [captions[row] for row in rows], subjects=kinds[rows])
        for rows in (train, watched, held)
    )
    notes = (
        [
            f"{place}: {plain} of {counted(len(kinds), 'picture has', 'pictures have')} no caption in {CAPTIONS}; theirs is "
            f"'{PLACEHOLDER}'"
        ]
        if plain
        else []
    )
    return GenerationData(
        f"subjects:{place}", one, two, three, size, subjects=tuple(names), notes=[*accounts.notes(), *notes]
    )


def picture_files(folder: Path) -> list[Path]:
    """List the pictures of a folder, in the order of their names."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")
    )


def need_different(found: list[tuple[Path, Pixels]]) -> None:
    """Raise DataError where two pictures of a subject are equal: contrast needs different frames."""
    seen: dict[bytes, Path] = {}
    for path, pixels in found:
        other = seen.setdefault(pixels.tobytes(), path)
        if other is not path:
            raise DataError(f"{path} and {other.name} are the same picture of a subject; leave one of them out")


def read_subject(folder: Path | str, size: int) -> list[Pixels]:
    """Read the reference pictures of one subject, for `counterpoint generate --subject`.

    Raises CounterpointError for a path that is no folder and for a folder without a picture. Raises it too for a picture that
    cannot be read.
    """
    place = Path(folder)
    if not place.is_dir():
        raise CounterpointError(f"--subject {place} is not a folder; name a folder of pictures of one subject")
    files = picture_files(place)
    if not files:
        raise CounterpointError(f"--subject {place} has no picture; put in one or more of {', '.join(PICTURES)}")
    found = []
    for path in files:
        try:
            found.append(decode(path, size))
        except DataError as error:
            raise CounterpointError(f"{path}: {error}; mend the picture or take it out of the folder") from error
    return found


def _captions(folder: Path) -> dict[str, str]:
    """Read the captions of a subject's folder. DataError names the line that does not fit."""
    path, found = folder / CAPTIONS, {}
    if not path.is_file():
        return {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name, text = record["file_name"], record["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f'{path}: line {number} is not {{"file_name": ..., "text": ...}}; mend the line') from error
        if not isinstance(name, str) or not (folder / name).is_file():
            raise DataError(
                f"{path}: line {number} names the picture {name}, which is not in the folder; mend the name"
            )
        if not isinstance(text, str) or PLACEHOLDER not in text.lower().split():
            raise DataError(f"{path}: line {number} does not name the subject; write '{PLACEHOLDER}' for it")
        found[name] = text
    return found
