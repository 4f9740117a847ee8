"""`spoken-words`: sounds of short utterances with transcript and intent, to learn class after class.

    spoken-words:recorded    spoken digits of several speakers (Free Spoken Digit Dataset), fsdd.npz in $COUNTERPOINT_DATA; the
                             digit is the intent, and its name the transcript. Test: the first five takes of each speaker
    spoken-words:commands    commands by espeak NG in many voices, such as "please turn off the radio in the kitchen"; the intent
                             is the pair of action and object. Three places and two wordings make six transcripts of an intent
    spoken-words             the recorded ones where they are found, else the commands

Domains are the speakers or voices. The arrays of fsdd.npz are audio (int16, all recordings in a row), length, speaker, digit, take
and rate.
"""

from __future__ import annotations

import os
import zipfile
from itertools import product
from pathlib import Path

import numpy as np

from counterpoint.data.espeak import Job, library, sounds_of
from counterpoint.data.images import Indices
from counterpoint.data.pairs import AlignedColumns, AlignedData, ArrayWaves, Modality
from counterpoint.data.speech import VOICES
from counterpoint.data.valid import SHARE, carve, checked_share
from counterpoint.data.worlds.digits import NAMES
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.words import counted

FILE, RATE, TEST_TAKES = "fsdd.npz", 8000, 5
ACTIONS = (("turn on", "switch on"), ("turn off", "stop"), ("turn up", "increase"), ("turn down", "reduce"))
OBJECTS = ("lamp", "radio", "heating")
PLACES = ("", " in the kitchen", " in the bedroom")


def load(
    argument: str | None = None,
    *,
    train: int = 40,
    test: int = 10,
    valid: float = SHARE,
    seconds: float = 0.0,
    intents: int = 0,
    seed: int = 0,
) -> AlignedData:
    """Open the set; synthesise commands that are not in the cache (some seconds).

    Args:
        argument: "recorded", "commands", or None for the first of them that there is.
        train: number of training sounds of an intent, valid ones among them, at least 4; recorded: at most all.
        test: number of test sounds of an intent, at least 1; recorded: at most all.
        valid: share of the training sounds in the valid split, the same for every intent, between 0 and 1.
        seconds: length of a sound, 0.1 to 10; 0: 1 for recorded digits, 3.2 for commands. The notes count longer ones, which
            are cut at the end.
        intents: take the first so many intents, at least 2; 0: all (10 digits, 12 commands).
        seed: seed of all draws, at least 0.

    Raises CounterpointError for options out of range and a missing package, DataError for a missing or damaged file.
    """
    place = os.environ.get("COUNTERPOINT_DATA", "")
    if argument not in (None, "recorded", "commands"):
        raise unknown("kind of spoken-words", argument, ["recorded", "commands"])
    kind = argument or ("recorded" if place and (Path(place) / FILE).is_file() else "commands")
    most = len(NAMES) if kind == "recorded" else len(ACTIONS) * len(OBJECTS)
    if train < 4 or test < 1 or seed < 0 or intents not in (0, *range(2, most + 1)):
        raise CounterpointError(
            f"spoken-words needs train of at least 4, test of at least 1, and a seed of at least 0. It has 2 to {most} intents "
            f"(0: all). Got {train=}, {test=}, {seed=}, {intents=}"
        )
    seconds = seconds or (1.0 if kind == "recorded" else 3.2)
    if not 0.1 <= seconds <= 10:
        raise CounterpointError(f"spoken-words needs seconds of 0.1 to 10, got {seconds:g}")
    checked_share("spoken-words", valid)
    count, samples = intents or most, round(seconds * RATE)
    if kind == "recorded":
        return _recorded(Path(place), count, train, test, valid, samples, seed)
    return _commands(count, train, test, valid, samples, seed)


