"""`scores`: snippets of engraved music and of its sound, aligned by note onsets: Bach's chorales in two domains.

An item is one onset: a window of the score and a window of the sound, both centred on it. The score is a grand staff
(soprano and alto above, tenor and bass below) in one endless line, a strip, 120 pixels high; the sound is mono at
22,050 Hz, played from the same notes. A snippet as a paper cuts it is the centre of a window: 80 x 100 pixels (half of
160 x 200) and `seconds` of sound. What lies around it (20 pixels above and below, 10 left and right, half a snippet of
sound before and after) is there for shifts, stretching and rotation. Beyond a piece's ends are paper and silence.

    domain   score                                           sound
    clean    verovio's font Leipzig, black on white           the piano at a strict tempo, all notes equally loud
    real     other fonts and spacings, uneven ink, turned     other keyboards, tempo that drifts and waits at fermatas,
             by up to 1.5 degrees here and there, blurred,    hands apart, touch, detuning, a room, noise, narrow band
             on grey paper with stains and grain

Real is a likeness: nothing here was scanned or recorded. Training, valid and test are clean, of different pieces;
`shifts["real"]` is the test pieces in the real domain; `unpaired` holds real-domain snippets of further pieces, some
pieces as score only and the others as sound only, so that not even a piece is paired. `groups` are the pieces' numbers.
No two pieces begin with the same tune: Bach set many a tune several times, and it must not stand in training and test.
A chorale says many a phrase twice, so a snippet may have a twin at another place of its piece; a retrieval measure that
counts one right answer per query has its ceiling there.

What is read: chorales in four parts with one voice each, of 24 to 56 quarters, from the MusicXML files of the package
music21; there are 155 with tunes of their own. Repeats are played once; lyrics, grace notes, ornaments, words and
repeat signs are left out, in print and in sound. music21 and pretty_midi are found, never imported: only their files
are read. SVG becomes pixels through resvg, which is one wheel without a system library (cairosvg wants cairo) and draws
what verovio writes, nested views and symbols.

Licences: the music is in the public domain. No licence is stated for its encodings: most of the files say "PDF (c) 2004
Margaret Greentree" and "used by permission"; music21 (BSD-3-Clause) says in its corpus/license.txt that it distributes
the corpus with the encoders' permission and that some encodings may not be used commercially. Nothing of them is in
this package. verovio is LGPL-3.0-only and brings its fonts; resvg_py, tinysoundfont and pretty_midi are MIT; the
soundfont TimGM6mb.sf2 (T. Brechbill), which rides in pretty_midi, names no licence in itself; Debian distributes it
under the GPL-2.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import math
import os
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data import cached
from counterpoint.data.images import Indices, Pixels, some
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE, checked_share
from counterpoint.errors import CounterpointError, DataError

VERSION = 2  # of the reading, drawing and playing: a change to any must change this, or stale caches are read
RATE = 22050
HEIGHT = 120  # pixels of a strip and of a window, which is square
FINE = 2  # strips are drawn at this many times their size and then reduced
SPACE = 3.6  # pixels between two staff lines: a grand staff with its ledger lines fills 80 pixels
LEAD, TAIL = 0.5, 1.5  # seconds of sound before the first onset and after the last note
QUARTERS = (24, 56)  # length of a piece, least and greatest
DIVISIONS = 10080  # of a quarter: whatever a file divides it into divides this
DOMAINS = ("clean", "real")
FONTS = ("Bravura", "Leland", "Gootville", "Petaluma")  # of the real domain
PROGRAMS = (1, 2, 3, 4, 5, 6)  # of the real domain: bright and electric pianos, honky-tonk, harpsichord
STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}

PACKAGES = ("music21", "verovio", "resvg_py", "tinysoundfont", "pretty_midi")

Ink = NDArray[np.float32]
Wave = NDArray[np.float32]


def load(
    argument: None = None,
    *,
    task: str = "aligned",
    pieces: int = 108,
    valid: float = SHARE,
    seconds: float = 2.1,
    hop: int = 1,
    seed: int = 0,
) -> AlignedData:
    """Open the set, drawing and playing it where it is not in the cache (under a minute).

    Args:
        argument: not used; sources share a signature.
        task: "aligned"; sources share a signature.
        pieces: how many in all: a third to train on, a sixth to test on, the rest unpaired.
        valid: share of the pieces to train on that make the valid split instead, at least one.
        seconds: of sound in a snippet; a window holds twice as much.
        hop: every hop-th onset of a piece becomes an item.
        seed: of which pieces and how they are played and printed; another seed is another set.

    Raises CounterpointError when a package is not installed or the options ask for what there is not.

    >>> data = load(pieces=12)  # doctest: +SKIP
    >>> data.train.column("sheet", np.arange(2)).shape, data.train.column("audio", np.arange(2)).shape  # doctest: +SKIP
    ((2, 120, 120, 3), (2, 92610))
    """
    if task != "aligned":
        raise CounterpointError(f"scores is for the task aligned, not for {task}")
    if pieces < 6:
        raise CounterpointError(f"scores needs pieces >= 6 (a third train, a sixth test, half unpaired), got {pieces}")
    if not 0.1 <= seconds <= 30:
        raise CounterpointError(f"seconds is the length of a snippet of sound, 0.1 to 30; got {seconds:g}")
    if hop < 1 or seed < 0:
        raise CounterpointError(f"scores needs hop >= 1 and seed >= 0, got {hop} and {seed}")
    checked_share("scores", valid)
    third = pieces // 3
    last = min(third - 1, third - max(1, round(valid * third)))  # of the pieces that are trained on
    if last < 1:
        raise CounterpointError(f"scores: valid={valid:g} leaves none of {third} pieces to train on; ask for less")
    notes: list[str] = []
    made = _stored(pieces, seed, notes)
    samples = round(2 * seconds * RATE)
    roles = {"valid": ("train", 0), "test": ("test", 0), "real": ("test", 1), "unpaired": ("unpaired", 1)}

    def columns(part: str) -> AlignedColumns:
        role, domain = roles.get(part, ("train", 0))
        chosen = [r for r in made if _role(r.number, pieces) == role and r.domain == domain]
        if role == "train":
            chosen = [r for r in chosen if (r.number >= last) == (part == "valid")]
        # Of a piece that has only one of the two, the other is missing.
        seen = np.concatenate([np.full(len(r.at[::hop]), r.strip.size > 0) for r in chosen])
        heard = np.concatenate([np.full(len(r.at[::hop]), r.wave.size > 0) for r in chosen])
        return AlignedColumns(
            {
                "sheet": SheetWindows([r.strip for r in chosen], [r.x[::hop] for r in chosen]),
                "audio": SoundWindows([r.wave for r in chosen], [r.at[::hop] for r in chosen], samples),
            },
            presence={"sheet": seen, "audio": heard},
            domains=np.full(len(seen), domain, np.int64),
            groups=np.concatenate([np.full(len(r.at[::hop]), r.number, np.int64) for r in chosen]),
        )

    return AlignedData(
        name="scores",
        train=columns("train"),
        valid=columns("valid"),
        test=columns("test"),
        modalities={
            "sheet": Modality("image", size=HEIGHT),
            "audio": Modality("audio", rate=RATE, samples=samples),
        },
        notes=notes,
        domains=DOMAINS,
        shifts={"real": columns("real")},
        unpaired=columns("unpaired"),
    )


def _role(number: int, pieces: int) -> str:
    """What the piece of this number is for."""
    return "train" if number < pieces // 3 else "test" if number < pieces // 3 + pieces // 6 else "unpaired"


# --- windows ----------------------------------------------------------------------------------------------------------


class SheetWindows:
    """Windows of strips, cut when asked for: an `ImageSplit`.

    Args:
        strips: of each piece, grey [HEIGHT, W]; an empty one is a piece without a score, whose windows are zeros.
        centres: of each piece, [items] pixels from the strip's left end.
    """

    labels = None

    def __init__(self, strips: Sequence[Pixels], centres: Sequence[NDArray[np.float32]]) -> None:
        self.strips = list(strips)
        self.piece = _numbers(centres)
        self.start = np.rint(np.concatenate(list(centres))).astype(np.int64) - HEIGHT // 2

    def __len__(self) -> int:
        return len(self.piece)

    def images(self, indices: Indices) -> Pixels:
        """[n] positions -> [n, HEIGHT, HEIGHT, 3], white beyond a strip's ends."""
        out = np.full((len(indices), HEIGHT, HEIGHT), 255, np.uint8)
        for row, (piece, start) in enumerate(zip(self.piece[indices], self.start[indices], strict=True)):
            strip = self.strips[piece]
            if not strip.size:
                out[row] = 0
                continue
            least, most = max(start, 0), min(start + HEIGHT, strip.shape[1])
            out[row, :, least - start : most - start] = strip[:, least:most]
        return np.repeat(out[..., None], 3, axis=3)


