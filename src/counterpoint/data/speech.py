"""`speech`: pictures, words and the words spoken, by espeak NG in many voices: three modalities of one item.

    pairing   image               text                          audio
    named     an icon             its name                      the name, spoken by one of the training voices
    m3        an icon of one of   the five things' names, each  some thing's name in one of the five languages: it tells
              five things         in another of five languages  the language and nothing else

named: names of training and test are disjoint (the source `glyphs`, whose short names these are); `shifts["voices"]` is the test
items once more, spoken by voices that are never heard in training. Classes are the names' subjects, domains the voices.

m3 is the problem of Symile (arXiv 2411.01053, its Symile-M3 data) in small: the language of the audio says which of the text's
words is meant, and the picture shows it. Any two modalities are independent (every text holds all five things and all five
languages, audio and picture are drawn independently), all three are not: of picture, language and text the third follows from
the other two, up to the texts that agree in the one word. The audio's own word is drawn independently of everything.

espeak NG is one library with one state for a process, and what it says depends a little on what it said before. So speech is
made in order by a process of its own, once, and kept in the cache: the same on every run. The package espeakng-loader brings
library and voices; espeak NG is GPL-3.0, of which nothing is in this package. `pip install 'counterpoint[speech]'`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import glyphs
from counterpoint.data.images import Indices, Pixels
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import cache_folder, replacing

VERSION = 1  # of what is spoken and how: a change must change this, or stale caches are read
# Accents of English, other languages' voices reading English, and espeak's variants of a throat.
VOICES = tuple(
    f"{language}{variant}"
    for language in ("en-us", "en", "en-gb-scotland", "de", "nl", "sv", "it", "es")
    for variant in ("", "+f2", "+m3", "+f4", "+m5")
)
UNHEARD = tuple(
    f"{language}{variant}"
    for language in ("en-029", "en-gb-x-rp", "fr", "pl")
    for variant in ("+f3", "+m1", "+m7", "+f5")
)
# Five things in five languages, and the icon that shows each.
THINGS: dict[str, dict[str, str]] = {
    "house": {"en-us": "house", "de": "Haus", "fr": "maison", "es": "casa", "it": "casa"},
    "star": {"en-us": "star", "de": "Stern", "fr": "étoile", "es": "estrella", "it": "stella"},
    "heart": {"en-us": "heart", "de": "Herz", "fr": "cœur", "es": "corazón", "it": "cuore"},
    "key": {"en-us": "key", "de": "Schlüssel", "fr": "clé", "es": "llave", "it": "chiave"},
    "fish": {"en-us": "fish", "de": "Fisch", "fr": "poisson", "es": "pez", "it": "pesce"},
}
LANGUAGES = ("en-us", "de", "fr", "es", "it")
THROATS = ("", "+f2", "+m3", "+f4", "+m5", "+m1", "+f5", "+m7")


def load(
    argument: None = None,
    *,
    task: str = "aligned",
    pairing: str = "named",
    train: int = 4000,
    test: int = 1000,
    size: int = 32,
    seconds: float = 1.2,
    rate: int = 8000,
    words: int = 2,
    seed: int = 0,
) -> AlignedData:
    """Open the set, speaking what is not in the cache (some seconds).

    Args:
        task: aligned.
        pairing: "named" or "m3".
        train, test: how many items.
        size: of the pictures, in pixels.
        seconds: of sound; what is longer loses its end, and is counted in the notes.
        rate: samples a second.
        words: of a name, at most (named).
        seed: of everything drawn.

    CounterpointError when a package is missing or the numbers ask for more than there is.
    """
    if task != "aligned":
        raise CounterpointError(f"speech gives aligned items, not the task {task}")
    if pairing not in ("named", "m3"):
        raise CounterpointError(f"speech: pairing is named or m3, got {pairing!r}")
    if train < 1 or test < 1 or words < 1 or not 0.1 <= seconds <= 10 or not 4000 <= rate <= 22050:
        raise CounterpointError("speech: train, test and words at least 1, 0.1 to 10 seconds, a rate of 4000 to 22050")
    library()
    made = _named if pairing == "named" else _m3
    return made(train, test, size, round(seconds * rate), rate, words, seed)


class Spoken:
    """Sounds in memory, int16 [N, samples]."""

    def __init__(self, sounds: NDArray[np.int16]) -> None:
        self.sounds = sounds

    def __len__(self) -> int:
        return len(self.sounds)

    def waves(self, indices: Indices) -> NDArray[np.float32]:
        return self.sounds[indices].astype(np.float32) / np.float32(32768)


class Chosen:
    """Some pictures of another split, in an order of their own."""

    def __init__(self, split: Any, rows: Indices) -> None:
        self.split, self.rows = split, rows
        self.labels = None if split.labels is None else split.labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Pixels:
        return np.asarray(self.split.images(self.rows[np.asarray(indices)]))


# --- what is said -----------------------------------------------------------------------------------------------------


def _named(train: int, test: int, size: int, samples: int, rate: int, words: int, seed: int) -> AlignedData:
    source = glyphs.load(size=size, test=4000)
    assert isinstance(source, AlignedData)
    rng = np.random.default_rng([seed, 1])
    parts: dict[str, tuple[Any, Indices, list[str]]] = {}
    for name, split, count in (("train", source.train, train), ("test", source.test, test)):
        names = [str(text) for text in split.column("text", np.arange(len(split)))]
        short = np.array([n for n, text in enumerate(names) if len(text.split()) <= words], np.int64)
        if len(short) < count:
            raise CounterpointError(
                f"speech: glyphs has {len(short)} icons for {name} with names of at most {words} words, asked for {count}"
            )
        rows = np.sort(rng.permutation(short)[:count])
        parts[name] = split, rows, [names[n] for n in rows]
    said, voices = list[tuple[str, int, int, str]](), dict[str, Indices]()
    for name, heard in (("train", VOICES), ("test", VOICES), ("voices", UNHEARD)):
        texts = parts["test" if name == "voices" else name][2]
        drawn = rng.integers(0, len(heard), len(texts))
        voices[name] = drawn + (len(VOICES) if name == "voices" else 0)
        said += [(heard[v], *_manner(rng), text) for v, text in zip(drawn, texts, strict=True)]
    sounds, cut = _sounds(said, samples, rate)
    at = np.cumsum([0, train, test, test])
    columns = {}
    for number, name in enumerate(("train", "test", "voices")):
        split, rows, texts = parts["test" if name == "voices" else name]
        columns[name] = AlignedColumns(
            {
                "image": Chosen(split.columns["image"], rows),
                "text": texts,
                "audio": Spoken(sounds[at[number] : at[number + 1]]),
            },
            labels=None if split.labels is None else split.labels[rows],
            domains=voices[name],
        )
    return AlignedData(
        name="speech",
        train=columns["train"],
        test=columns["test"],
        modalities=_modalities(size, samples, rate),
        classes=source.classes,
        notes=_cut_notes(cut, len(said), samples / rate),
        domains=(*VOICES, *UNHEARD),
        shifts={"voices": columns["voices"]},
    )


def _m3(train: int, test: int, size: int, samples: int, rate: int, words: int, seed: int) -> AlignedData:
    pictures = _pictures(size)
    rng = np.random.default_rng([seed, 2])
    names = list(THINGS)
    count, many = train + test, len(names)
    thing, language = rng.integers(0, many, count), rng.integers(0, len(LANGUAGES), count)
    # named[i, l]: which thing the text names in language l; a permutation in which the meant language names the thing.
    named = rng.permuted(np.tile(np.arange(many), (count, 1)), axis=1)
    rows = np.arange(count)
    there = (named == thing[:, None]).argmax(1)
    named[rows, there] = named[rows, language]
    named[rows, language] = thing
    texts = [" ".join(THINGS[names[n]][code] for n, code in zip(row, LANGUAGES, strict=True)) for row in named]
    spoken, throats = rng.integers(0, many, count), rng.integers(0, len(THROATS), count)
    said = [
        (LANGUAGES[code] + THROATS[throat], *_manner(rng), THINGS[names[word]][LANGUAGES[code]])
        for code, throat, word in zip(language, throats, spoken, strict=True)
    ]
    sounds, cut = _sounds(said, samples, rate)

    def columns(part: slice) -> AlignedColumns:
        return AlignedColumns(
            {"image": Chosen(pictures, thing[part]), "text": texts[part], "audio": Spoken(sounds[part])},
            labels=thing[part].astype(np.int64),
            domains=language[part].astype(np.int64),
        )

    return AlignedData(
        name="speech",
        train=columns(slice(0, train)),
        test=columns(slice(train, count)),
        modalities=_modalities(size, samples, rate),
        classes=tuple(names),
        notes=_cut_notes(cut, count, samples / rate),
        domains=LANGUAGES,
    )


def _pictures(size: int) -> Any:
    """One icon of each thing, in the order of THINGS."""
    from counterpoint.data.images import ArrayImages

    icons, grey = glyphs._icons(("fa6-solid",), size)
    at = {icon.name: n for n, icon in enumerate(icons)}
    missing = [name for name in THINGS if name not in at]
    if missing:
        raise DataError(f"this version of qtawesome has no icon {', '.join(missing)}; install qtawesome==1.4.2")
    return ArrayImages(np.stack([grey[at[name]] for name in THINGS]))


def _modalities(size: int, samples: int, rate: int) -> dict[str, Modality]:
    return {
        "image": Modality("image", size=size),
        "text": Modality("text"),
        "audio": Modality("audio", rate=rate, samples=samples),
    }


def _manner(rng: np.random.Generator) -> tuple[int, int]:
    """Words a minute and pitch."""
    return int(rng.integers(150, 211)), int(rng.integers(30, 71))


def _cut_notes(cut: int, count: int, seconds: float) -> list[str]:
    return [f"speech: {cut} of {count} sounds are longer than {seconds:g} s and lose their end"] if cut else []


# --- the voice --------------------------------------------------------------------------------------------------------


def library() -> tuple[str, str]:
    """Where espeak NG's library and its data are; CounterpointError when the package is not installed."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise CounterpointError(
            "the data source 'speech' speaks with espeak NG, which is not installed: pip install 'counterpoint[speech]'"
        )
    import espeakng_loader

    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


