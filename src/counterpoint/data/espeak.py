"""Speech by espeak NG: synthesise texts once, and keep the sounds in the cache.

espeak NG is a library with one state for each process. Setting a voice or a seed would change other speech in the user's
process. Its output also depends slightly on its earlier output. So a separate process synthesises all texts in order, once, and
the cache keeps the sounds: the same bytes on every run. In a set of another size, the samples of the same word may differ.
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

from counterpoint.data import cached
from counterpoint.data.sounds import resampled
from counterpoint.errors import CounterpointError, DataError
from counterpoint.waiting import patient_track
from counterpoint.words import counted

ESPEAK_RATE = 22050
LOUD = 200  # of 32,767: quieter samples before and after a word are cut off
VERSION = 2  # of the texts and the synthesis: increase it with every change, or stale caches are read

Job = tuple[str, int, int, str]  # voice, words a minute, pitch of 0 to 99, text


def library() -> tuple[str, str]:
    """Return the paths of espeak NG's library and of its data. CounterpointError when the package is not installed."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise CounterpointError(
            "the data source 'speech' speaks with espeak NG, which is not installed: pip install 'counterpoint[speech]'"
        )
    import espeakng_loader

    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


def sounds_of(said: Sequence[Job], samples: int, rate: int) -> tuple[NDArray[np.int16], list[str]]:
    """Return the sounds of jobs, from the cache or synthesised into it, and notes for the user.

    Args:
        said: n jobs.
        samples: length of every sound; longer ones lose their end, zeros follow shorter ones.
        rate: samples per second.

    Returns int16 [n, samples] and the notes.
    """
    notes = list[str]()

    def build() -> cached.Arrays:
        sounds, lengths = np.zeros((len(said), samples), np.int16), np.zeros(len(said), np.int64)
        for row, wave in enumerate(speak(said)):
            wave = trimmed(wave, rate)
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
        notes.append(
            f"speech: {cut} of {counted(len(said), 'sound is', 'sounds are')} longer than {samples / rate:g} s and are cut at "
            "the end"
        )
    if silent:
        notes.append(f"speech: {silent} of {counted(len(said), 'sound is', 'sounds are')} silent")
    return sounds, notes


def trimmed(wave: NDArray[np.int16], rate: int) -> NDArray[np.int16]:
    """Cut the silence before and after a wave of espeak NG, and resample it to `rate` samples per second."""
    loud = np.flatnonzero(np.abs(wave.astype(np.int32)) > LOUD)
    if not len(loud):
        return wave[:0]
    made = resampled(wave[loud[0] : loud[-1] + 1].astype(np.float32), ESPEAK_RATE, rate)
    return np.clip(np.rint(made), -32768, 32767).astype(np.int16)


def speak(said: Sequence[Job]) -> Iterator[NDArray[np.int16]]:
    """Yield the sound of each job, int16 at ESPEAK_RATE, from a separate process. DataError names the text that fails."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            # -P: import nothing from the user's current folder.
            [sys.executable, "-P", "-c", "from counterpoint.data.espeak import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for voice, speed, pitch, text in patient_track(said, "speaking"):
                head = b""
                with contextlib.suppress(OSError):  # the process has ended; its standard error holds the reason
                    process.stdin.write((json.dumps([voice, speed, pitch, text]) + "\n").encode())
                    process.stdin.flush()
                    head = process.stdout.read(4)
                if len(head) < 4:
                    process.kill()
                    process.wait()
                    errors.seek(0)
                    last = errors.read().decode(errors="replace").strip().rpartition("\n")[2] or "no message"
                    raise DataError(f"espeak NG stopped at {text!r} with the voice {voice}: {last}")
                (size,) = struct.unpack("<i", head)
                if size < 0:
                    raise DataError(
                        f"espeak NG could not speak {text!r} with the voice {voice}; check that the voice exists"
                    )
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
    """Run the speaking process: read a job as a line of JSON, write the number of samples (-1: failure) and the samples."""
    path, data = library()
    espeak = ctypes.CDLL(path)
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    parts: list[NDArray[np.int16]] = []

    def take(wave: Any, count: int, events: Any) -> int:
        if wave and count > 0:
            parts.append(np.ctypeslib.as_array(wave, (count,)).astype(np.int16))
        return 0

    held = callback(take)  # keeps the callback alive while the library calls it
    synchronous, stay = 2, 0x8000  # without `stay` the library would end the process on an error
    if (rate := espeak.espeak_Initialize(synchronous, 0, data.encode(), stay)) != ESPEAK_RATE:
        raise SystemExit(f"expected a rate of {ESPEAK_RATE} Hz with the data in {data}, got {rate}")
    espeak.espeak_SetSynthCallback(held)
    speed, volume, pitch, utf8 = 1, 2, 3, 1
    for line in sys.stdin:
        voice, minute, height, text = json.loads(line)
        parts.clear()
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(0))  # the default seed is the time of day
        wrong = espeak.espeak_SetVoiceByName(voice.encode())
        espeak.espeak_SetParameter(speed, minute, 0)
        espeak.espeak_SetParameter(pitch, height, 0)
        espeak.espeak_SetParameter(volume, 70, 0)  # at 100 some voices clip
        spoken = text.encode() + b"\0"
        wrong = wrong or espeak.espeak_Synth(spoken, len(spoken), 0, 1, 0, utf8, None, None)
        espeak.espeak_Synchronize()
        wave = np.concatenate(parts) if parts else np.zeros(0, np.int16)
        sys.stdout.buffer.write(struct.pack("<i", -1 if wrong else len(wave)) + (b"" if wrong else wave.tobytes()))
        sys.stdout.buffer.flush()
