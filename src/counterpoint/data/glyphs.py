"""`glyphs`: named icons in 14 drawing styles, drawn from the fonts of the `qtawesome` package.

An icon gives a picture (dark on white, centred) and a caption, its name in words: "account arrow left outline". It belongs to a
drawing style. The task `aligned` takes pictures and captions. There the styles are domains, and the classes are subjects: the
first words that many names share ("arrow", "file"; -1 for a rare one). For the task `views` the classes are the styles.

Font Awesome 6, Elusive, Material Design Icons 6, Phosphor, Remix and Codicons give 16,930 icons in 14 styles. The older
editions are Font Awesome 5 and Material Design Icons 5, with 7,563 more icons. They repeat mostly the same pictures, and are
left out unless `styles` names them. Where a font has two names for a drawing, the first counts.

The splits are by name: "home", "home-outline" and "home-bold" are one name in every font, and are never in two splits. In every
style a caption occurs once, but several styles may draw the same caption. So a retrieval measure should count every item with
the query's words as correct. `held_out` keeps styles out of training and test. Their icons, of names that are not in
training, become another split, `shifts["held-out"]`.

The package must be installed, but is never imported (it needs Qt). Install it with `pip install 'counterpoint[glyphs]'` or
`pip install --no-deps qtawesome`. Licences:

    SIL OFL 1.1    Font Awesome (icons of the free fonts), Elusive
    Apache-2.0     Material Design Icons, Remix
    MIT            Phosphor
    CC BY 4.0      Codicons

Icons of brands are their owners' trademarks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL import __version__ as pillow

from counterpoint.data import cached
from counterpoint.data.images import ArrayImages, ImageData, Indices, checked_size
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE, checked_share
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.waiting import patient_track
from counterpoint.words import counted

VERSION = 2  # of the drawing: increase it with every change, or stale caches are read
SUBJECTS = 50  # classes of the task `aligned`
# Words at a name's end that describe the drawing, not its subject.
MANNERS = ("bold", "fill", "filled", "light", "line", "outline", "outlined", "thin", "alt", "variant", "o")


@dataclass(frozen=True)
class _Font:
    """A font file of the package. An icon's style is `suffixes[last word of its name]` where there is one, else `style`."""

    file: str
    style: str
    suffixes: tuple[tuple[str, str], ...] = ()


FONTS = {
    "fa6": (
        _Font("fontawesome6-regular-webfont", "fa6-regular"),
        _Font("fontawesome6-solid-webfont", "fa6-solid"),
        _Font("fontawesome6-brands-webfont", "fa6-brands"),
    ),
    "elusive": (_Font("elusiveicons-webfont", "elusive"),),
    "mdi6": (_Font("materialdesignicons6-webfont", "mdi6", (("outline", "mdi6-outline"),)),),
    "phosphor": (
        _Font(
            "phosphor",
            "phosphor-regular",
            tuple((weight, f"phosphor-{weight}") for weight in ("thin", "light", "bold", "fill")),
        ),
    ),
    "remix": (_Font("remixicon", "remix-line", (("fill", "remix-fill"),)),),
    "codicon": (_Font("codicon", "codicon"),),
    "fa5": (
        _Font("fontawesome5-regular-webfont", "fa5-regular"),
        _Font("fontawesome5-solid-webfont", "fa5-solid"),
        _Font("fontawesome5-brands-webfont", "fa5-brands"),
    ),
    "mdi5": (_Font("materialdesignicons5-webfont", "mdi5", (("outline", "mdi5-outline"),)),),
}
OLDER = ("fa5", "mdi5")
STYLES = tuple(
    style
    for fonts in FONTS.values()
    for font in fonts
    for style in (font.style, *(style for _, style in font.suffixes))
)


