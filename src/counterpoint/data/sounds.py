"""Sound files, decoded to mono at one rate and one length, as `images` does for pictures (PyAV over FFmpeg).

A file becomes a wave in these steps:

    1. Take its default sound track.
    2. Average the channels, or take the louder one where they cancel.
    3. Resample to `rate`.
    4. Keep the centre of a longer sound; append zeros to a shorter one.

Times are those of the pictures in the same file (`media.clock`): zeros precede sound that starts late. Where the header's
length is not reliable, the packets are counted. Only the kept piece is decoded. Samples are clipped to [-1, 1]. Silence,
damaged data and values that are not finite are errors, never a wave.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from counterpoint.data.images import Indices
from counterpoint.data.media.clock import demuxed, reason
from counterpoint.data.media.opened import choose, clock_of, decodable, load_av, seekable
from counterpoint.data.media.random import measured_length
from counterpoint.data.media.waves import SILENCE, SoundLine
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

Wave = NDArray[np.float32]

LOUDEST = 8.0  # a wave of floats with a larger value was not scaled to [-1, 1]
LONGEST = 600.0  # maximum seconds of a piece
_NEAR = 5.0  # seconds: a piece that starts later is found by the file's index, not by decoding up to it
_BEFORE = 0.5  # seconds decoded before a piece, for codecs whose frames depend on earlier ones
_KEPT_BYTES = 32 * 2**20  # maximum bytes of packets kept between measuring a file and decoding a piece of it
_FAILURES = 100  # undecodable packets in a row after which decoding stops


class Sound(NamedTuple):
    """A decoded piece: [samples] float32 in [-1, 1], and the file's own samples per second."""

    wave: Float[np.ndarray, " samples"]
    rate: int


