"""Spoken digits and commands, and digits with their words: splits, intents, transcripts, errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from counterpoint import data
from counterpoint.errors import CounterpointError, DataError

COMMANDS = "spoken-words:commands?train=8&test=2&intents=3&valid=0.25"


def recordings(folder: Path, **changes: object) -> None:
    """Write a small file in the form of fsdd.npz: 2 digits, 2 speakers, takes 0 to 9, each of 800 to 1,200 samples."""
    digit, speaker, take = (
        x.reshape(-1) for x in np.meshgrid(np.arange(2), ["ann", "bob"], np.arange(10), indexing="ij")
    )
    length = 800 + 10 * np.arange(len(digit))
    arrays = {
        "audio": np.concatenate([np.full(n, row + 1, np.int16) for row, n in enumerate(length)]),
        "length": length,
        "speaker": speaker,
        "digit": digit.astype(np.uint8),
        "take": take.astype(np.uint8),
        "rate": np.int64(8000),
    }
    np.savez(folder / "fsdd.npz", **(arrays | changes))


def test_recorded_digits_are_read_by_length_and_split_by_take(tmp_path, monkeypatch):
    recordings(tmp_path)
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    found = data.load("spoken-words?intents=2&train=40&seconds=0.11", task="aligned")
    assert found.classes == ("zero", "one")
    assert found.domains == ("ann", "bob")
    assert (len(found.train) + len(found.valid), len(found.test)) == (20, 20)
    values = set()
    for name, of_test in (("train", False), ("valid", False), ("test", True)):
        part = getattr(found, name)
        waves = np.rint(part.column("audio", np.arange(len(part))) * 32768).astype(int)
        for n, wave in enumerate(waves):
            row = wave[0] - 1  # all samples of a recording have its number
            values.add(row)
            assert (row % 10 < 5) == of_test
            assert part.labels[n] == row // 20
            assert part.domains[n] == row // 10 % 2
            assert (wave != 0).sum() == min(880, 800 + 10 * row)
            assert part.column("text", np.array([n])) == [("zero", "one")[row // 20]]
    assert values == set(range(40))
    assert any("31 of 40 sounds are longer than 0.11 s" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": np.int64(16000)}, "does not hold the expected arrays"),
        ({"length": np.arange(40)}, "does not hold the expected arrays"),
        ({"take": np.zeros(40, np.uint8)}, "has no training recording of the digit zero"),
    ],
)
def test_damaged_recordings_are_named(changes, said, tmp_path, monkeypatch):
    recordings(tmp_path, **changes)
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=said):
        data.load("spoken-words:recorded?intents=2", task="aligned")


def test_the_real_recordings_have_ten_digits_of_several_speakers():
    if not (Path(os.environ.get("COUNTERPOINT_DATA", "")) / "fsdd.npz").is_file():
        pytest.skip("needs fsdd.npz in $COUNTERPOINT_DATA")
    found = data.load("spoken-words?train=10&test=4", task="aligned")
    assert (len(found.train) + len(found.valid), len(found.test)) == (100, 40)
    assert len(found.domains) > 3
    assert np.abs(found.test.column("audio", np.arange(40))).max(1).min() > 0.01


def test_commands_have_an_intent_and_a_richer_transcript(monkeypatch):
    pytest.importorskip("espeakng_loader")
    monkeypatch.delenv("COUNTERPOINT_DATA", raising=False)
    found = data.load(COMMANDS, task="aligned")
    assert data.load(COMMANDS.replace(":commands", ""), task="aligned").classes == found.classes
    assert found.classes == ("turn on the lamp", "turn on the radio", "turn on the heating")
    assert [len(part) for part in (found.train, found.valid, found.test)] == [18, 6, 6]
    texts = found.train.column("text", np.arange(18))
    for text, label in zip(texts, found.train.labels, strict=True):
        assert found.classes[label].split()[-1] in text.split()
    assert len(set(texts)) > 6
    waves = found.train.column("audio", np.arange(18))
    assert waves.shape == (18, 25600)
    assert (np.abs(waves).max(1) > 0.05).all()
    again = data.load(COMMANDS, task="aligned").train.column("audio", np.arange(18))
    assert np.array_equal(waves, again)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("spoken-words:songs", CounterpointError, "unknown kind of spoken-words 'songs'"),
        ("spoken-words:recorded", DataError, "needs fsdd.npz: set COUNTERPOINT_DATA"),
        ("spoken-words?intents=1", CounterpointError, "2 to 12 intents"),
        ("spoken-words?train=1", CounterpointError, "train of at least 4"),
        ("spoken-words?seconds=11", CounterpointError, "seconds of 0.1 to 10, got 11"),
        ("digit-words?train=0", CounterpointError, "digit-words: train and test must be at least 1"),
        ("digit-words?noise=-1", CounterpointError, "noise at least 0"),
    ],
)
def test_options_out_of_range_are_named(name, error, said, monkeypatch):
    monkeypatch.delenv("COUNTERPOINT_DATA", raising=False)
    with pytest.raises(error, match=said):
        data.load(name, task="aligned")


def test_digits_have_their_word_and_no_digit_is_in_two_splits():
    found, other = (data.load(f"digit-words?train=30&test=8&noise={noise}", task="aligned") for noise in (0, 0.1))
    rows = {}
    for name, each in (("train", 30), ("valid", 8), ("test", 8)):
        part = getattr(found, name)
        assert np.bincount(part.labels).tolist() == [each] * 10
        rows[name] = {row.tobytes() for row in part.column("digit", np.arange(len(part)))}
        words = part.column("text", np.arange(len(part)))
        assert words == [found.classes[label] for label in part.labels]
        apart = other.train.column("digit", np.arange(300)) - found.train.column("digit", np.arange(300))
        assert apart.std() == pytest.approx(0.1, rel=0.05)
    assert not rows["train"] & rows["test"]
    assert not rows["valid"] & (rows["test"] | rows["train"])
