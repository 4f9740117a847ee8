"""Sound files, decoded to mono at one rate and one length: what `images` is for pictures (PyAV over FFmpeg).

How a file becomes a wave: its first sound stream, channels averaged, resampled to `rate`; what is longer than `samples`
gives its centre, what is shorter is followed by zeros. Only the piece that is kept is decoded where the file says how long
it is. Samples beyond [-1, 1] are cut off there. Silence, rubbish and values that are not numbers are errors, never a wave.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from counterpoint.data.images import Indices
from counterpoint.errors import CounterpointError, DataError

Wave = NDArray[np.float32]

SILENCE = 1e-4  # a wave that never exceeds this is silent (-80 dB of full scale)
LOUDEST = 8.0  # beyond this a wave of floats was not meant to lie in [-1, 1]
LONGEST = 600.0  # seconds that are decoded at most of a file that does not say how long it is
_NEAR = 5.0  # seconds: what starts later is sought by the file's index, not decoded up to


class Sound(NamedTuple):
    """A decoded piece: [samples] float32 in [-1, 1], and the file's own samples per second."""

    wave: Float[np.ndarray, " samples"]
    rate: int


class EncodedWaves:
    """Sounds that are decoded when asked for and not kept (a `WaveSplit`).

    Args:
        count: how many.
        read: position -> the sound's file, or its encoded bytes; None for an item without sound, which gives zeros.
        name: position -> what messages call it.
        rate: samples per second.
        samples: of every sound.
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
                    f"{self.name(int(index))}: {error}. Its header was good when the set was opened; mend the sound and "
                    "go on with --resume, or remove it and start again"
                ) from error
        return out


def checked_rate(rate: int, seconds: float) -> int:
    """Samples of `seconds` at `rate`; CounterpointError for what sound cannot have."""
    if not 1000 <= rate <= 192_000:
        raise CounterpointError(f"rate is the sounds' samples per second, 1000 to 192000; got {rate}")
    if not 0.01 <= seconds <= LONGEST:
        raise CounterpointError(f"seconds is the length of every sound, 0.01 to {LONGEST:g}; got {seconds:g}")
    return max(1, round(rate * seconds))


def fitted(wave: Float[np.ndarray, " n"], samples: int) -> Float[np.ndarray, " samples"]:
    """A wave of exactly `samples`: the centre of a longer one, zeros after a shorter one.

    >>> fitted(np.ones(2, np.float32), 3).tolist()
    [1.0, 1.0, 0.0]
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    start = max(0, (len(wave) - samples) // 2)
    piece = np.asarray(wave[start : start + samples], np.float32)
    return np.pad(piece, (0, samples - len(piece)))


def resampled(wave: Float[np.ndarray, " n"], rate: int, new: int) -> Float[np.ndarray, " m"]:
    """A wave at another rate, by a polyphase filter that lets nothing through above the lower of both limits.

    Args:
        wave: at `rate` samples per second.
        new: samples per second wanted; m is n * new / rate, rounded up.

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
    """Samples that are at hand as numbers, [n] or [channels, n], made a piece of `samples` at `new` per second.

    Raises DataError when they are not numbers, or silent.
    """
    try:
        wave = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError("its samples are not numbers") from error
    if not 100 <= rate <= 10**6:
        raise DataError(f"has an impossible rate, {rate} samples per second")
    if wave.ndim == 2:  # channels are the shorter side
        wave = wave.mean(0 if wave.shape[0] <= wave.shape[1] else 1)
    if wave.ndim != 1:
        raise DataError(f"its samples have the shape {list(wave.shape)}")
    # With a margin on both sides, for the filter would see an edge where the sound goes on.
    length = -(-samples * rate // new) + 32 * -(-max(rate, new) // new)
    if len(wave) > length:
        start = (len(wave) - length) // 2
        wave = wave[start : start + length]
    _checked(wave)
    return Sound(_checked(fitted(resampled(wave.astype(np.float32), rate, new), samples)), rate)


def _checked(wave: NDArray[Any]) -> Wave:
    """The wave cut off at [-1, 1]; DataError for one that holds nothing, or nothing that is sound."""
    if not len(wave):
        raise DataError("holds no sound")
    if not np.isfinite(wave).all():
        raise DataError("holds samples that are not numbers")
    peak = float(np.abs(wave).max())
    if peak < SILENCE:
        raise DataError("is silent")
    if peak > LOUDEST:
        raise DataError(f"has samples of up to {peak:.4g}; they should lie in -1 to 1")
    return np.asarray(wave, np.float32).clip(-1, 1)


# --- files ------------------------------------------------------------------------------------------------------------


class SoundInput:
    """An open file or its bytes and the first sound stream in it; DataError for what cannot be opened.

    with SoundInput(path) as found:
        found.rate, found.seconds
    """

    def __init__(self, source: Path | bytes) -> None:
        try:
            import av
        except ImportError as error:
            raise CounterpointError("reading sound needs PyAV: pip install 'counterpoint[video]'") from error
        self.av = av
        # What PyAV raises on broken data: its own errors, and Python's for values that fit no number.
        self.broken = (av.FFmpegError, ValueError, OverflowError, OSError, MemoryError)
        size = _size(source)
        if not size:
            raise DataError("is empty (0 bytes)")
        try:
            # Playlists could name other files, or addresses on the net: nothing but the file itself is opened.
            options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
            place: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
            self.container: Any = av.open(place, metadata_errors="ignore", options=options)
        except self.broken as error:
            raise DataError(f"not a sound that can be read ({_reason(error)})") from error
        try:
            streams = self.container.streams.audio
            if not streams:
                raise DataError("has no sound in it")
            self.stream: Any = streams[0]
            if self.stream.codec_context is None or self.stream.codec_context.codec is None:
                raise DataError("its sound codec is not known to this build of FFmpeg")
            self.rate = int(self.stream.codec_context.sample_rate or 0)
            if self.rate < 1:
                raise DataError("does not say its samples per second")
            duration = self.container.duration
            known = duration / 1e6 if duration else 0.0
            # A size of bytes that no such length of samples could have is a damaged header, unless it is compressed well.
            self.seconds = known if 0 < known < 1e7 else 0.0
            start = self.container.start_time
            self.origin = start / av.time_base if start is not None else 0.0
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> SoundInput:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.container.close()

    def piece(self, rate: int, start: float, samples: int | None) -> Wave:
        """Mono samples at `rate` from `start` seconds on, all there are up to LONGEST when `samples` is None."""
        stop = round(LONGEST * rate) if samples is None else samples
        if start > _NEAR:
            self.container.seek(round((self.origin + start - 1.0) * 1e6), backward=True)
        # Channels are averaged here: FFmpeg's own mix to mono is louder, and would clip.
        resampler = self.av.AudioResampler(format="fltp", rate=rate)
        parts: list[Wave] = []
        skip: int | None = None
        count = failures = 0
        damage = ""
        packets = iter(self.container.demux(self.stream))
        while count < stop and failures < 100:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else [None]
                failures = 0
                for frame in frames:
                    if frame is not None and skip is None:
                        first = frame.time if frame.time is not None and start > _NEAR else self.origin
                        skip = max(0, round((start + self.origin - first) * rate))
                    if frame is None and not parts and skip is None:
                        continue  # nothing was decoded, so there is nothing left inside the resampler
                    for out in resampler.resample(frame):
                        mono = out.to_ndarray().mean(0, dtype=np.float32)
                        drop = min(skip or 0, len(mono))
                        skip = (skip or 0) - drop
                        if drop < len(mono):
                            parts.append(mono[drop:])
                            count += len(mono) - drop
            except self.av.error.EOFError:
                continue
            except self.broken as error:
                failures += 1
                damage = damage or _reason(error)
                continue
            if packet is None:
                break
        if not parts and damage:
            raise DataError(f"damaged: nothing of its sound could be decoded ({damage})")
        return np.concatenate(parts)[:stop] if parts else np.zeros(0, np.float32)


# Containers that hold sound in themselves: no playlists, no device, no text that FFmpeg would read as one.
_FORMATS = (
    "wav,w64,aiff,au,caf,mp3,flac,ogg,mov,mp4,m4a,matroska,webm,avi,aac,ac3,amr,asf,mpeg,mpegts,flv,ape,wv,tta,3gp"
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
    except (OSError, ValueError) as error:  # a name too long, or with characters that no name has
        raise DataError(f"cannot be opened ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    said = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return said[0][:120] if said else type(error).__name__


def check_sound(source: Path | bytes) -> int:
    """The samples per second a file says it has, going by its header alone. DataError when this is no sound."""
    with SoundInput(source) as found:
        return found.rate


def decode_sound(source: Path | bytes, rate: int, samples: int) -> Sound:
    """The centre of a sound, as a file or its bytes (see the module).

    Args:
        source: a file in any container FFmpeg reads, a video's sound as well, or its bytes.
        rate: samples per second wanted.
        samples: wanted.

    Raises DataError when it cannot be read, is empty or silent.
    """
    with SoundInput(source) as found:
        try:
            if found.seconds:
                start = max(0.0, (found.seconds - samples / rate) / 2)
                wave = found.piece(rate, start, samples)
                if len(wave) or not start:
                    return Sound(_checked(fitted(wave, samples)) if len(wave) else _checked(wave), found.rate)
        except found.broken:  # formats without an index cannot be sought in
            pass
    # The header says more than there is, or nothing: all of it, then its centre.
    with SoundInput(source) as found:
        try:
            wave = found.piece(rate, 0.0, None)
        except found.broken as error:
            raise DataError(f"damaged ({_reason(error)})") from error
        return Sound(_checked(fitted(_checked(wave), samples)), found.rate)


def resampled_note(rates: Mapping[int, int], rate: int) -> list[str]:
    """A note for sounds by their own rate, when some are not at `rate`.

    >>> resampled_note({16000: 5, 44100: 2}, 16000)
    ['2 of 7 sounds resampled to 16000 Hz (44100 Hz: 2)']
    """
    other = Counter({own: count for own, count in rates.items() if own != rate})
    if not other:
        return []
    shown = ", ".join(f"{own} Hz: {count}" for own, count in sorted(other.items()))
    return [f"{sum(other.values())} of {sum(rates.values())} sounds resampled to {rate} Hz ({shown})"]
