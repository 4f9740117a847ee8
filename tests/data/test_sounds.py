"""Sound files: decoding, rates, length, and what is no sound."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.data import sounds
from counterpoint.data.pairs import WaveSplit
from counterpoint.data.sounds import EncodedWaves, check_sound, checked_rate, decode_sound, fitted, resampled
from counterpoint.errors import CounterpointError, DataError

pytest.importorskip("av")


def wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """Write [n] or [n, channels] floats as 16-bit WAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    return path


def tone(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def pitch_of(piece: np.ndarray, rate: int) -> float:
    return float(np.abs(np.fft.rfft(piece)).argmax() * rate / len(piece))


def test_a_wave_at_its_own_rate_comes_back_as_it_is(tmp_path):
    samples = tone(0.1, 8000)
    found = decode_sound(wav(tmp_path / "a.wav", samples, 8000), 8000, 800)
    assert found.rate == 8000 and found.wave.dtype == np.float32
    np.testing.assert_allclose(found.wave, samples, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_other_rates_keep_the_pitch_and_the_loudness(tmp_path, rate):
    path = wav(tmp_path / "a.wav", tone(1.0, rate), rate)
    found = decode_sound(path, 16000, 16000)
    assert found.rate == rate == check_sound(path)
    assert pitch_of(found.wave, 16000) == pytest.approx(440, abs=1)
    assert np.abs(found.wave[4000:12000]).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("seconds", [3.0, 30.0])  # the second is sought by the index
def test_a_longer_sound_is_cut_to_its_centre(tmp_path, seconds):
    samples = np.linspace(-1, 1, round(seconds * 16000))
    found = decode_sound(wav(tmp_path / "a.wav", samples, 16000), 16000, 16000)
    np.testing.assert_allclose(found.wave, fitted(samples.astype(np.float32), 16000), atol=1e-4)


def test_a_shorter_sound_is_padded_with_zeros(tmp_path):
    found = decode_sound(wav(tmp_path / "a.wav", tone(0.5, 16000), 16000), 16000, 16000).wave
    assert np.abs(found[:8000]).max() > 0.4 and not found[8000:].any()


def test_channels_are_averaged(tmp_path):
    left = tone(0.2, 16000)
    both = np.stack([left, np.zeros_like(left)], 1)
    found = decode_sound(wav(tmp_path / "a.wav", both, 16000), 16000, 3200).wave
    np.testing.assert_allclose(found, left / 2, atol=1e-4)


def test_bytes_and_files_give_the_same(tmp_path):
    path = wav(tmp_path / "a.wav", tone(9.0, 44100), 44100)
    np.testing.assert_array_equal(decode_sound(path, 16000, 800).wave, decode_sound(path.read_bytes(), 16000, 800).wave)


def test_sound_of_a_video_is_decoded(tmp_path):
    from counterpoint.data.media import write_video

    frames = [np.full((16, 16, 3), i, np.uint8) for i in range(48)]
    write_video(tmp_path / "a.mp4", frames, tone(2.0, 16000).astype(np.float32))
    found = decode_sound(tmp_path / "a.mp4", 16000, 16000).wave
    assert pitch_of(found, 16000) == pytest.approx(440, abs=1)
    write_video(tmp_path / "mute.mp4", frames, None)
    with pytest.raises(DataError, match="has no sound in it"):
        decode_sound(tmp_path / "mute.mp4", 16000, 16000)


def test_files_without_sound_raise_an_error(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "words.wav").write_text("not a sound at all" * 10)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n")
    wav(tmp_path / "none.wav", np.zeros(0), 16000)
    wav(tmp_path / "silent.wav", np.zeros(1600), 16000)
    for name, said in {
        "empty.wav": "is empty",
        "words.wav": "not a sound that can be read",
        "list.m3u8": "not a sound that can be read",
        "none.wav": "holds no sound|not a sound",
        "silent.wav": "is silent",
        "gone.wav": "no such file",
        "x\0y": "no such file|cannot be opened",
        "a" * 5000: "cannot be opened",
        ".": "is no file",
    }.items():
        with pytest.raises(DataError, match=said):
            decode_sound(tmp_path / name, 16000, 1600)


def test_numbers_that_are_no_sound_raise_an_error(tmp_path):
    from scipy.io import wavfile

    for values, said in (([0.5, np.nan] * 400, "not numbers"), ([20000.0, -3.0] * 400, "up to 2e.04")):
        wavfile.write(tmp_path / "a.wav", 16000, np.array(values, np.float32))
        with pytest.raises(DataError, match=said):
            decode_sound(tmp_path / "a.wav", 16000, 800)
        with pytest.raises(DataError, match=said):
            sounds.sound_of_numbers(values, 16000, 16000, 800)
    for values, rate, said in (
        ("abc", 8000, "not numbers"),
        ([0.5], 3, "impossible rate"),
        (np.ones((2, 2, 2)), 8000, "shape"),
    ):
        with pytest.raises(DataError, match=said):
            sounds.sound_of_numbers(values, rate, 16000, 10)


def test_numbers_give_the_same_sound_as_a_file(tmp_path):
    samples = tone(3.0, 8000)
    found = sounds.sound_of_numbers([samples, samples], 8000, 16000, 16000).wave
    want = decode_sound(wav(tmp_path / "a.wav", samples, 8000), 16000, 16000).wave
    np.testing.assert_allclose(found, want, atol=5e-3)


def test_lengths_and_rates_out_of_range_raise_an_error():
    assert checked_rate(16000, 0.5) == 8000
    for rate, seconds, said in ((10, 1, "1000 to 192000"), (16000, 0, "0.01"), (16000, float("nan"), "0.01")):
        with pytest.raises(CounterpointError, match=said):
            checked_rate(rate, seconds)
    with pytest.raises(ValueError, match="samples"):
        fitted(np.zeros(3, np.float32), 0)
    with pytest.raises(ValueError, match="rate"):
        resampled(np.zeros(3, np.float32), 0, 5)


@given(st.integers(1, 400), st.integers(1, 400))
def test_fitted_has_the_length_and_the_centre(n, samples):
    wave_ = np.arange(1, n + 1, dtype=np.float32)
    found = fitted(wave_, samples)
    assert len(found) == samples
    kept = found[found > 0]
    assert len(kept) == min(n, samples) and (np.diff(kept) == 1).all()
    assert abs((kept[0] - 1) - (n - kept[-1])) <= 1  # as much is cut off before as after


def test_sounds_are_read_on_demand(tmp_path):
    paths = [wav(tmp_path / f"{i}.wav", tone(0.1, 16000, 200 * (i + 1)), 16000) for i in range(3)]
    split = EncodedWaves(4, lambda i: [*paths, None][i], lambda i: f"sound {i}", 16000, 1600)
    assert isinstance(split, WaveSplit) and len(split) == 4
    found = split.waves(np.array([2, 3, 0]))
    assert pitch_of(found[0], 16000) == 600 and not found[1].any() and pitch_of(found[2], 16000) == 200
    paths[1].unlink()
    with pytest.raises(DataError, match="sound 1: no such file.*--resume"):
        split.waves(np.array([1]))


def test_resampled_sounds_are_counted_in_a_note():
    assert sounds.resampled_note({16000: 3}, 16000) == []
    assert "3 of 5 sounds" in sounds.resampled_note({16000: 2, 8000: 1, 44100: 2}, 16000)[0]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 255))
def test_damage_is_a_data_error_or_a_wave(tmp_path_factory, junk, at, byte):
    folder = tmp_path_factory.getbasetemp()
    good = bytearray(wav(folder / "fuzz.wav", tone(0.02, 8000), 8000).read_bytes())
    good[at % len(good)] = byte
    for content in (junk, b"RIFF" + junk, bytes(good), bytes(good[: at + 1])):
        try:
            found = decode_sound(content, 16000, 320).wave
        except DataError:
            continue
        assert found.shape == (320,) and np.isfinite(found).all() and np.abs(found).max() <= 1
