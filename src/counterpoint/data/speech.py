"""`speech`: pictures, words and the words spoken, by espeak NG in many voices: three modalities of one item.

    pairing   image              text                               audio
    named     an icon            its name                           the name, spoken by one of the training voices
    m3        an icon of one     concepts' names, one in each       some concept's name in one of the languages: it
              of the concepts    language, in random order          tells the language and nothing else

named: names of training and test are disjoint (those of the source `glyphs` of at most `words` words).
`shifts["voices"]` is the test items once more, in voices never heard in training: other accents of English, other
languages reading English, other throats. Classes are the names' subjects, domains the voices.

m3 is the problem of Symile (arXiv 2411.01053, its data Symile-M3) in small: the audio's language says which of the
text's words is meant, and the picture shows it. Per item the meant concept, the language, the other words and their
order, the drawing, the audio's word, throat, speed and pitch are drawn independently, each uniformly. So, exactly,

    image and audio are independent; text and audio are independent;
    image and text are independent where there are as many concepts as languages (the default: every text then names
        every concept). With more concepts a text tells which ones it names and nothing among them: a guess from it
        is right once in `languages`;
    from text and audio the image's concept follows, from image and text the audio's language.
        From image and audio follows one word of the text.

Classes are the concepts, domains the languages. `shifts["voices"]` is the test items in throats never heard in
training. A concept has seven to thirteen drawings, and training and test draw from the same ones: what is sought
among pictures is the concept, not the very picture.

espeak NG is one library with one state for a process: setting a voice or a seed would reach into whatever else in the
user's process speaks, and what it says depends a little on what it said before. So speech is made in order by a
process of its own, once, and kept in the cache: the same bytes on every run. The same word in a set of another size
may differ in its samples.

`pip install 'counterpoint[speech]'`: the package espeakng-loader brings library and voices. espeak NG is
GPL-3.0-or-later, runs in that process of its own, and nothing of it is in this package; the icons' licences are those
of `glyphs`. Not here: recorded speech, whole sentences, languages without a voice in espeak NG.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import cached, glyphs
from counterpoint.data.images import ArrayImages, ImageSplit, Indices, Pixels
from counterpoint.data.pairs import AlignedColumns, AlignedData, ArrayWaves, Modality
from counterpoint.data.sounds import resampled
from counterpoint.data.valid import SHARE, carve, checked_share
from counterpoint.errors import CounterpointError, DataError

ESPEAK_RATE = 22050
LOUD = 200  # of 32,767: what is quieter before and after a word is cut off
VERSION = 2  # of what is spoken and how: a change must change this, or stale caches are read
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
# The throats of m3, heard in training and not.
THROATS = ("", "+f2", "+m3", "+f4", "+m5")
STRANGE = ("+f3", "+m1", "+m7", "+f5")
LANGUAGES = ("en-us", "de", "fr", "es", "it")
# What m3 names, in the order of LANGUAGES. No two spellings are alike, capitals or not: a word tells its language.
CONCEPTS: dict[str, tuple[str, ...]] = {
    "star": ("star", "Stern", "étoile", "estrella", "stella"),
    "heart": ("heart", "Herz", "cœur", "corazón", "cuore"),
    "key": ("key", "Schlüssel", "clé", "llave", "chiave"),
    "fish": ("fish", "Fisch", "poisson", "pez", "pesce"),
    "tree": ("tree", "Baum", "arbre", "árbol", "albero"),
    "car": ("car", "Auto", "voiture", "coche", "macchina"),
    "sun": ("sun", "Sonne", "soleil", "sol", "sole"),
    "umbrella": ("umbrella", "Regenschirm", "parapluie", "paraguas", "ombrello"),
    "cloud": ("cloud", "Wolke", "nuage", "nube", "nuvola"),
    "leaf": ("leaf", "Blatt", "feuille", "hoja", "foglia"),
    "cat": ("cat", "Katze", "chat", "gato", "gatto"),
    "dog": ("dog", "Hund", "chien", "perro", "cane"),
    "horse": ("horse", "Pferd", "cheval", "caballo", "cavallo"),
    "eye": ("eye", "Auge", "œil", "ojo", "occhio"),
    "clock": ("clock", "Uhr", "horloge", "reloj", "orologio"),
    "bed": ("bed", "Bett", "lit", "cama", "letto"),
}

Job = tuple[str, int, int, str]  # voice, words a minute, pitch of 0 to 99, text


def load(
    argument: None = None,
    *,
    task: str = "aligned",
    pairing: str = "named",
    train: int = 4000,
    valid: float = SHARE,
    test: int = 1000,
    size: int = 32,
    seconds: float = 1.2,
    rate: int = 8000,
    words: int = 2,
    languages: int = 0,
    concepts: int = 0,
    seed: int = 0,
) -> AlignedData:
    """Open the set, speaking what is not in the cache (some seconds).

    Args:
        argument: not used; sources share a signature.
        task: "aligned"; sources share a signature.
        pairing: "named" or "m3".
        train, test: how many items.
        valid: share of the training items: of these themselves, by whole names (named), or as many in addition (m3).
        size: pixels of a picture, height and width.
        seconds: of sound; what is longer loses its end and is counted in the notes.
        rate: samples per second. Some pretrained audio encoders (hf:) want 16,000.
        words: of a name, at most (named).
        languages: the first so many of LANGUAGES, 2 to 5; 0 means all (m3).
        concepts: the first so many of CONCEPTS, at least as many as languages; 0 means as many as languages (m3).
        seed: of everything drawn.

    Raises CounterpointError when a package is missing, an option does not fit the pairing or the numbers ask for more
    than there is; DataError when espeak NG fails.

    >>> data = load(train=8, test=4)  # doctest: +SKIP
    >>> data.train.column("image", np.arange(2)).shape, data.train.column("audio", np.arange(2)).shape  # doctest: +SKIP
    ((2, 32, 32, 3), (2, 9600))
    """
    if task != "aligned":
        raise CounterpointError(f"speech is for the task aligned, not for {task}")
    if pairing not in ("named", "m3"):
        raise CounterpointError(f"speech: pairing is named or m3, got {pairing!r}")
    if train < 1 or test < 1 or words < 1 or seed < 0:
        raise CounterpointError(
            f"speech needs train, test and words of at least 1 and a seed of at least 0; got {train=}, {test=}, "
            f"{words=}, {seed=}"
        )
    if not 0.1 <= seconds <= 10 or not 4000 <= rate <= ESPEAK_RATE:
        raise CounterpointError(
            f"speech makes 0.1 to 10 seconds at a rate of 4000 to {ESPEAK_RATE}; got {seconds=}, {rate=}"
        )
    if pairing == "named" and (languages or concepts):
        raise CounterpointError("speech: languages and concepts are options of pairing=m3")
    if pairing == "m3" and words != 2:
        raise CounterpointError("speech: words is an option of pairing=named; the names of m3 are single words")
    checked_share("speech", valid)
    library()
    samples = round(seconds * rate)
    if pairing == "named":
        return _named(train, valid, test, size, samples, rate, words, seed)
    languages = languages or len(LANGUAGES)
    concepts = concepts or languages
    if not 2 <= languages <= len(LANGUAGES) or not languages <= concepts <= len(CONCEPTS):
        raise CounterpointError(
            f"speech has 2 to {len(LANGUAGES)} languages and at least as many concepts, up to {len(CONCEPTS)}; got "
            f"languages={languages}, concepts={concepts}"
        )
    return _m3(train, max(1, round(valid * train)), test, size, samples, rate, languages, concepts, seed)


class Chosen:
    """Some pictures of another split, in an order of their own, any of them repeatedly: an `ImageSplit`."""

    def __init__(self, split: ImageSplit, rows: Indices) -> None:
        self.split, self.rows = split, rows
        self.labels = None if split.labels is None else split.labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Pixels:
        """[n] positions -> [n, size, size, 3]."""
        return np.asarray(self.split.images(self.rows[np.asarray(indices)]))


# --- what is said -----------------------------------------------------------------------------------------------------


def _named(
    train: int, valid: float, test: int, size: int, samples: int, rate: int, words: int, seed: int
) -> AlignedData:
    source = glyphs.undivided(size, 4000)
    rng = np.random.default_rng([seed, 1])
    parts: dict[str, tuple[Any, Indices, list[str]]] = {}
    for name, split, count in (("train", source.train, train), ("test", source.test, test)):
        names = [str(text) for text in split.column("text", np.arange(len(split)))]
        short = np.array([n for n, text in enumerate(names) if len(text.split()) <= words], np.int64)
        if len(short) < count:
            raise CounterpointError(
                f"speech: glyphs has {len(short)} icons for {name} with names of at most {words} words, "
                f"asked for {count}"
            )
        rows = np.sort(rng.permutation(short)[:count])
        parts[name] = split, rows, [names[n] for n in rows]
    said, voices = list[Job](), dict[str, Indices]()
    for name, heard in (("train", VOICES), ("test", VOICES), ("voices", UNHEARD)):
        texts = parts["test" if name == "voices" else name][2]
        drawn = rng.integers(0, len(heard), len(texts))
        voices[name] = drawn + (len(VOICES) if name == "voices" else 0)
        said += [(heard[v], *_manner(rng), text) for v, text in zip(drawn, texts, strict=True)]
    sounds, notes = _sounds(said, samples, rate)
    at = dict(zip(("train", "test", "voices"), np.cumsum([0, train, test]), strict=True))
    keys = [glyphs.name_key(text.replace(" ", "-")) for text in parts["train"][2]]
    kept, watched = carve("speech", np.arange(train), valid, together=np.unique(keys, return_inverse=True)[1])

    def columns(name: str, chosen: Indices) -> AlignedColumns:
        """Some items of a part."""
        split, rows, texts = parts["test" if name == "voices" else name]
        return AlignedColumns(
            {
                "image": Chosen(split.columns["image"], rows[chosen]),
                "text": [texts[n] for n in chosen],
                "audio": ArrayWaves(sounds[at[name] + chosen]),
            },
            labels=None if split.labels is None else split.labels[rows[chosen]],
            domains=voices[name][chosen],
        )

    return AlignedData(
        name="speech",
        train=columns("train", kept),
        valid=columns("train", watched),
        test=columns("test", np.arange(test)),
        modalities=_modalities(size, samples, rate),
        classes=source.classes,
        notes=notes,
        domains=(*VOICES, *UNHEARD),
        shifts={"voices": columns("voices", np.arange(test))},
    )


def _m3(
    train: int, valid: int, test: int, size: int, samples: int, rate: int, languages: int, concepts: int, seed: int
) -> AlignedData:
    drawings = _drawings(size, concepts)
    rng = np.random.default_rng([seed, 2])
    count = train + test
    items = _M3Items(rng, count, languages, drawings)
    in_test = np.arange(train, count)
    sounds, notes = _sounds([*items.said(np.arange(count), THROATS), *items.said(in_test, STRANGE)], samples, rate)
    # In addition, from a stream of its own: the others do not depend on it.
    more = _M3Items(np.random.default_rng([seed, 3]), valid, languages, drawings)
    heard, more_notes = _sounds(more.said(np.arange(valid), THROATS), samples, rate)
    return AlignedData(
        name="speech",
        train=items.columns(np.arange(train), sounds[:train]),
        valid=more.columns(np.arange(valid), heard),
        test=items.columns(in_test, sounds[train:count]),
        modalities=_modalities(size, samples, rate),
        classes=tuple(drawings[0]),
        notes=notes + more_notes,
        domains=LANGUAGES[:languages],
        shifts={"voices": items.columns(in_test, sounds[count:])},
    )


class _M3Items:
    """Items of m3 drawn from a stream of random numbers; `said` draws more from it."""

    def __init__(
        self,
        rng: np.random.Generator,
        count: int,
        languages: int,
        drawings: tuple[list[str], ArrayImages, Indices, Indices],
    ) -> None:
        names, self.pictures, first, many = drawings
        concepts = len(names)
        items = np.arange(count)
        self.rng = rng
        self.meant, self.language = rng.integers(0, concepts, count), rng.integers(0, languages, count)
        # named[i, l] is the concept that the text names in language l. A permutation in which the meant concept has
        # changed places with the one that stood at the meant language is uniform among those that have it there.
        named = rng.permuted(np.tile(np.arange(concepts), (count, 1)), axis=1)
        stood = (named == self.meant[:, None]).argmax(1)
        named[items, stood] = named[items, self.language]
        named[items, self.language] = self.meant
        order = rng.permuted(np.tile(np.arange(languages), (count, 1)), axis=1)
        self.texts = [
            " ".join(CONCEPTS[names[concept[code]]][code] for code in codes)
            for concept, codes in zip(named, order, strict=True)
        ]
        self.drawn = first[self.meant] + rng.integers(0, many[self.meant])
        self.words = rng.integers(0, len(CONCEPTS), count)

    def said(self, where: Indices, throats: tuple[str, ...]) -> list[Job]:
        """What is to be spoken for these items: any word, however few concepts are pictured."""
        vocabulary = list(CONCEPTS.values())
        throat = self.rng.integers(0, len(throats), len(where))
        return [
            (
                LANGUAGES[self.language[i]] + throats[t],
                *_manner(self.rng),
                vocabulary[self.words[i]][self.language[i]],
            )
            for i, t in zip(where, throat, strict=True)
        ]

    def columns(self, where: Indices, heard: NDArray[np.int16]) -> AlignedColumns:
        """These items as a split."""
        return AlignedColumns(
            {
                "image": Chosen(self.pictures, self.drawn[where]),
                "text": [self.texts[i] for i in where],
                "audio": ArrayWaves(heard),
            },
            labels=self.meant[where],
            domains=self.language[where],
        )


def _drawings(size: int, concepts: int) -> tuple[list[str], ArrayImages, Indices, Indices]:
    """The concepts' names, all their drawings, where each concept's begin and how many there are."""
    names = list(CONCEPTS)[:concepts]
    icons, grey = glyphs.drawn_icons(
        tuple(style for style in glyphs.STYLES if not style.startswith(glyphs.OLDER)), size
    )
    # "star" and "star-fill", not "star-alt" and "star-shooting", which are other pictures.
    plain = {
        f"{name}{manner}": name
        for name in names
        for manner in ("", "-bold", "-fill", "-light", "-line", "-thin", "-outline")
    }
    concept = [plain.get(icon.name) for icon in icons]
    rows = [np.array([n for n, found in enumerate(concept) if found == name], np.int64) for name in names]
    missing = [name for name, found in zip(names, rows, strict=True) if not len(found)]
    if missing:
        raise DataError(f"this version of qtawesome has no icon {', '.join(missing)}; install qtawesome==1.4.2")
    many = np.array([len(found) for found in rows], np.int64)
    return names, ArrayImages(grey[np.concatenate(rows)]), np.cumsum(many) - many, many


def _modalities(size: int, samples: int, rate: int) -> dict[str, Modality]:
    return {
        "image": Modality("image", size=size),
        "text": Modality("text"),
        "audio": Modality("audio", rate=rate, samples=samples),
    }


def _manner(rng: np.random.Generator) -> tuple[int, int]:
    """Words a minute and pitch."""
    return int(rng.integers(150, 211)), int(rng.integers(30, 71))


# --- the voice --------------------------------------------------------------------------------------------------------


def library() -> tuple[str, str]:
    """Where espeak NG's library and its data are; CounterpointError when the package is not installed."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise CounterpointError(
            "the data source 'speech' speaks with espeak NG, which is not installed: pip install 'counterpoint[speech]'"
        )
    import espeakng_loader

    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


