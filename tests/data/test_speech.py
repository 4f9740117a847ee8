"""`speech`: the same every time, disjoint names and voices, what is independent of what, and bad input."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from counterpoint.data import load, speech
from counterpoint.errors import CounterpointError

pytest.importorskip("espeakng_loader", reason="the extra [speech] is not installed")

SMALL = "speech?train=60&test=30&seconds=1.0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


def every(data, name="audio", split="train"):
    part = getattr(data, split)
    return part.column(name, np.arange(len(part)))


def test_named_items_are_pictures_names_and_their_sounds():
    data = load(SMALL, task="aligned")
    assert list(data.modalities) == ["image", "text", "audio"]
    assert every(data, "image").shape == (60, 32, 32, 3)
    sounds = every(data)
    assert sounds.shape == (60, 8000)
    assert np.abs(sounds).max(1).min() > 0.05  # nothing is silent
    assert np.abs(sounds).max() < 1.0
    train, test = set(every(data, "text")), set(every(data, "text", "test"))
    assert not train & test
    assert all(len(text.split()) <= 2 for text in train | test)
    shift = data.shifts["voices"]
    rows = np.arange(len(shift))
    assert shift.column("text", rows) == every(data, "text", "test")
    assert np.array_equal(shift.column("image", rows), every(data, "image", "test"))
    assert not set(shift.domains) & set(data.train.domains)
    assert not set(speech.VOICES) & set(speech.UNHEARD)
    assert not np.array_equal(shift.column("audio", rows), every(data, "audio", "test"))


def test_another_process_without_a_cache_says_the_same(tmp_path):
    said = [("en-us", 170, 50, "arrow left"), ("fr+f2", 160, 60, "clé"), ("en-us", 170, 50, "arrow left")]
    one, _ = speech._sounds(said, 8000, 8000)
    code = (
        "import os, sys, numpy as np; os.environ['COUNTERPOINT_CACHE'] = sys.argv[1]\n"
        "from counterpoint.data import speech\n"
        f"sys.stdout.buffer.write(speech._sounds({said!r}, 8000, 8000)[0].tobytes())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], capture_output=True, check=True)
    assert out.stdout == one.tobytes()


def test_it_is_read_from_the_cache_and_a_damaged_one_is_made_again(monkeypatch, tmp_path):
    first = every(load(SMALL, task="aligned"))
    (file,) = (tmp_path / "cache" / "speech").glob("*.npz")
    with monkeypatch.context() as m:
        m.setattr(speech, "_speak", lambda said: pytest.fail("spoken again"))
        assert np.array_equal(every(load(SMALL, task="aligned")), first)
    file.write_bytes(b"damaged")
    assert np.array_equal(every(load(SMALL, task="aligned")), first)


def test_the_same_word_in_two_voices_is_nearer_than_another_word():
    words = ("banana", "telephone", "umbrella")
    said = [(voice, 170, 50, word) for word in words for voice in ("en-us", "en-us+f2")]
    sounds, cut = speech._sounds(said, 8000, 8000)
    assert cut == 0
    spectra = np.abs(np.fft.rfft(sounds.reshape(6, 40, 200) * np.hanning(200), axis=2))[..., :60]
    shape = np.log1p(spectra.reshape(6, 40, 12, 5).sum(3)).reshape(6, -1)
    shape -= shape.mean(1, keepdims=True)
    shape /= np.linalg.norm(shape, axis=1, keepdims=True)
    alike = shape @ shape.T
    for word in range(3):
        same = alike[2 * word, 2 * word + 1]
        others = [alike[2 * word, n] for n in range(6) if n // 2 != word]
        assert same > max(others)


def test_m3_is_told_by_two_and_by_no_one(monkeypatch):
    # Nothing of this is about sounds.
    monkeypatch.setattr(speech, "_sounds", lambda said, samples, rate: (np.zeros((len(said), samples), np.int16), 0))
    data = load("speech?pairing=m3&train=3000&test=100&seconds=0.1", task="aligned")
    thing, language = data.train.labels, data.train.domains
    texts = [text.split() for text in every(data, "text")]
    names = list(speech.THINGS)
    for t, code, text in zip(thing, language, texts, strict=True):
        assert text[code] == speech.THINGS[names[t]][speech.LANGUAGES[code]]
        assert {next(n for n in names if w in speech.THINGS[n].values()) for w in text} == set(names)
    table = np.zeros((5, 5))
    np.add.at(table, (thing, language), 1)
    assert np.abs(table / 3000 - 1 / 25).max() < 0.012
    # Of any one slot of the text the picture says nothing, nor does the language.
    for slot, cause in itertools.product(range(5), (thing, language)):
        words = sorted({text[slot] for text in texts})
        counts = np.zeros((5, len(words)))
        np.add.at(counts, (cause, [words.index(text[slot]) for text in texts]), 1)
        share = counts / counts.sum(1, keepdims=True)
        assert np.abs(share - share.mean(0)).max() < 0.09
    pictures = every(data, "image")
    assert len({pictures[n].tobytes() for n in range(300)}) == 5


def test_m3_speaks(tmp_path: Path):
    data = load("speech?pairing=m3&train=20&test=10", task="aligned")
    assert np.abs(every(data)).max(1).min() > 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("pairing=other", "named or m3"),
        ("train=0", "at least 1"),
        ("rate=100", "4000"),
        ("train=90000", "asked for 90000"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(CounterpointError, match=said):
        load(f"speech?{options}", task="aligned")


def test_long_names_are_cut_and_counted():
    data = load("speech?train=60&test=30&seconds=0.3", task="aligned")
    assert "lose their end" in data.notes[0]


def test_a_voice_there_is_not_is_an_error():
    with pytest.raises(CounterpointError, match="no-such-voice"):
        speech._sounds([("no-such-voice", 170, 50, "word")], 100, 8000)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CounterpointError, match=r"counterpoint\[speech\]"):
        load(SMALL, task="aligned")