class SoundWindows:
    """Windows of recordings, cut when asked for: a `WaveSplit`.

    Args:
        recordings: of each piece, int16 [n]; an empty one is a piece without sound, whose windows are silent.
        centres: of each piece, [items] seconds from the recording's start.
        samples: of a window.
    """

    def __init__(
        self, recordings: Sequence[NDArray[np.int16]], centres: Sequence[NDArray[np.float32]], samples: int
    ) -> None:
        self.recordings = list(recordings)
        self.samples = samples
        self.piece = _numbers(centres)
        self.start = np.rint(np.concatenate(list(centres)) * RATE).astype(np.int64) - samples // 2

    def __len__(self) -> int:
        return len(self.piece)

    def waves(self, indices: Indices) -> Wave:
        """[n] positions -> [n, samples] in [-1, 1], zero beyond a recording's ends."""
        out = np.zeros((len(indices), self.samples), np.float32)
        for row, (piece, start) in enumerate(zip(self.piece[indices], self.start[indices], strict=True)):
            wave = self.recordings[piece]
            least, most = max(start, 0), min(start + self.samples, len(wave))
            if least < most:
                np.divide(wave[least:most], 32767, out=out[row, least - start : most - start])
        return out


def _numbers(centres: Sequence[NDArray[np.float32]]) -> Indices:
    return np.repeat(np.arange(len(centres)), [len(c) for c in centres])