def load(
    argument: None = None,
    *,
    task: str = "aligned",
    size: int = 64,
    train: int = 0,
    valid: float = SHARE,
    test: int = 2000,
    styles: str = "",
    held_out: str = "",
) -> AlignedData | ImageData:
    """Open the set; draw the icons that are not in the cache (a few seconds).

    Args:
        argument: not used; sources share a signature.
        task: "aligned" for pictures and captions, "views" for pictures and styles.
        size: height and width of a picture in pixels, 8 to 4096.
        train: number of training icons; 0 for all that remain.
        valid: share of the icons outside the test split that form the valid split, between 0 and 1, rounded up to whole
            names.
        test: number of test icons, at least 1.
        styles: styles or fonts, separated by commas ("phosphor,fa6-solid"). Default: all but the older editions.
        held_out: styles or fonts to keep out of training and test, for `shifts["held-out"]`. Default: none.

    Raises CounterpointError when qtawesome is not installed, a style is unknown or there are too few icons.
    """
    return _opened(task, size, train, checked_share("glyphs", valid), test, styles, held_out)


def undivided(size: int, test: int) -> AlignedData:
    """Open the set as `load` does for the task aligned, but with the valid icons in the training split.

    Args:
        size: height and width of a picture in pixels.
        test: number of test icons.
    """
    found = _opened("aligned", size, 0, 0.0, test, "", "")
    assert isinstance(found, AlignedData)
    return found


def _opened(
    task: str, size: int, train: int, valid: float, test: int, styles: str, held_out: str
) -> AlignedData | ImageData:
    """Open the set as `load` does; the valid split may be empty (`valid` 0)."""
    checked_size(size)
    if train < 0 or test < 1:
        raise CounterpointError(f"glyphs needs train >= 0 and test >= 1, got {train} and {test}")
    wanted, kept_out = _styles(styles, "styles"), _styles(held_out, "held_out") if held_out else ()
    shown = tuple(style for style in wanted if style not in kept_out)
    if not shown:
        raise CounterpointError("glyphs: held_out leaves no style to train on; name fewer styles in it")
    icons, grey = drawn_icons(tuple(style for style in STYLES if style in (*shown, *kept_out)), size)
    first = _first_drawings(grey, np.array([icon.style not in shown for icon in icons]))
    repeated = len(icons) - len(first)
    icons, grey = [icons[i] for i in first], grey[first]

    keys = [name_key(icon.name) for icon in icons]
    seen_style = np.array([icon.style in shown for icon in icons])
    order = np.array([_hash(key) for key in keys])
    turn = np.array([_hash(f"{icon.style}/{icon.name}") for icon in icons])
    pool = np.flatnonzero(seen_style)
    # Test names come in the order of their hash until the test split is full; its last name may have more icons than fit.
    pool = pool[np.lexsort((turn[pool], order[pool]))]
    if test >= len(pool):
        raise CounterpointError(
            f"glyphs has {counted(len(pool), 'icon')} in these styles; test={test} leaves none to train on; set a smaller test"
        )
    in_test = set(np.array(keys)[pool[:test]])
    rest = np.array([i for i in pool if keys[i] not in in_test], np.int64)
    # Valid names are the next ones in the same order, each with all its icons.
    in_valid = {keys[i] for i in rest[: math.ceil(valid * len(rest))]}
    # The classes come from the training icons of a set without a valid split: they must not depend on `valid`.
    known = rest[np.argsort(turn[rest], kind="stable")][: train or None]
    watched = np.array([i for i in rest if keys[i] in in_valid], np.int64)
    rest = np.array([i for i in rest if keys[i] not in in_valid], np.int64)
    if train > len(rest) or not len(rest):
        raise CounterpointError(
            f"glyphs has {counted(len(rest), 'icon')} to train on in these styles, got train={train}"
        )
    rest = rest[np.argsort(turn[rest], kind="stable")][: train or None]
    in_train = {keys[i] for i in rest}
    parts = {
        "train": np.sort(rest),
        "valid": np.sort(watched),
        "test": np.sort(pool[:test]),
        "held-out": np.array([i for i in np.flatnonzero(~seen_style) if keys[i] not in in_train | in_valid], np.int64),
    }
    notes = [] if not train else [f"glyphs: the training split is {train} of the available icons"]
    if repeated:
        notes.append(
            f"glyphs: {counted(repeated, 'icon is', 'icons are')} left out, because they repeat a drawing under another name or "
            "style"
        )
    shifts = ("held-out",) if len(parts["held-out"]) else ()
    names = tuple(style for style in STYLES if style in (*shown, *kept_out))
    style_of = np.array([names.index(icon.style) for icon in icons], np.int64)
    pictures = {part: ArrayImages(grey[where], style_of[where]) for part, where in parts.items()}
    if task == "views":
        return ImageData(
            name="glyphs",
            train=pictures["train"],
            valid=pictures["valid"],
            test=pictures["test"],
            classes=names,
            size=size,
            notes=notes,
            shifts={part: pictures[part] for part in shifts},
        )

    firsts = [icon.name.partition("-")[0] for icon in icons]
    counts = Counter(firsts[i] for i in known if len(firsts[i]) > 1 and not firsts[i].isdigit())
    subjects = tuple(sorted(word for word, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:SUBJECTS]))
    number = {word: n for n, word in enumerate(subjects)}
    subject_of = np.array([number.get(word, -1) for word in firsts], np.int64)

    def columns(part: str) -> AlignedColumns:
        where: Indices = parts[part]
        captions = [icons[i].name.replace("-", " ") for i in where]
        return AlignedColumns(
            {"image": pictures[part], "text": captions}, labels=subject_of[where], domains=style_of[where]
        )

    return AlignedData(
        name="glyphs",
        train=columns("train"),
        valid=columns("valid"),
        test=columns("test"),
        modalities={"image": Modality("image", size=size), "text": Modality("text")},
        classes=subjects,
        notes=notes,
        domains=names,
        shifts={part: columns(part) for part in shifts},
    )


