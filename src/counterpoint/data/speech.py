"""`speech`: pictures, words and the spoken words, by espeak NG in many voices: three modalities of one item.

    pairing   image              text                               audio
    named     an icon            its name                           the name, spoken by one of the training voices
    m3        an icon of one     concepts' names, one in each       a random concept's name in one of the languages:
              of the concepts    language, in random order          only its language is informative

**named.** The names come from the source `glyphs` and have at most `words` words. Training and test share no name.
`shifts["voices"]` holds the test items again, in voices that training does not have: other accents of English, voices of other
languages that read English, other voice variants. Classes are the names' subjects, domains the voices.

**m3.** This is the problem of Symile (arXiv 2411.01053, its data Symile-M3) at small scale. The language of the audio selects
one word of the text, and the picture shows that word's concept. All of an item is drawn independently and uniformly:

    the selected concept and the language; the other words and their order; the drawing;
    the audio's word, voice variant, speed and pitch.

Exactly these relations follow:

    image and audio are independent; text and audio are independent;
    image and text are independent where there are as many concepts as languages (the default: every text then names
        every concept). With more concepts a text only tells which concepts it names: a guess from it is correct with
        probability 1 / `languages`;
    text and audio determine the image's concept; image and text determine the audio's language;
    image and audio determine one word of the text.

Classes are the concepts, domains the languages. `shifts["voices"]` holds the test items in voice variants that training does not
have. A concept has seven to thirteen drawings, and training and test use the same ones. So a search among pictures looks for
the concept, not for one picture.

Install it with `pip install 'counterpoint[speech]'`: the package espeakng-loader contains the library and the voices. espeak NG
is GPL-3.0-or-later. It runs in a separate process, and this package contains none of it. The licences of the icons are those
of `glyphs`. Not supported: recorded speech, whole sentences, languages without a voice in espeak NG.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import glyphs
from counterpoint.data.espeak import ESPEAK_RATE, Job, library, sounds_of
from counterpoint.data.images import ArrayImages, ImageSplit, Indices, Pixels
from counterpoint.data.pairs import AlignedColumns, AlignedData, ArrayWaves, Modality
from counterpoint.data.valid import SHARE, carve, checked_share
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

# Accents of English, voices of other languages that read English, and espeak's voice variants.
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
# The voice variants of m3: those in training, and those only in `shifts["voices"]`.
THROATS = ("", "+f2", "+m3", "+f4", "+m5")
STRANGE = ("+f3", "+m1", "+m7", "+f5")
LANGUAGES = ("en-us", "de", "fr", "es", "it")
# The concepts of m3, with names in the order of LANGUAGES. All spellings differ, whatever the case: a word gives its language.
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
    """Open the set; synthesise the sounds that are not in the cache (some seconds).

    Args:
        argument: not used; sources share a signature.
        task: "aligned"; sources share a signature.
        pairing: "named" or "m3".
        train, test: numbers of items, at least 1.
        valid: share of the training items, between 0 and 1. named: they are cut from the training items, by whole names. m3:
            so many items are drawn in addition.
        size: height and width of a picture in pixels.
        seconds: length of a sound, 0.1 to 10; longer ones are cut at the end, and the notes count them.
        rate: samples per second, 4000 to 22050. Some pretrained audio encoders (hf:) need 16,000.
        words: maximum number of words of a name, at least 1 (named).
        languages: take the first so many of LANGUAGES, 2 to 5; 0 for all (m3).
        concepts: take the first so many of CONCEPTS, at least as many as languages; 0 for as many as languages (m3).
        seed: seed of all draws, at least 0.

    Raises CounterpointError when a package is missing, an option does not fit the pairing, or there are too few icons.
    Raises DataError when espeak NG fails.

    >>> data = load(train=8, test=4)  # doctest: +SKIP
    >>> data.train.column("image", np.arange(2)).shape, data.train.column("audio", np.arange(2)).shape  # doctest: +SKIP
    ((2, 32, 32, 3), (2, 9600))
    """
    if task != "aligned":
        raise CounterpointError(f"speech is for the task aligned, not for {task}")
    if pairing not in ("named", "m3"):
        raise CounterpointError(f"speech: pairing must be named or m3, got {pairing!r}")
    if train < 1 or test < 1 or words < 1 or seed < 0:
        raise CounterpointError(
            f"speech needs train, test and words of at least 1 and a seed of at least 0; got {train=}, {test=}, "
            f"{words=}, {seed=}"
        )
    if not 0.1 <= seconds <= 10 or not 4000 <= rate <= ESPEAK_RATE:
        raise CounterpointError(
            f"speech needs seconds of 0.1 to 10 and a rate of 4000 to {ESPEAK_RATE}; got {seconds=}, {rate=}"
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
    """Pictures of another split at chosen positions, in any order, also repeated: an `ImageSplit`.

    Args:
        split: the other split.
        rows: [N] positions in it.
    """

    def __init__(self, split: ImageSplit, rows: Indices) -> None:
        self.split, self.rows = split, rows
        self.labels = None if split.labels is None else split.labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Pixels:
        """Return the pictures at [n] positions: [n, size, size, 3]."""
        return np.asarray(self.split.images(self.rows[np.asarray(indices)]))


# --- the pairings -----------------------------------------------------------------------------------------------------


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
                f"speech: glyphs has {counted(len(short), 'icon')} for {name} with names of at most {words} words, got "
                f"{name}={count}"
            )
        rows = np.sort(rng.permutation(short)[:count])
        parts[name] = split, rows, [names[n] for n in rows]
    said, voices = list[Job](), dict[str, Indices]()
    for name, heard in (("train", VOICES), ("test", VOICES), ("voices", UNHEARD)):
        texts = parts["test" if name == "voices" else name][2]
        drawn = rng.integers(0, len(heard), len(texts))
        voices[name] = drawn + (len(VOICES) if name == "voices" else 0)
        said += [(heard[v], *_manner(rng), text) for v, text in zip(drawn, texts, strict=True)]
    sounds, notes = sounds_of(said, samples, rate)
    at = dict(zip(("train", "test", "voices"), np.cumsum([0, train, test]), strict=True))
    keys = [glyphs.name_key(text.replace(" ", "-")) for text in parts["train"][2]]
    kept, watched = carve("speech", np.arange(train), valid, together=np.unique(keys, return_inverse=True)[1])

    def columns(name: str, chosen: Indices) -> AlignedColumns:
        """Return chosen items of a part as a split."""
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
    sounds, notes = sounds_of([*items.said(np.arange(count), THROATS), *items.said(in_test, STRANGE)], samples, rate)
    # The valid items come from a separate random stream, so that the others do not depend on them.
    more = _M3Items(np.random.default_rng([seed, 3]), valid, languages, drawings)
    heard, more_notes = sounds_of(more.said(np.arange(valid), THROATS), samples, rate)
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
        # named[i, l] is the concept that the text names in language l. Swap the meant concept with the concept at the
        # meant language: the result is uniform among the permutations with the meant concept there.
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
        """Return the jobs of items; their words come from all of CONCEPTS, also from concepts without pictures here."""
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
        """Return chosen items, with their sounds `heard`, as a split."""
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
    """Return the concepts' names, all drawings in their order, and for each concept the first position and the number."""
    names = list(CONCEPTS)[:concepts]
    icons, grey = glyphs.drawn_icons(
        tuple(style for style in glyphs.STYLES if not style.startswith(glyphs.OLDER)), size
    )
    # "star" and "star-fill", but not "star-alt" or "star-shooting", which are other pictures.
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
    """Draw words per minute and pitch (0 to 99)."""
    return int(rng.integers(150, 211)), int(rng.integers(30, 71))