class EncodedWaves:
    """Sounds that are decoded on each access and not kept (a `WaveSplit`).

    Args:
        count: number of sounds.
        read: position -> the sound's file, or its encoded bytes; None for an item without sound, which gives zeros.
        name: position -> the item's name in messages.
        rate: samples per second.
        samples: number of samples of every sound.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[int], Path | bytes | None],
        name: Callable[[int], str],
        rate: int,
        samples: int,
    ) -> None:
        self.count, self.read, self.name, self.rate, self.samples = count, read, name, rate, samples

    def __len__(self) -> int:
        return self.count

    def waves(self, indices: Indices) -> Float[np.ndarray, "n samples"]:
        out = np.zeros((len(indices), self.samples), np.float32)
        for row, index in enumerate(indices):
            try:
                found = self.read(int(index))
                if found is not None:
                    out[row] = decode_sound(found, self.rate, self.samples).wave
            except DataError as error:
                raise DataError(
                    f"{self.name(int(index))}: {error}. Its header was valid when the set was opened; repair the sound and "
                    "continue with --resume, or remove it and start again"
                ) from error
        return out


def checked_rate(rate: int, seconds: float) -> int:
    """Return the number of samples of `seconds` at `rate`; CounterpointError for a value out of range.

    Args:
        rate: samples per second, 1000 to 192000.
        seconds: length of a sound, 0.01 to 600.
    """
    if not 1000 <= rate <= 192_000:
        raise CounterpointError(f"rate is the sounds' samples per second, 1000 to 192000; got {rate}")
    if not 0.01 <= seconds <= LONGEST:
        raise CounterpointError(f"seconds is the length of every sound, 0.01 to {LONGEST:g}; got {seconds:g}")
    return max(1, round(rate * seconds))


def fitted(wave: Float[np.ndarray, " n"], samples: int) -> Float[np.ndarray, " samples"]:
    """Return a wave of exactly `samples`: the centre of a longer wave, a shorter one with zeros after it.

    >>> fitted(np.ones(2, np.float32), 3).tolist()
    [1.0, 1.0, 0.0]
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    start = max(0, (len(wave) - samples) // 2)
    piece = np.asarray(wave[start : start + samples], np.float32)
    return np.pad(piece, (0, samples - len(piece)))


def resampled(wave: Float[np.ndarray, " n"], rate: int, new: int) -> Float[np.ndarray, " m"]:
    """Convert a wave to another rate by a polyphase filter, which removes frequencies above the lower Nyquist limit.

    Args:
        wave: [n] samples.
        rate: samples per second of the wave, at least 1.
        new: samples per second of the result, at least 1; its length m is n * new / rate, rounded up.

    >>> len(resampled(np.zeros(44_100, np.float32), 44_100, 16_000))
    16000
    """
    if rate < 1 or new < 1:
        raise ValueError(f"rate and new must be at least 1, got {rate} and {new}")
    if rate == new or not len(wave):
        return np.asarray(wave, np.float32)
    from scipy.signal import resample_poly

    ratio = Fraction(new, rate)
    return np.asarray(resample_poly(np.asarray(wave, np.float64), ratio.numerator, ratio.denominator), np.float32)


def sound_of_numbers(values: ArrayLike, rate: int, new: int, samples: int) -> Sound:
    """Convert samples given as numbers to a mono piece.

    Args:
        values: [n] or [channels, n] samples in [-1, 1].
        rate: their samples per second, 100 to 10^6.
        new: samples per second of the piece.
        samples: length of the piece.

    Raises DataError for values that are not numbers, another shape, a rate out of range, and silence.
    """
    try:
        wave = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError("its samples are not numbers") from error
    if not 100 <= rate <= 10**6:
        raise DataError(f"has an impossible rate, {rate} samples per second; it must be 100 to 1000000")
    if wave.ndim == 2:  # channels are the shorter side
        wave = wave.mean(0 if wave.shape[0] <= wave.shape[1] else 1)
    if wave.ndim != 1:
        raise DataError(f"its samples have the shape {list(wave.shape)}, expected [n] or [channels, n]")
    # A margin on both sides, because the filter would otherwise see an edge where the sound continues.
    length = -(-samples * rate // new) + 32 * -(-max(rate, new) // new)
    if len(wave) > length:
        start = (len(wave) - length) // 2
        wave = wave[start : start + length]
    _checked(wave)
    return Sound(_checked(fitted(resampled(wave.astype(np.float32), rate, new), samples)), rate)


def _checked(wave: NDArray[Any]) -> Wave:
    """Clip a wave to [-1, 1]; DataError for one that is empty, not finite, silent or out of scale."""
    if not len(wave):
        raise DataError("holds no sound")
    if not np.isfinite(wave).all():
        raise DataError("holds samples that are not numbers")
    peak = float(np.abs(wave).max())
    if peak < SILENCE:
        raise DataError("is silent")
    if peak > LOUDEST:
        raise DataError(f"has samples of up to {peak:.4g}; they must lie in -1 to 1")
    return np.asarray(wave, np.float32).clip(-1, 1)


# --- files ------------------------------------------------------------------------------------------------------------


class SoundInput:
    """An open sound file and its default sound track.

        with SoundInput(path) as found:
            found.rate, found.length()

    Args:
        source: a file in any container that FFmpeg reads, also a video, or the file's bytes.

    Raises DataError for a file that cannot be opened or has no sound track.
    """

    def __init__(self, source: Path | bytes) -> None:
        av = load_av()
        self.av = av
        # Errors that PyAV raises on damaged data: its own, and Python's for values out of range.
        self.broken = (av.FFmpegError, ValueError, OverflowError, OSError, MemoryError)
        size = _size(source)
        if not size:
            raise DataError("is empty (0 bytes)")
        try:
            # Playlists could name other files or network addresses: FFmpeg may open only the file itself.
            options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
            place: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
            self.container: Any = av.open(place, metadata_errors="ignore", options=options)
        except self.broken as error:
            raise DataError(f"not a sound that can be read ({reason(error)})") from error
        try:
            disposition, streams = av.stream.Disposition, self.container.streams
            self.stream: Any = choose(list(streams.audio), disposition)
            if self.stream is None:
                raise DataError("has no sound in it")
            if not decodable(self.stream):
                raise DataError("its sound codec is not known to this build of FFmpeg")
            self.rate = int(self.stream.codec_context.sample_rate or 0)
            if self.rate < 1:
                raise DataError("does not give its samples per second")
            cover = disposition.attached_pic | disposition.timed_thumbnails
            video = choose([s for s in streams.video if not s.disposition & cover], disposition)
            # The video track counts for the clock and for the length: the centre is that of the whole file.
            self.tracks = [self.stream] + ([video] if video is not None else [])
            self.clock = clock_of(av, self.container)
            self.kept: list[Any] | None = None  # all packets of the sound, where they were read for the length
            self.base = float(self.stream.time_base or 1)  # seconds per tick
            self.looked = False  # whether the container was read for the length
            self.again = True  # whether a piece can be read without reopening the file
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> SoundInput:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.container.close()

    def length(self) -> float:
        """Measure, by reading the file, the seconds from its start to the later end of its sound and its video."""
        kept: list[Any] | None = []
        size = 0

        def keep(packet: Any) -> None:
            nonlocal kept, size
            size += packet.size
            if packet.stream is self.stream and kept is not None:
                kept.append(packet)
            if size > _KEPT_BYTES:
                kept = None

        found = measured_length(self.container, self.tracks, self.clock, self.broken, keep)
        # Packets that were read are decoded from memory; where only the end was read, the index is used.
        self.kept = kept or None
        self.looked = True
        self.again = self.kept is not None or seekable(self.container)
        return found

    def piece(self, rate: int, start: float, samples: int) -> Wave:
        """Decode a mono piece.

        Args:
            rate: samples per second.
            start: seconds on the file's time line where the piece begins.
            samples: length of the piece.

        Gaps in the sound are zeros. Where the sound ends earlier, the piece is shorter than `samples`.

        Raises DataError when no packet of the piece can be decoded.
        """
        line = SoundLine(lambda: self.av.AudioResampler(format="fltp", rate=rate), rate, clean=False)
        first, stop, damage = round(start * rate), start + samples / rate, list[str]()
        failures, near = 0, True  # near: whether the latest time stamp lies where sound is wanted
        for packet in self._packets(max(0.0, start - _BEFORE), damage):
            try:
                frames = packet.decode()
                failures = 0
                for frame in frames:
                    time = self._time(frame)
                    if time is not None:
                        near = start - _BEFORE <= time < stop
                    if near:
                        line.add(frame, time)
            except self.av.error.EOFError:
                continue
            except self.broken as error:
                damage.append(reason(error))
                failures += 1
                if failures > _FAILURES:
                    break
            if line.end - first >= samples or self._later(packet, stop + _BEFORE):
                break
        line.close()
        if not line.started and damage:
            raise DataError(f"damaged: none of its sound could be decoded ({damage[0]})")
        end = min(line.end, first + samples)
        return line.window(end, max(0, end - first))

    def _packets(self, start: float, damage: list[str]) -> Iterator[Any]:
        """Yield the packets of the sound from `start` seconds on, or from an earlier point."""
        origin = self.clock.origin
        if self.kept is None and (start > _NEAR or self.looked) and origin is not None and seekable(self.container):
            target, back = max(start, 1e-3), 1.0
            while target > 0:
                self.container.seek(round((origin + target) / self.base), backward=True, stream=self.stream)
                self.clock.restart()
                packets = demuxed(self.container, [self.stream], self.clock, self.broken, damage)
                packet = next(packets, None)
                if packet is not None and (time := self._start(packet)) is not None and time <= start:
                    yield packet
                    yield from packets
                    return
                target, back = target - back, 2 * back
            self.container.seek(round(origin * 1e6), backward=True)
            self.clock.restart()
        # Without a reliable index, packets are counted from the first byte on, and decoded from `start` on.
        begun = dated = False
        whole = iter(self.kept or demuxed(self.container, self.tracks, self.clock, self.broken, damage))
        for packet in whole:
            if packet.stream is not self.stream:
                continue
            time = self._start(packet)
            dated = dated or time is not None
            begun = begun or (not dated if time is None else time >= start - _BEFORE)
            if begun or start <= _NEAR:
                yield packet

    def _start(self, packet: Any) -> float | None:
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None:
            return None
        if self.clock.origin is None:
            self.clock.origin = stamp * self.base
        return stamp * self.base - self.clock.origin

    def _later(self, packet: Any, time: float) -> bool:
        start = self._start(packet)
        return start is not None and start > time

    def _time(self, frame: Any) -> float | None:
        time = frame.time
        return None if time is None or self.clock.origin is None else float(time - self.clock.origin)


# Containers that hold the sound itself: no playlists, no devices, no text that FFmpeg would read as a playlist.
_FORMATS = (
    "wav,w64,aiff,au,caf,mp3,flac,ogg,mov,mp4,m4a,matroska,webm,avi,aac,ac3,amr,asf,mpeg,mpegts,flv,ape,wv,tta,3gp,nut"
)


def _size(source: Path | bytes) -> int:
    if isinstance(source, bytes):
        return len(source)
    try:
        if not source.exists():
            raise DataError("no such file")
        if not source.is_file():
            raise DataError("is no file")
        return source.stat().st_size
    except (OSError, ValueError) as error:  # a name that is too long or has invalid characters
        raise DataError(f"cannot be opened ({reason(error)})") from error


def check_sound(source: Path | bytes) -> int:
    """Return the samples per second in a file's header, without decoding it. DataError when this is no sound."""
    with SoundInput(source) as found:
        return found.rate


def decode_sound(source: Path | bytes, rate: int, samples: int) -> Sound:
    """Decode the centre of a sound, from its file or its bytes (see the module).

    Args:
        source: a file in any container that FFmpeg reads, also a video, or the file's bytes.
        rate: samples per second of the result.
        samples: length of the result.

    Raises DataError when the sound cannot be read, is empty or is silent.
    """
    wave = None
    with SoundInput(source) as found:
        start = max(0.0, (found.length() - samples / rate) / 2)
        if found.again:
            with contextlib.suppress(*found.broken):  # if a seek fails, the file is reopened below
                wave = found.piece(rate, start, samples)
        own = found.rate
    if wave is None:
        with SoundInput(source) as found:
            try:
                wave = found.piece(rate, start, samples)
            except found.broken as error:
                raise DataError(f"damaged ({reason(error)})") from error
    return Sound(fitted(_checked(wave), samples), own)


def resampled_note(rates: Mapping[int, int], rate: int) -> list[str]:
    """Return a note on the sounds that were resampled, or no note.

    Args:
        rates: samples per second of a file -> number of such sounds.
        rate: samples per second of the data.

    >>> resampled_note({16000: 5, 44100: 2}, 16000)
    ['2 of 7 sounds resampled to 16000 Hz (44100 Hz: 2)']
    """
    other = Counter({own: count for own, count in rates.items() if own != rate})
    if not other:
        return []
    shown = ", ".join(f"{own} Hz: {count}" for own, count in sorted(other.items()))
    return [f"{sum(other.values())} of {counted(sum(rates.values()), 'sound')} resampled to {rate} Hz ({shown})"]