def _first_drawings(grey: NDArray[np.uint8], last: NDArray[np.bool_]) -> Indices:
    """Return positions of the distinct drawings, in order; of equal pictures the first one counts.

    Args:
        grey: [N, size, size] pictures.
        last: [N] true for pictures that count only where no other picture is equal.
    """
    order = np.argsort(last, kind="stable")
    seen: dict[bytes, int] = {}
    for i in order:
        seen.setdefault(hashlib.blake2b(grey[i].tobytes(), digest_size=16).digest(), int(i))
    return np.sort(np.array(list(seen.values()), np.int64))


def _styles(wanted: str, option: str) -> tuple[str, ...]:
    """Return the styles that an option names, directly or by their font, in the order of STYLES.

    Args:
        wanted: styles and fonts separated by commas; empty for all but the older editions.
        option: name of the option, for messages.
    """
    if not wanted:
        return tuple(style for style in STYLES if not style.startswith(OLDER))
    chosen: set[str] = set()
    for word in filter(None, wanted.split(",")):
        of_font = {s for f in FONTS.get(word, ()) for s in (f.style, *(style for _, style in f.suffixes))}
        if not of_font and word not in STYLES:
            raise unknown(f"drawing style in {option}", word, dict.fromkeys((*FONTS, *STYLES)))
        chosen |= of_font or {word}
    return tuple(style for style in STYLES if style in chosen)


def name_key(name: str) -> str:
    """Return a name without the words that describe the drawing: "home" for "home-outline"."""
    words = name.split("-")
    while len(words) > 1 and words[-1] in MANNERS:
        words.pop()
    return "-".join(words)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


# --- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Icon:
    name: str  # as in the font: words joined by hyphens
    style: str


@lru_cache
def fonts_folder() -> Path:
    """Return the folder of the qtawesome package's fonts. CounterpointError when the package is not installed."""
    found = importlib.util.find_spec("qtawesome")  # not imported: it needs Qt
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / "fonts"
        if any(folder.glob("*charmap*.json")):
            return folder
    raise CounterpointError(
        "the data source 'glyphs' draws with the fonts of the package qtawesome, which is not installed: "
        "pip install --no-deps qtawesome"
    )