# --- reading the corpus -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """A note that is struck, with whatever is tied to it; times in quarters from the piece's start."""

    onset: float
    length: float
    pitch: int  # of MIDI
    voice: int  # 0 soprano to 3 bass
    head: str  # the id of its first head in the engraving


@dataclass(frozen=True)
class Score:
    """A chorale as it is engraved and played."""

    name: str
    xml: str  # MusicXML of one part on two staves
    notes: tuple[Note, ...]  # by onset
    holds: tuple[tuple[float, float], ...]  # where the soprano's fermatas stand: from, to, in quarters
    quarters: float

    @property
    def onsets(self) -> NDArray[np.float64]:
        """[items] the quarters at which something is struck, in order."""
        return np.unique([note.onset for note in self.notes])

    def tune(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Two ways to know the melody again in any key: its first beats, and its first steps whatever their lengths."""
        melody = [note for note in self.notes if note.voice == 0]
        pitches = [note.pitch for note in melody]
        beats = melody[0].onset + np.arange(9)
        at = np.searchsorted([note.onset for note in melody], beats, side="right") - 1
        beat = tuple(pitches[i] - pitches[0] for i in at)
        return beat, tuple(b - a for a, b in itertools.pairwise(pitches[:10]))


@lru_cache
def packages() -> tuple[Path, Path]:
    """The folder of chorales and the soundfont; CounterpointError names the packages that are not installed."""
    found = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name for name, spec in found.items() if spec is None or not spec.submodule_search_locations]
    if missing:
        raise CounterpointError(
            f"the data source 'scores' needs {', '.join(missing)}, not installed: "
            "pip install 'counterpoint[music]', then, without what they depend on, "
            "pip install --no-deps tinysoundfont pretty_midi"
        )
    folders = {name: Path(next(iter(spec.submodule_search_locations or []))) for name, spec in found.items() if spec}
    chorales, soundfont = folders["music21"] / "corpus" / "bach", folders["pretty_midi"] / "TimGM6mb.sf2"
    if not any(chorales.glob("bwv*.mxl")):
        raise CounterpointError(
            f"{chorales}: this copy of music21 has no chorales (some are distributed without the corpus); install it "
            "again: pip install --force-reinstall --no-deps music21"
        )
    if not soundfont.is_file():
        raise CounterpointError(
            f"{soundfont}: no such file; install pretty_midi again: pip install --force-reinstall --no-deps pretty_midi"
        )
    return chorales, soundfont


def read(file: Path) -> Score | None:
    """A chorale; None for what is not one of four parts with one voice each. DataError says what is damaged.

    The four parts are put on a grand staff, as voices 1 to 4 of one part. Every note gets an id, by which it is found
    in the engraving.
    """
    try:
        if file.suffix == ".mxl":
            with zipfile.ZipFile(file) as packed:
                inside = [n for n in packed.namelist() if n.endswith("xml") and not n.startswith("META-INF")]
                root = ET.fromstring(packed.read(inside[0]))
        else:
            root = ET.fromstring(file.read_bytes())
        parts = root.findall("part")
        if len(parts) != 4 or any(next(part.iter("backup"), None) is not None for part in parts):
            return None
        return _grand_staff(file.stem, parts)
    except (OSError, ET.ParseError, zipfile.BadZipFile, IndexError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file}: not MusicXML that can be read ({type(error).__name__}: {error})") from error


def _grand_staff(name: str, parts: list[ET.Element]) -> Score | None:
    whole = ET.Element("score-partwise", version="3.1")
    listed = ET.SubElement(ET.SubElement(whole, "part-list"), "score-part", id="P1")
    ET.SubElement(listed, "part-name")
    part = ET.SubElement(whole, "part", id="P1")
    measures = [p.findall("measure") for p in parts]
    if len({len(of_part) for of_part in measures}) > 1:
        raise ValueError("its parts differ in the number of measures")
    notes: list[Note] = []
    holds: set[tuple[float, float]] = set()
    tied: dict[tuple[int, int], int] = {}  # voice and pitch of a note that goes on -> its number
    divisions = [1] * 4
    count, start = 0, 0  # notes written; where the measure starts, in DIVISIONS of a quarter
    for number, across in enumerate(zip(*measures, strict=True)):
        measure = ET.SubElement(part, "measure", number=str(number))
        measure.append(_attributes(across[0].find("attributes"), number == 0))
        ends = set()
        for voice, of_voice in enumerate(across):
            at = head = 0  # in the measure; `head` is where the last note started, for the chord notes after it
            for element in of_voice:
                if element.tag == "attributes" and element.find("divisions") is not None:
                    divisions[voice] = int(_text(element, "divisions"))
                if element.tag not in ("note", "forward") or element.find("grace") is not None:
                    continue
                length, rest = divmod(int(_text(element, "duration")) * DIVISIONS, divisions[voice])
                if rest:
                    raise ValueError(f"{divisions[voice]} divisions of a quarter")
                if element.tag == "forward":
                    ET.SubElement(ET.SubElement(measure, "forward"), "duration").text = str(length)
                    at += length
                    continue
                written = f"n{count}"
                count += 1
                measure.append(_note(element, written, length, voice))
                if element.find("chord") is None:
                    head, at = at, at + length
                if element.find("pitch") is None:
                    continue
                onset, lasts = (start + head) / DIVISIONS, length / DIVISIONS
                if voice == 0 and element.find("notations/fermata") is not None:
                    holds.add((onset, onset + lasts))
                pitch = _pitch(element)
                ties = {tie.get("type") for tie in element.findall("tie")}
                before = tied.pop((voice, pitch), None)
                if "stop" in ties and before is not None:
                    old = notes[before]
                    notes[before] = Note(old.onset, onset + lasts - old.onset, pitch, voice, old.head)
                    this = before
                else:
                    this = len(notes)
                    notes.append(Note(onset, lasts, pitch, voice, written))
                if "start" in ties:
                    tied[voice, pitch] = this
            ends.add(at)
            if voice < 3:
                ET.SubElement(ET.SubElement(measure, "backup"), "duration").text = str(at)
        if len(ends) > 1:
            raise ValueError(f"the voices of measure {number + 1} differ in length")
        start += ends.pop()
    if {note.voice for note in notes} != {0, 1, 2, 3}:
        return None
    ordered = tuple(sorted(notes, key=lambda note: (note.onset, note.voice, note.pitch)))
    return Score(name, ET.tostring(whole, encoding="unicode"), ordered, tuple(sorted(holds)), start / DIVISIONS)


def _attributes(given: ET.Element | None, first: bool) -> ET.Element:
    """Key and time as the soprano has them; staves and clefs once."""
    out = ET.Element("attributes")
    ET.SubElement(out, "divisions").text = str(DIVISIONS)
    for tag in ("key", "time"):
        out.extend([] if given is None else given.findall(tag))
    if first:
        ET.SubElement(out, "staves").text = "2"
        for staff, (sign, line) in enumerate((("G", "2"), ("F", "4")), 1):
            clef = ET.SubElement(out, "clef", number=str(staff))
            ET.SubElement(clef, "sign").text = sign
            ET.SubElement(clef, "line").text = line
    return out


def _note(given: ET.Element, name: str, length: int, voice: int) -> ET.Element:
    """A note or rest in its place on the grand staff, without words and ornaments."""
    out = ET.Element("note", id=name)
    for tag in ("chord", "pitch", "rest"):
        out.extend(given.findall(tag))
    ET.SubElement(out, "duration").text = str(length)
    out.extend(given.findall("tie"))
    ET.SubElement(out, "voice").text = str(voice + 1)
    for tag in ("type", "dot", "accidental", "time-modification"):
        out.extend(given.findall(tag))
    if given.find("rest") is None:
        ET.SubElement(out, "stem").text = "up" if voice % 2 == 0 else "down"
    ET.SubElement(out, "staff").text = str(voice // 2 + 1)
    out.extend(given.findall("beam"))
    notations = ET.SubElement(out, "notations")
    notations.extend(given.findall("notations/tied"))
    if voice == 0:  # the others wait with it
        notations.extend(given.findall("notations/fermata"))
    return out


def _text(element: ET.Element, tag: str) -> str:
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"a {element.tag} without {tag}")
    return text


def _pitch(note: ET.Element) -> int:
    """Of MIDI: 60 is middle C."""
    alter = round(float(note.findtext("pitch/alter") or 0))
    return 12 * (int(_text(note, "pitch/octave")) + 1) + STEPS[_text(note, "pitch/step")] + alter


def _candidates(seed: int, left_out: list[str]) -> Iterator[Score]:
    """Chorales of the right length, no tune twice, in an order that the seed and their names give."""
    files = [f for f in packages()[0].glob("bwv*") if f.suffix in (".mxl", ".xml")]
    tunes: set[tuple[int, ...]] = set()
    for file in sorted(files, key=lambda f: hashlib.sha256(f"{seed}/{f.stem}".encode()).digest()):
        try:
            score = read(file)
        except DataError as error:
            left_out.append(str(error))
            continue
        if score is None or not QUARTERS[0] <= score.quarters <= QUARTERS[1] or tunes & set(score.tune()):
            continue
        tunes.update(score.tune())
        yield score


# --- the printed page -------------------------------------------------------------------------------------------------


def engrave(score: Score, font: str = "Leipzig", **options: Any) -> tuple[Pixels, NDArray[np.float64]]:
    """The strip at FINE times its size, grey [FINE * HEIGHT, W], and [onsets] the pixels where they stand.

    `options` are verovio's. DataError when verovio cannot read or draw the piece.
    """
    import resvg_py
    import verovio

    verovio.enableLog(verovio.LOG_OFF)  # its warnings are of layout, and many
    toolkit = verovio.toolkit()
    toolkit.setOptions(
        {
            "inputFrom": "musicxml",
            "breaks": "none",
            "header": "none",
            "footer": "none",
            "adjustPageWidth": True,
            "adjustPageHeight": True,
            "pageWidth": 100000,
            "mnumInterval": 0,
            "xmlIdSeed": 1,  # the ids of what has none, by chance otherwise
            "font": font,
            **options,
        }
    )
    if not toolkit.loadData(score.xml):
        raise DataError(f"{score.name}: verovio cannot read it")
    svg = toolkit.renderToSVG(1)
    try:
        left, top, bottom, space, width, heads = _places(svg)
    except (ET.ParseError, ValueError, IndexError, StopIteration) as error:
        raise DataError(f"{score.name}: not an engraving as verovio makes it ({error})") from error
    missing = sum(note.head not in heads for note in score.notes)
    if missing:
        raise DataError(f"{score.name}: {missing} of {len(score.notes)} notes are not in the engraving")
    zoom = FINE * SPACE / space  # pixels per unit of the drawing
    png = resvg_py.svg_to_bytes(
        svg_string=svg, background="white", skip_system_fonts=True, width=max(1, round(width * zoom))
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("L")
    zoom = drawn.width / width
    # The middle of the grand staff comes to the middle of the strip, with room at its ends for the outermost windows.
    margin = FINE * HEIGHT // 2
    strip = Image.new("L", (drawn.width + 2 * margin, FINE * HEIGHT), 255)
    strip.paste(drawn, (margin, round(FINE * HEIGHT / 2 - (top + bottom) / 2 * zoom)))
    middle = 0.59 * space  # of a head, which is given by its left edge
    places: dict[float, list[float]] = {}
    for note in score.notes:
        places.setdefault(note.onset, []).append((left + heads[note.head] + middle) * zoom + margin)
    return np.asarray(strip), np.array([np.median(places[onset]) for onset in score.onsets])


def _places(svg: str) -> tuple[float, float, float, float, float, dict[str, float]]:
    """In the drawing's units: left margin, first and last staff line, the space between lines, width, heads by id."""
    space = "{http://www.w3.org/2000/svg}"
    inner = next(e for e in ET.fromstring(svg).iter(f"{space}svg") if e.get("viewBox") and e.get("class"))
    width = float(inner.get("viewBox", "").split()[2])
    page = next(e for e in inner.iter(f"{space}g") if e.get("class") == "page-margin")
    left, above = _translation(page)
    heads: dict[str, float] = {}
    lines: list[float] = []
    for group in page.iter(f"{space}g"):
        kind = (group.get("class") or "").split()
        if "note" in kind:
            head = next(e for e in group.iter(f"{space}g") if e.get("class") == "notehead")
            heads[group.get("id", "")] = _translation(next(head.iter(f"{space}use")))[0]
        elif "staff" in kind and len(lines) < 10:
            lines += [float(e.get("d", "").split()[1]) for e in group.findall(f"{space}path")[:5]]
    if len(lines) != 10:
        raise ValueError("no grand staff")
    return left, above + lines[0], above + lines[9], (lines[4] - lines[0]) / 4, width, heads


def _translation(element: ET.Element) -> tuple[float, float]:
    inside = element.get("transform", "").partition("translate(")[2].partition(")")[0].replace(",", " ").split()
    return float(inside[0]), float(inside[1])


def _reduced(strip: NDArray[Any]) -> Ink:
    """FINE times smaller."""
    width = strip.shape[1] // FINE * FINE
    blocks = strip[:, :width].reshape(HEIGHT, FINE, width // FINE, FINE)
    return np.asarray(blocks.mean((1, 3)), np.float32)


def _scan(strip: Pixels, rng: np.random.Generator) -> Pixels:
    """A fine strip as a scanner might see it on old paper, reduced: [HEIGHT, W]."""
    from scipy.ndimage import gaussian_filter

    fine = _turned(np.asarray(1 - strip / 255, np.float32), rng)
    # Printed fat or thin, here more and there less.
    fine = np.clip(gaussian_filter(fine, rng.uniform(0.3, 0.8)) * rng.uniform(1.1, 2.4), 0, 1)
    fine *= 1 - rng.uniform(0.1, 0.4) * np.clip(0.5 + 0.5 * _clouds(rng, fine.shape, FINE * 12), 0, 1)
    ink = _reduced(gaussian_filter(fine, rng.uniform(0.3, 1.1)))

    shape = ink.shape
    paper = rng.uniform(190, 240) + rng.uniform(3, 9) * _clouds(rng, shape, 80)
    grey = paper * (1 - ink) + rng.uniform(20, 75) * ink
    down, across = np.arange(shape[0])[:, None], np.arange(shape[1])
    for _ in range(rng.poisson(shape[1] / 150)):
        # A stain: an ellipse that fades, rarely strong.
        cy, cx = rng.uniform(0, HEIGHT), rng.uniform(0, shape[1])
        radius, long = rng.uniform(3, 25), rng.uniform(0.6, 1.6)
        near = slice(max(0, int(cx - 4 * radius * long)), int(cx + 4 * radius * long) + 1)
        distance = ((down - cy) / radius) ** 2 + ((across[near] - cx) / (radius * long)) ** 2
        grey[:, near] -= rng.exponential(14) * np.exp(-distance)
    specks = rng.integers(0, grey.size, rng.poisson(grey.size / 2500))
    grey.reshape(-1)[specks] -= rng.uniform(30, 120, len(specks))
    grey += rng.uniform(2, 7) * gaussian_filter(rng.standard_normal(shape), 0.5) * 2
    grey = 128 + (grey - 128) * rng.uniform(0.85, 1.1)
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)


def _turned(ink: Ink, rng: np.random.Generator) -> Ink:
    """Turned this way and that along the line by at most 1.5 degrees: the slope is a sum of two waves.

    The middle of the strip moves up and down only, so that onsets stay where they are.
    """
    from scipy.ndimage import map_coordinates

    high, wide = ink.shape
    x, y = np.arange(wide, dtype=np.float32), np.arange(high, dtype=np.float32)[:, None] - high / 2
    slope, drift = np.zeros(wide, np.float32), np.zeros(wide, np.float32)
    for share in (0.6, 0.4):
        turn = 2 * np.pi / (FINE * rng.uniform(250, 700))
        phase, steep = rng.uniform(0, 2 * np.pi), math.tan(math.radians(1.5)) * share * rng.uniform(0.3, 1)
        slope += steep * np.cos(turn * x + phase)
        drift += steep / turn * np.sin(turn * x + phase)
    return np.asarray(map_coordinates(ink, [y + high / 2 + drift, x - slope * y], order=1, mode="constant"), np.float32)


def _clouds(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> Ink:
    """Smooth noise of unit scale whose hills are `size` pixels wide."""
    small = rng.standard_normal((shape[0] // size + 2, shape[1] // size + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


# --- the sound --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strike:
    """A key that goes down and up, in seconds."""

    start: float
    stop: float
    pitch: int
    velocity: int  # of MIDI, 1 to 127
    voice: int


def play(strikes: Sequence[Strike], program: int = 0, cents: float = 0.0) -> Wave:
    """The sound of the soundfont's instrument, mono at RATE, from time zero to TAIL after the last key is up."""
    import tinysoundfont

    synth = tinysoundfont.Synth(gain=-6, samplerate=RATE)
    font = synth.sfload(str(packages()[1]))
    for voice in range(4):  # a channel each: two voices may hold one key
        synth.program_select(voice, font, 0, program)
        synth.set_tuning(voice, cents / 100)
    events = [(round(s.stop * RATE), 0, s.voice, s.pitch, 0) for s in strikes]
    events += [(round(s.start * RATE), 1, s.voice, s.pitch, s.velocity) for s in strikes]
    end = max(event[0] for event in events) + round(TAIL * RATE)
    now, out = 0, []
    for at, down, voice, pitch, velocity in [*sorted(events), (end, 2, 0, 0, 0)]:
        if at > now:
            out.append(np.frombuffer(synth.generate(at - now), np.float32).copy())
            now = at
        if down == 1:
            synth.noteon(voice, pitch, velocity)
        elif down == 0:
            synth.noteoff(voice, pitch)
    return np.concatenate(out).reshape(-1, 2).mean(1)


def _strict(score: Score, rng: np.random.Generator) -> tuple[list[Strike], NDArray[np.float64]]:
    """Every note at its time, and [onsets] the seconds."""
    beat = 60 / rng.uniform(88, 116)
    strikes = [
        Strike(LEAD + n.onset * beat, LEAD + (n.onset + n.length) * beat - 0.02, n.pitch, 80, n.voice)
        for n in score.notes
    ]
    return strikes, LEAD + score.onsets * beat


def _expressive(score: Score, rng: np.random.Generator) -> tuple[list[Strike], NDArray[np.float64]]:
    """As a player might: see the module. The seconds are those of the beat; each note falls near it."""
    grid = np.arange(0, score.quarters + 0.125, 0.125)
    knots = np.arange(0, score.quarters + 4, 4)
    pace = np.exp(np.interp(grid, knots, rng.normal(0, 0.09, len(knots)))) * 60 / rng.uniform(72, 120)
    for start, stop in score.holds:
        pace[(grid >= start) & (grid < stop)] *= rng.uniform(1.05, 1.6)
    clock = LEAD + np.concatenate([[0], np.cumsum(pace[:-1] * 0.125)])

    swell = rng.normal(0, 9, len(knots))
    base, melody, legato = rng.uniform(62, 96), rng.uniform(0, 12), rng.uniform(0.75, 0.98)
    late = rng.normal(0, 0.012)  # the left hand
    strikes = []
    for n in score.notes:
        at = np.interp(n.onset, grid, clock)
        until = at + (np.interp(n.onset + n.length, grid, clock) - at) * legato * rng.uniform(0.9, 1.0)
        start = max(0.0, at + late * (n.voice >= 2) + float(np.clip(rng.normal(0, 0.010), -0.03, 0.03)))
        touch = base + melody * (n.voice == 0) + np.interp(n.onset, knots, swell) + rng.normal(0, 6)
        velocity = int(np.clip(round(touch), 25, 120))
        strikes.append(Strike(start, max(float(until), start + 0.05), n.pitch, velocity, n.voice))
    return strikes, np.interp(score.onsets, grid, clock)


def _record(wave: Wave, rng: np.random.Generator) -> Wave:
    """A wave as a microphone in a room might hear it, as long as before."""
    from scipy.signal import butter, fftconvolve, sosfilt

    # The room: noise that dies away, falling by 60 dB in `decay` seconds.
    decay = rng.uniform(0.25, 1.2)
    time = np.arange(round(decay * RATE)) / RATE
    room = rng.standard_normal(len(time)) * np.exp(-6.9 * time / decay)
    room *= 10 ** (rng.uniform(-16, -5) / 20) / np.sqrt((room**2).sum())
    room[0] = 1
    out = fftconvolve(wave, room)[: len(wave)]
    # Noise that hisses or rumbles: its power falls with the frequency to the power of `tilt`.
    spectrum = np.fft.rfft(rng.standard_normal(len(out)))
    tilt = rng.uniform(0, 1.3)
    spectrum *= np.maximum(np.arange(len(spectrum)), len(spectrum) / 500) ** (-tilt / 2)
    noise = np.fft.irfft(spectrum, len(out))
    level = np.sqrt((out**2).mean()) * 10 ** (-rng.uniform(14, 36) / 20)
    out = out + noise * level / noise.std()
    band = [rng.uniform(50, 160), rng.uniform(3500, 9500)]
    return np.asarray(sosfilt(butter(2, band, "bandpass", fs=RATE, output="sos"), out), np.float32)


def _int16(wave: Wave, peak: float) -> NDArray[np.int16]:
    return np.rint(wave * (peak * 32767 / max(float(np.abs(wave).max()), 1e-9))).astype(np.int16)


# --- building ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendition:
    """A piece in one domain; without a score or without sound where it is not wanted."""

    name: str
    number: int
    domain: int  # of DOMAINS
    strip: Pixels  # [HEIGHT, W], or [HEIGHT, 0]
    x: NDArray[np.float32]  # [onsets] pixels
    wave: NDArray[np.int16]  # [n], or [0]
    at: NDArray[np.float32]  # [onsets] seconds


def render(
    score: Score, number: int, domain: int, seed: int = 0, *, sheet: bool = True, sound: bool = True
) -> Rendition:
    """Engrave and play a piece; the same name, domain and seed give the same bytes. DataError as `engrave`."""
    digest = hashlib.sha256(f"{score.name}/{DOMAINS[domain]}/{seed}".encode()).digest()
    page, player = (np.random.default_rng([part, *digest[:16]]) for part in (0, 1))
    strip, x = np.empty((HEIGHT, 0), np.uint8), np.zeros(len(score.onsets))
    wave, at = np.empty(0, np.int16), np.zeros(len(score.onsets))
    if sheet and domain == 0:
        fine, x = engrave(score)
        strip = np.rint(_reduced(fine)).astype(np.uint8)
    elif sheet:
        fine, x = engrave(
            score,
            FONTS[page.integers(len(FONTS))],
            spacingLinear=round(page.uniform(0.22, 0.32), 3),
            spacingNonLinear=round(page.uniform(0.55, 0.65), 3),
            staffLineWidth=round(page.uniform(0.13, 0.24), 3),
        )
        strip = _scan(fine, page)
    if sound and domain == 0:
        strikes, at = _strict(score, player)
        wave = _int16(play(strikes), 0.7)
    elif sound:
        strikes, at = _expressive(score, player)
        program = PROGRAMS[player.integers(len(PROGRAMS))]
        dry = play(strikes, program, player.uniform(-30, 30))
        wave = _int16(_record(dry, player), player.uniform(0.3, 0.95))
    return Rendition(score.name, number, domain, strip, (x / FINE).astype(np.float32), wave, at.astype(np.float32))


def _build(pieces: int, seed: int) -> tuple[list[Rendition], list[str]]:
    """Return all renditions of the set, and what cannot be read or drawn, in whose place another piece stands."""
    from rich.console import Console
    from rich.progress import track

    out: list[Rendition] = []
    left_out: list[str] = []
    candidates = _candidates(seed, left_out)
    ready = list(itertools.islice(candidates, pieces))
    too_few = "scores has {} pieces that fit, each with a tune of its own (seed {}), asked for pieces={}"
    if len(ready) < pieces:
        raise CounterpointError(too_few.format(len(ready), seed, pieces))
    remaining = itertools.chain(ready, candidates)
    quiet = os.environ.get("RANK", "0") != "0"
    console = Console(stderr=True)
    for number in track(range(pieces), "engraving scores", console=console, transient=True, disable=quiet):
        role = _role(number, pieces)
        for score in remaining:
            try:
                if role == "unpaired":  # every other piece by ear alone
                    out.append(render(score, number, 1, seed, sheet=number % 2 == 0, sound=number % 2 == 1))
                else:
                    made = [render(score, number, domain, seed) for domain in range(2 if role == "test" else 1)]
                    out += made
            except DataError as error:
                left_out.append(str(error))
                continue
            break
        else:
            raise CounterpointError(too_few.format(number, seed, pieces))
    return out, left_out


def _stored(pieces: int, seed: int, notes: list[str]) -> list[Rendition]:
    """The set, from the cache or built into it."""
    packages()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    key = (VERSION, versions, pieces, seed)
    made, left_out = cached.build_once("scores", key, lambda: _pack(*_build(pieces, seed)), _unpack, notes=notes)
    if left_out:
        notes.append(f"pieces left out ({len(left_out)}): {some(left_out)}")
    return made


def _pack(made: list[Rendition], left_out: list[str]) -> dict[str, NDArray[Any]]:
    return {
        "names": np.array([r.name for r in made]),
        "facts": np.array([(r.number, r.domain, r.strip.shape[1], len(r.wave), len(r.at)) for r in made], np.int64),
        "strips": np.concatenate([r.strip for r in made], axis=1),
        "waves": np.concatenate([r.wave for r in made]),
        "x": np.concatenate([r.x for r in made]),
        "at": np.concatenate([r.at for r in made]),
        "left_out": np.array(left_out, dtype=np.str_),
    }


def _unpack(stored: dict[str, NDArray[Any]]) -> tuple[list[Rendition], list[str]]:
    facts = stored["facts"]
    cuts = np.cumsum(facts[:, 2:], axis=0)[:-1].T
    made = [
        Rendition(str(name), int(number), int(domain), strip, x, wave, at)
        for name, (number, domain), strip, wave, x, at in zip(
            stored["names"],
            facts[:, :2],
            np.split(stored["strips"], cuts[0], axis=1),
            np.split(stored["waves"], cuts[1]),
            np.split(stored["x"], cuts[2]),
            np.split(stored["at"], cuts[2]),
            strict=True,
        )
    ]
    return made, [str(line) for line in stored["left_out"]]