def _sounds(said: Sequence[Job], samples: int, rate: int) -> tuple[NDArray[np.int16], list[str]]:
    """int16 [n, samples] of what is said, from the cache or spoken into it, and what the user should know of it."""
    notes = list[str]()

    def build() -> cached.Arrays:
        sounds, lengths = np.zeros((len(said), samples), np.int16), np.zeros(len(said), np.int64)
        for row, wave in enumerate(_speak(said)):
            wave = _trimmed(wave, rate)
            lengths[row] = len(wave)
            sounds[row, : min(samples, len(wave))] = wave[:samples]
        return {"sounds": sounds, "lengths": lengths}

    def read(arrays: cached.Arrays) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        sounds, lengths = arrays["sounds"], arrays["lengths"]
        if sounds.shape != (len(said), samples) or sounds.dtype != np.int16 or lengths.shape != (len(said),):
            raise ValueError(f"{sounds.dtype} {list(sounds.shape)} in place of int16 {[len(said), samples]}")
        return sounds, lengths

    key = (VERSION, importlib.metadata.version("espeakng-loader"), list(said), samples, rate)
    sounds, lengths = cached.build_once("speech", key, build, read, notes=notes)
    cut, silent = int((lengths > samples).sum()), int((lengths == 0).sum())
    if cut:
        notes.append(f"speech: {cut} of {len(said)} sounds are longer than {samples / rate:g} s and lose their end")
    if silent:
        notes.append(f"speech: {silent} of {len(said)} sounds are silent")
    return sounds, notes