def _sounds(said: Sequence[tuple[str, int, int, str]], samples: int, rate: int) -> tuple[NDArray[np.int16], int]:
    """int16 [n, samples] of what is said, (voice, words a minute, pitch, text) each, and how many were cut."""
    from filelock import FileLock

    key = hashlib.sha256(json.dumps([VERSION, list(said), samples, rate]).encode()).hexdigest()[:16]
    folder = cache_folder() / "speech"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{key}.npz"
    with FileLock(folder / ".lock"):
        kept = _kept(file, (len(said), samples))
        if kept is not None:
            return kept
        sounds, cut = np.zeros((len(said), samples), np.int16), 0
        for row, wave in enumerate(_speak(said)):
            wave = _resampled(wave, rate)
            cut += len(wave) > samples
            sounds[row, : min(samples, len(wave))] = wave[:samples]
        with replacing(file) as out:
            np.savez(out, sounds=sounds, cut=cut)
    return sounds, cut


def _kept(file: Any, shape: tuple[int, int]) -> tuple[NDArray[np.int16], int] | None:
    """What the cache has, or None where it has nothing usable."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            sounds, cut = stored["sounds"], int(stored["cut"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    return (sounds, cut) if sounds.shape == shape and sounds.dtype == np.int16 else None


def _resampled(wave: NDArray[np.int16], rate: int) -> NDArray[np.int16]:
    """From espeak's 22,050 Hz, without the silence before and after."""
    from scipy.signal import resample_poly

    loud = np.flatnonzero(np.abs(wave) > 200)
    if not len(loud):
        return wave[:0]
    wave = wave[loud[0] : loud[-1] + 1]
    common = int(np.gcd(rate, 22050))
    made = resample_poly(wave.astype(np.float64), rate // common, 22050 // common)
    return np.clip(np.rint(made), -32768, 32767).astype(np.int16)


def _speak(said: Sequence[tuple[str, int, int, str]]) -> Iterator[NDArray[np.int16]]:
    """What espeak NG makes of each, in a process of its own: its state is one for a process and would be the user's."""
    from rich.console import Console
    from rich.progress import track

    place = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", "from counterpoint.data.speech import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": place},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for number, job in enumerate(
            track(said, "speaking", console=Console(stderr=True), transient=True, disable=len(said) < 500)
        ):
            process.stdin.write((json.dumps(job) + "\n").encode())
            process.stdin.flush()
            head = process.stdout.read(4)
            size = struct.unpack("<i", head)[0] if len(head) == 4 else -1
            if size < 0:
                raise DataError(f"espeak NG could not say {job[3]!r} with the voice {job[0]} (the {number + 1}th)")
            yield np.frombuffer(process.stdout.read(2 * size), np.int16)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