def _commands(count: int, train: int, test: int, valid: float, samples: int, seed: int) -> AlignedData:
    library()
    rng = np.random.default_rng([2310_02699, seed])
    named = [(wordings, thing) for wordings, thing in product(ACTIONS, OBJECTS)][:count]
    labels = np.repeat(np.arange(count), train + test)
    voices = rng.integers(0, len(VOICES), len(labels))
    texts, said = list[str](), list[Job]()
    for label, voice in zip(labels, voices, strict=True):
        wordings, thing = named[label]
        wording, where = rng.integers(0, 2), rng.integers(0, 3)
        texts.append(f"{('', 'please ')[wording]}{wordings[wording]} the {thing}{PLACES[where]}")
        said.append((VOICES[voice], int(rng.integers(150, 211)), int(rng.integers(30, 71)), texts[-1]))
    sounds, notes = sounds_of(said, samples, RATE)
    held = np.arange(len(labels)) % (train + test) >= train
    classes = tuple(f"{wordings[0]} the {thing}" for wordings, thing in named)
    return _data(sounds, texts, labels, voices, held, valid, classes, VOICES, notes)


def _recorded(place: Path, count: int, train: int, test: int, valid: float, samples: int, seed: int) -> AlignedData:
    file = place / FILE
    if not file.is_file():
        raise DataError(
            f"spoken-words:recorded needs {FILE}: set COUNTERPOINT_DATA to its folder, or use spoken-words:commands"
        )
    try:
        with np.load(file, allow_pickle=False) as stored:
            audio, length, speaker, digit, take = (
                stored[name] for name in ("audio", "length", "speaker", "digit", "take")
            )
            rate = int(stored["rate"])
        if (
            rate != RATE
            or int(length.sum()) != len(audio)
            or len({len(length), len(speaker), len(digit), len(take)}) > 1
        ):
            raise ValueError(f"{counted(len(audio), 'sample')} at {rate} Hz for lengths of {int(length.sum())} in all")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file}: does not hold the expected arrays ({error}); counterpoint/data/spoken_words.py lists them"
        ) from error
    rng = np.random.default_rng([2310_02699, seed])
    chosen = list[Indices]()
    for number, (many, of_test) in product(range(count), ((train, False), (test, True))):
        rows = np.flatnonzero((digit == number) & ((take < TEST_TAKES) == of_test))
        if not len(rows):
            raise DataError(f"{file} has no {'test' if of_test else 'training'} recording of the digit {NAMES[number]}")
        chosen.append(np.sort(rng.permutation(rows)[:many]))
    at = np.concatenate(chosen)
    starts = np.concatenate([[0], np.cumsum(length)])
    sounds = np.zeros((len(at), samples), np.int16)
    for n, row in enumerate(at):
        wave = audio[starts[row] : starts[row] + min(samples, length[row])]
        sounds[n, : len(wave)] = wave
    cut = int((length[at] > samples).sum())
    notes = [f"{file}: {len(at)} of {counted(len(length), 'recording')} of spoken digits"]
    if cut:
        notes.append(
            f"spoken-words: {cut} of {counted(len(at), 'sound is', 'sounds are')} longer than {samples / RATE:g} s and are cut "
            "at the end"
        )
    speakers, heard = np.unique(speaker, return_inverse=True)
    labels = digit[at].astype(np.int64)
    texts = [NAMES[label] for label in labels]
    domains = tuple(str(name) for name in speakers)
    return _data(
        sounds, texts, labels, heard.reshape(-1)[at], take[at] < TEST_TAKES, valid, NAMES[:count], domains, notes
    )


def _data(
    sounds: np.ndarray,
    texts: list[str],
    labels: Indices,
    voices: Indices,
    held: np.ndarray,
    valid: float,
    classes: tuple[str, ...],
    domains: tuple[str, ...],
    notes: list[str],
) -> AlignedData:
    """Divide the items into splits: `held` are test items, and a share of the others is valid."""
    rest = np.flatnonzero(~held)
    kept, watched = carve("spoken-words", rest, valid, labels[rest])

    def columns(rows: Indices) -> AlignedColumns:
        return AlignedColumns(
            {"audio": ArrayWaves(sounds[rows]), "text": [texts[n] for n in rows]},
            labels=labels[rows],
            domains=voices[rows],
        )

    return AlignedData(
        name="spoken-words",
        train=columns(kept),
        valid=columns(watched),
        test=columns(np.flatnonzero(held)),
        modalities={"audio": Modality("audio", rate=RATE, samples=sounds.shape[1]), "text": Modality("text")},
        classes=classes,
        notes=notes,
        domains=domains,
    )