def _trimmed(wave: NDArray[np.int16], rate: int) -> NDArray[np.int16]:
    """From espeak NG's rate to this one, without the silence before and after."""
    loud = np.flatnonzero(np.abs(wave.astype(np.int32)) > LOUD)
    if not len(loud):
        return wave[:0]
    made = resampled(wave[loud[0] : loud[-1] + 1].astype(np.float32), ESPEAK_RATE, rate)
    return np.clip(np.rint(made), -32768, 32767).astype(np.int16)


def _speak(said: Sequence[Job]) -> Iterator[NDArray[np.int16]]:
    """What espeak NG makes of each job, int16 at ESPEAK_RATE, in a process of its own; DataError names what fails."""
    from rich.console import Console
    from rich.progress import track

    quiet = len(said) < 500 or os.environ.get("RANK", "0") != "0"
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            # -P: not what happens to stand in the folder the user is in.
            [sys.executable, "-P", "-c", "from counterpoint.data.speech import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for voice, speed, pitch, text in track(
                said, "speaking", console=Console(stderr=True), transient=True, disable=quiet
            ):
                head = b""
                with contextlib.suppress(OSError):  # it has died; what it wrote says why
                    process.stdin.write((json.dumps([voice, speed, pitch, text]) + "\n").encode())
                    process.stdin.flush()
                    head = process.stdout.read(4)
                if len(head) < 4:
                    process.kill()
                    process.wait()
                    errors.seek(0)
                    last = errors.read().decode(errors="replace").strip().rpartition("\n")[2] or "it said nothing"
                    raise DataError(f"espeak NG stopped at {text!r} with the voice {voice}: {last}")
                (size,) = struct.unpack("<i", head)
                if size < 0:
                    raise DataError(f"espeak NG could not say {text!r} with the voice {voice}: is there such a voice?")
                yield np.frombuffer(process.stdout.read(2 * size), np.int16)
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve() -> None:
    """The speaking process: a job as a line of JSON in, the number of samples (-1: it failed) and the samples out."""
    path, data = library()
    espeak = ctypes.CDLL(path)
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    parts: list[NDArray[np.int16]] = []

    def take(wave: Any, count: int, events: Any) -> int:
        if wave and count > 0:
            parts.append(np.ctypeslib.as_array(wave, (count,)).astype(np.int16))
        return 0

    held = callback(take)  # as long as the library calls it
    synchronous, stay = 2, 0x8000  # it would end the process itself
    if (rate := espeak.espeak_Initialize(synchronous, 0, data.encode(), stay)) != ESPEAK_RATE:
        raise SystemExit(f"it should speak at {ESPEAK_RATE} Hz with the data in {data}, and answers {rate}")
    espeak.espeak_SetSynthCallback(held)
    speed, volume, pitch, utf8 = 1, 2, 3, 1
    for line in sys.stdin:
        voice, minute, height, text = json.loads(line)
        parts.clear()
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(0))  # it begins from the time of day
        wrong = espeak.espeak_SetVoiceByName(voice.encode())
        espeak.espeak_SetParameter(speed, minute, 0)
        espeak.espeak_SetParameter(pitch, height, 0)
        espeak.espeak_SetParameter(volume, 70, 0)  # of 100 some voices are clipped
        spoken = text.encode() + b"\0"
        wrong = wrong or espeak.espeak_Synth(spoken, len(spoken), 0, 1, 0, utf8, None, None)
        espeak.espeak_Synchronize()
        wave = np.concatenate(parts) if parts else np.zeros(0, np.int16)
        sys.stdout.buffer.write(struct.pack("<i", -1 if wrong else len(wave)) + (b"" if wrong else wave.tobytes()))
        sys.stdout.buffer.flush()