def serve() -> None:
    """The speaking process: a line of JSON in, the number of samples and the samples out; -1 for a voice there is not."""
    path, data = library()
    espeak = ctypes.CDLL(path)
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    parts: list[NDArray[np.int16]] = []

    def take(wave: Any, count: int, events: Any) -> int:
        if wave and count > 0:
            parts.append(np.ctypeslib.as_array(wave, (count,)).astype(np.int16))
        return 0

    held = callback(take)
    synchronous, stay = 2, 0x8000
    if espeak.espeak_Initialize(synchronous, 0, data.encode(), stay) != 22050:
        return
    espeak.espeak_SetSynthCallback(held)
    rate, volume, pitch, utf8 = 1, 2, 3, 1
    for line in sys.stdin:
        voice, speed, height, text = json.loads(line)
        parts.clear()
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(0))  # it begins from the time of day
        wrong = espeak.espeak_SetVoiceByName(voice.encode())
        espeak.espeak_SetParameter(rate, speed, 0)
        espeak.espeak_SetParameter(pitch, height, 0)
        espeak.espeak_SetParameter(volume, 70, 0)  # of 100 some voices are clipped
        spoken = text.encode() + b"\0"
        wrong = wrong or espeak.espeak_Synth(spoken, len(spoken), 0, 1, 0, utf8, None, None)
        espeak.espeak_Synchronize()
        wave = np.concatenate(parts) if parts else np.zeros(0, np.int16)
        sys.stdout.buffer.write(struct.pack("<i", -1 if wrong else len(wave)) + (b"" if wrong else wave.tobytes()))
        sys.stdout.buffer.flush()
