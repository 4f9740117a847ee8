"""`speech`: the same every time, disjoint names and voices, what is independent of what, and bad input."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from counterpoint.data import espeak, load, speech
from counterpoint.errors import CounterpointError, DataError

pytest.importorskip("espeakng_loader", reason="the extra [speech] is not installed")

SMALL = "speech?train=60&test=30&seconds=1.0"


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    """Draw icons once for all tests of this file."""
    folder = tmp_path_factory.mktemp("icons") / "glyphs"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, icons):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "glyphs").symlink_to(icons)
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


def every(data, name="audio", split="train"):
    part = getattr(data, split)
    return part.column(name, np.arange(len(part)))


def test_named_items_are_pictures_names_and_their_sounds():
    data = load(SMALL, task="aligned")
    assert list(data.modalities) == ["image", "text", "audio"]
    assert every(data, "image").shape == (54, 32, 32, 3)
    sounds = every(data)
    assert sounds.shape == (54, 8000)
    assert np.abs(sounds).max(1).min() > 0.05  # nothing is silent
    assert np.abs(sounds).max() < 1.0
    train, valid, test = (set(every(data, "text", split)) for split in ("train", "valid", "test"))
    assert len(data.valid) == 6
    assert not train & test
    assert not valid & (train | test)
    assert all(len(text.split()) <= 2 for text in train | valid | test)
    shift = data.shifts["voices"]
    rows = np.arange(len(shift))
    assert shift.column("text", rows) == every(data, "text", "test")
    assert np.array_equal(shift.column("image", rows), every(data, "image", "test"))
    assert not set(shift.domains) & set(data.train.domains)
    assert not set(speech.VOICES) & set(speech.UNHEARD)
    assert not np.array_equal(shift.column("audio", rows), every(data, "audio", "test"))


def test_another_process_without_a_cache_says_the_same(tmp_path):
    said = [("en-us", 170, 50, "arrow left"), ("fr+f2", 160, 60, "clé"), ("en-us", 170, 50, "arrow left")]
    one, _ = espeak.sounds_of(said, 8000, 8000)
    code = (
        "import os, sys, numpy as np; os.environ['COUNTERPOINT_CACHE'] = sys.argv[1]\n"
        "from counterpoint.data import espeak\n"
        f"sys.stdout.buffer.write(espeak.sounds_of({said!r}, 8000, 8000)[0].tobytes())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], capture_output=True, check=True)
    assert out.stdout == one.tobytes()


def test_it_is_read_from_the_cache_and_a_damaged_one_is_made_again(monkeypatch, tmp_path):
    few = "speech?train=10&test=5&seconds=1.0"
    first = every(load(few, task="aligned"))
    (file,) = (tmp_path / "cache" / "speech").glob("*.npz")
    with monkeypatch.context() as m:
        m.setattr(espeak, "speak", lambda said: pytest.fail("spoken again"))
        assert np.array_equal(every(load(few, task="aligned")), first)
    for damage in (b"damaged", file.read_bytes()[:5000]):
        file.write_bytes(damage)
        again = load(few, task="aligned")
        assert np.array_equal(every(again), first)
        assert any("damaged" in note for note in again.notes)
    assert not any("damaged" in note for note in load(few, task="aligned").notes)


def test_the_same_word_in_two_voices_is_nearer_than_another_word():
    words = ("banana", "telephone", "umbrella")
    said = [(voice, 170, 50, word) for word in words for voice in ("en-us", "en-us+f2")]
    sounds, notes = espeak.sounds_of(said, 8000, 8000)
    assert notes == []
    spectra = np.abs(np.fft.rfft(sounds.reshape(6, 40, 200) * np.hanning(200), axis=2))[..., :60]
    shape = np.log1p(spectra.reshape(6, 40, 12, 5).sum(3)).reshape(6, -1)
    shape -= shape.mean(1, keepdims=True)
    shape /= np.linalg.norm(shape, axis=1, keepdims=True)
    alike = shape @ shape.T
    for word in range(3):
        same = alike[2 * word, 2 * word + 1]
        others = [alike[2 * word, n] for n in range(6) if n // 2 != word]
        assert same > max(others)


def in_m3(monkeypatch, options):
    """Make an m3 set without its sounds; return it with its spoken words.

    Also return, for each item, {language: concept} and the order of languages.
    """
    jobs = []

    def silent(said, samples, rate):
        jobs.extend(said)
        return np.zeros((len(said), samples), np.int16), []

    monkeypatch.setattr(speech, "sounds_of", silent)
    data = load(f"speech?pairing=m3&seconds=0.1&rate=4000&{options}", task="aligned")
    names = list(speech.CONCEPTS)
    meaning = {w: (c, n) for c, name in enumerate(names) for n, w in enumerate(speech.CONCEPTS[name])}
    read = [[meaning[word] for word in text.split()] for text in every(data, "text")]
    return data, jobs, [{n: c for c, n in words} for words in read], np.array([[n for _, n in w] for w in read])


def p_independent(*causes):
    """Compute the p-value of the chi-square test that the last of some numberings is independent of the others together."""
    from scipy.stats import chi2_contingency

    numbered = [
        np.unique(c, axis=0, return_inverse=True)[1].reshape(-1) for c in (np.stack(causes[:-1], 1), causes[-1])
    ]
    table = np.zeros([n.max() + 1 for n in numbered])
    np.add.at(table, tuple(numbered), 1)
    return chi2_contingency(table).pvalue


def test_m3_spellings_tell_their_language():
    words = [word.casefold() for concept in speech.CONCEPTS.values() for word in concept]
    assert len(set(words)) == len(words) == len(speech.CONCEPTS) * len(speech.LANGUAGES)


@pytest.mark.parametrize("options", ["", "languages=2", "languages=3&concepts=10"])
def test_m3_two_modalities_tell_the_third(monkeypatch, options):
    data, jobs, named, order = in_m3(monkeypatch, f"train=500&test=50&{options}")
    languages = len(data.domains)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(languages), (500, 1)))
    for meant, language, said, text in zip(data.train.labels, data.train.domains, jobs, named, strict=False):
        assert text[language] == meant
        assert len(set(text.values())) == languages
        voice, _, _, word = said
        assert voice.partition("+")[0] == data.domains[language]
        assert word in [words[language] for words in speech.CONCEPTS.values()]
    pictures = every(data, "image")[..., 0].reshape(500, -1)
    meant_by = {}
    for picture, meant in zip(pictures, data.train.labels, strict=True):
        assert meant_by.setdefault(picture.tobytes(), meant) == meant
    assert len(meant_by) > 4 * len(data.classes)  # drawings


def test_m3_modalities_are_pairwise_independent(monkeypatch):
    count = 12000
    data, jobs, named, order = in_m3(monkeypatch, f"train={count}&test=1")
    meant, language = data.train.labels, data.train.domains
    assert np.bincount(meant).min() > 0.9 * count / 5
    assert np.bincount(language).min() > 0.9 * count / 5
    assert len({tuple(sorted(text.values())) for text in named}) == 1  # every text names every concept
    words = [speech.CONCEPTS[c] for c in speech.CONCEPTS]
    spoken = np.array([next(n for n, w in enumerate(words) if job[3] in w) for job in jobs[:count]])
    throat = np.array(
        [speech.THROATS.index(job[0].removeprefix(data.domains[n])) for job, n in zip(jobs, language, strict=False)]
    )
    drawing = np.unique(every(data, "image")[..., 0].reshape(count, -1), axis=0, return_inverse=True)[1].reshape(-1)
    first = order[:, 0]
    slots = {n: np.array([text[n] for text in named]) for n in range(5)}
    independent = {
        "image and audio": (meant, spoken, language),
        "drawing and audio": (drawing, language),
        "throat and language": (throat, language),
        "throat and image": (throat, meant),
        "order and image": (first, meant),
        "order and audio": (first, language),
        "two words of the text and the image": (slots[0], slots[3], meant),
        "two words of the text and the audio": (slots[0], slots[3], language),
        "word and place and image": (slots[1], first, meant),
    }
    found = {name: p_independent(*causes) for name, causes in independent.items()}
    assert min(found.values()) > 0.01, found
    # The same test sees what does depend.
    assert p_independent(slots[2], language, meant) < 1e-9
    assert p_independent(spoken, np.array([job[3] for job in jobs[:count]])) < 1e-9


def test_m3_with_more_concepts_a_text_tells_which_but_not_the_one(monkeypatch):
    count = 12000
    data, _, named, order = in_m3(monkeypatch, f"train={count}&test=1&languages=3&concepts=8")
    place = np.array(
        [[text[n] for n in row].index(meant) for text, row, meant in zip(named, order, data.train.labels, strict=True)]
    )
    share = np.bincount(place, minlength=3) / count
    assert np.abs(share - 1 / 3).max() < 0.015
    assert p_independent(place, data.train.labels) > 0.01
    assert p_independent(data.train.labels, data.train.domains) > 0.01
    assert p_independent(np.array([text[0] for text in named]), data.train.domains) > 0.01


def test_m3_speaks_and_its_other_voices_are_the_test_items_again():
    data = load("speech?pairing=m3&train=20&test=10", task="aligned")
    shift = data.shifts["voices"]
    for sounds in (every(data), every(data, split="test"), shift.column("audio", np.arange(10))):
        assert np.abs(sounds).max(1).min() > 0.05
    assert shift.column("text", np.arange(10)) == every(data, "text", "test")
    assert np.array_equal(shift.domains, data.test.domains)
    assert not np.array_equal(shift.column("audio", np.arange(10)), every(data, split="test"))
    assert not set(speech.THROATS) & set(speech.STRANGE)
    assert data.spec["modalities"]["audio"] == {"kind": "audio", "rate": 8000, "samples": 9600}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("pairing=other", "named or m3"),
        ("train=0", "at least 1"),
        ("rate=100", "4000"),
        ("train=90000", "got train=90000"),
        ("seconds=20", "seconds of 0.1 to 10"),
        ("seed=-1", "seed of at least 0"),
        ("languages=3", "options of pairing=m3"),
        ("pairing=m3&words=3", "option of pairing=named"),
        ("pairing=m3&languages=1", "2 to 5 languages"),
        ("pairing=m3&languages=3&concepts=2", "at least as many concepts"),
        ("pairing=m3&concepts=99", "up to 16"),
        ("size=2", "pixels"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(CounterpointError, match=said):
        load(f"speech?{options}", task="aligned")


def test_a_speaking_process_that_dies_is_an_error(monkeypatch):
    said = [("en-us", 170, 50, "word")]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="stopped at 'word'"):
        espeak.sounds_of(said, 100, 8000)


def test_what_cannot_be_spoken_is_silent_and_counted():
    sounds, notes = espeak.sounds_of([("en-us", 170, 50, " ")], 100, 8000)
    assert not sounds.any()
    assert notes == ["speech: 1 of 1 sound is silent"]


def test_long_names_are_cut_and_counted():
    data = load("speech?train=60&test=30&seconds=0.3", task="aligned")
    assert "are cut at the end" in data.notes[0]


def test_a_voice_there_is_not_is_an_error():
    with pytest.raises(CounterpointError, match="no-such-voice"):
        espeak.sounds_of([("no-such-voice", 170, 50, "word")], 100, 8000)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(espeak.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CounterpointError, match=r"counterpoint\[speech\]"):
        load(SMALL, task="aligned")