def drawn_icons(styles: tuple[str, ...], size: int) -> tuple[list[Icon], NDArray[np.uint8]]:
    """Return all icons of the given styles and their pictures, grey [N, size, size]. Raises as `fonts_folder` does."""
    icons: list[Icon] = []
    parts = []
    wanted = [
        font
        for fonts in FONTS.values()
        for font in fonts
        if {font.style, *(style for _, style in font.suffixes)} & set(styles)
    ]
    for font in wanted:
        names, grey = _drawn(font, size)
        style_of = [dict(font.suffixes).get(name.rpartition("-")[2], font.style) for name in names]
        keep = [i for i, style in enumerate(style_of) if style in styles]
        icons += [Icon(names[i], style_of[i]) for i in keep]
        parts.append(grey[keep])
    return icons, np.concatenate(parts)


def _files(font: _Font) -> tuple[Path, Path]:
    """Return the paths of a font's TTF and its charmap, in the edition that is installed."""
    folder = fonts_folder()
    fonts = sorted(folder.glob(f"{font.file}-[0-9]*.ttf"))
    maps = sorted(folder.glob(f"{font.file.removesuffix('-webfont')}*charmap-[0-9]*.json"))
    if not fonts or not maps:
        raise CounterpointError(
            f"{folder}: this version of qtawesome has no font {font.file}; install the version that the set is made of: "
            "pip install --no-deps qtawesome==1.4.2"
        )
    return fonts[-1], maps[-1]


def _drawn(font: _Font, size: int) -> tuple[list[str], NDArray[np.uint8]]:
    """Return the names and pictures of a font's icons, from the cache or drawn into it."""
    file, charmap = _files(font)

    def build() -> cached.Arrays:
        names, grey = _draw(file, charmap, size)
        return {"names": np.array(names), "grey": grey}

    def read(arrays: cached.Arrays) -> tuple[list[str], NDArray[np.uint8]]:
        return [str(name) for name in arrays["names"]], arrays["grey"]

    key = (VERSION, pillow, file.read_bytes(), charmap.read_bytes(), size)
    return cached.build_once("glyphs", key, build, read, name=f"{file.stem}-{size}px", compress=True)


def _draw(file: Path, charmap: Path, size: int) -> tuple[list[str], NDArray[np.uint8]]:
    """Draw every distinct icon of a font, named by the first of its names; leave out icons without ink."""

    try:
        codes = {str(name): int(str(code), 16) for name, code in json.loads(charmap.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{charmap}: not a map from names to code points ({error}); reinstall qtawesome") from error
    first: dict[int, str] = {}
    for name, code in codes.items():
        first.setdefault(code, name)
    room = size - 2 * max(1, size // 16)  # a margin all round
    try:
        # An icon fills about one em.
        large = ImageFont.truetype(str(file), room)
        missing = _ink(large, chr(0x10FFFF), size)  # the box that a font draws for a missing character
    except OSError as error:
        raise DataError(f"{file}: not a readable font ({error}); reinstall qtawesome") from error
    names, pictures = [], []
    what = f"drawing {file.stem}"
    for code, name in patient_track(first.items(), what):
        ink = _ink(large, chr(code), size)
        if ink is None or (missing is not None and ink.tobytes() == missing.tobytes()):
            continue
        if max(ink.size) > room:
            smaller = ImageFont.truetype(str(file), room * room / max(ink.size))
            ink = _ink(smaller, chr(code), size) or ink
        image = Image.new("L", (size, size), 0)
        image.paste(ink, ((size - ink.width) // 2, (size - ink.height) // 2))
        names.append(name)
        pictures.append(255 - np.asarray(image))
    return names, np.stack(pictures)


def _ink(face: ImageFont.FreeTypeFont, letter: str, size: int) -> Image.Image | None:
    """Draw a letter in white on black, cut to its ink; None without ink. (A font's own box includes the space around it.)"""
    canvas = Image.new("L", (4 * size, 4 * size), 0)
    ImageDraw.Draw(canvas).text((2 * size, 2 * size), letter, font=face, fill=255, anchor="mm")
    box = canvas.getbbox()
    return canvas.crop(box) if box else None
