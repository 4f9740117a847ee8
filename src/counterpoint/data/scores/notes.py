"""The notes: chorales for engraving and playing, read from the corpus of the package music21."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from counterpoint.errors import CounterpointError, DataError

QUARTERS = (24, 56)  # length of a piece, least and greatest
DIVISIONS = 10080  # of a quarter: a multiple of the divisions of every file
STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
PACKAGES = ("music21", "verovio", "resvg_py", "tinysoundfont", "pretty_midi")


@dataclass(frozen=True)
class Note:
    """A note that is struck, with the notes tied to it; times in quarters from the piece's start."""

    onset: float
    length: float
    pitch: int  # of MIDI
    voice: int  # 0 soprano to 3 bass
    head: str  # the id of its first head in the engraving


@dataclass(frozen=True)
class Score:
    """A chorale for engraving and playing."""

    name: str
    xml: str  # MusicXML of one part on two staves
    notes: tuple[Note, ...]  # by onset
    holds: tuple[tuple[float, float], ...]  # the soprano's fermatas: start and end in quarters
    quarters: float

    @property
    def onsets(self) -> NDArray[np.float64]:
        """[items] onsets in quarters, in order: the times at which a note is struck."""
        return np.unique([note.onset for note in self.notes])

    def tune(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return two descriptions of the melody that do not depend on the key: its first beats, and its first steps.

        The first: intervals in semitones from the first note, at 9 successive quarters. The second: the first 9 steps in
        semitones, whatever the notes' lengths.
        """
        melody = [note for note in self.notes if note.voice == 0]
        pitches = [note.pitch for note in melody]
        beats = melody[0].onset + np.arange(9)
        at = np.searchsorted([note.onset for note in melody], beats, side="right") - 1
        beat = tuple(pitches[i] - pitches[0] for i in at)
        return beat, tuple(b - a for a, b in itertools.pairwise(pitches[:10]))


@lru_cache
def packages() -> tuple[Path, Path]:
    """Return the folder of chorales and the soundfont. CounterpointError names the packages that are not installed."""
    found = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name for name, spec in found.items() if spec is None or not spec.submodule_search_locations]
    if missing:
        raise CounterpointError(
            f"the data source 'scores' needs {', '.join(missing)}, not installed: "
            "pip install 'counterpoint[music]', then, without their dependencies, "
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
    """Read a chorale from a MusicXML file. Return None for a piece that does not have four parts with one voice each.

    The four parts become voices 1 to 4 of one part on a grand staff. Every note gets an id, which finds it in the engraving.
    DataError gives file and reason where the file cannot be read.
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
    tied: dict[tuple[int, int], int] = {}  # voice and pitch of a note that continues -> its number
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
    """Make a measure's attributes: key and time of the soprano, and in the first measure staves and clefs."""
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
    """Copy a note or rest to its place on the grand staff, without words and ornaments."""
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
    if voice == 0:  # the other voices wait too
        notations.extend(given.findall("notations/fermata"))
    return out


def _text(element: ET.Element, tag: str) -> str:
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"a {element.tag} without {tag}")
    return text


def _pitch(note: ET.Element) -> int:
    """Return the MIDI pitch of a note: 60 is middle C."""
    alter = round(float(note.findtext("pitch/alter") or 0))
    return 12 * (int(_text(note, "pitch/octave")) + 1) + STEPS[_text(note, "pitch/step")] + alter


def candidates(seed: int, left_out: list[str]) -> Iterator[Score]:
    """Yield chorales of the right length, each with another tune. The seed and the names determine the order.

    Args:
        seed: seed of the order.
        left_out: receives a message for each file that cannot be read.
    """
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
