"""Put decoded sound on the time line, as mono samples at one rate."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

SILENCE = 1e-4  # sound that never exceeds this is silent (-80 dB of full scale)
DRIFT = 0.05  # seconds: smaller gaps and overlaps are a codec's padding or a clock's rounding


class SoundLine:
    """Mono sound at one rate, placed by time. Samples that were used are discarded.

    Channels are averaged. Where they cancel each other in the first second of sound, the louder channel is used instead.
    That choice (`channel`) holds for the whole file. The rate, format or layout may change within the file.

    Args:
        resampler: Function that makes a resampler for the rate (`av.AudioResampler` with the format "fltp").
        rate: Samples per second.
        clean: Replace values that are not numbers, and clip to [-1, 1]. False: keep samples unchanged.
    """

    def __init__(self, resampler: Any, rate: int, *, clean: bool = True) -> None:
        self._make, self.rate, self.clean = resampler, rate, clean
        self._resampler: Any = None
        self._kind: tuple[str, str, int] | None = None
        self.parts: deque[tuple[int, NDArray[np.float32]]] = deque()  # first sample's number, samples
        self.end = 0  # number after the last sample
        self.started = False
        self.peak = 0.0
        self.channel: int | None = None  # the channel that is used instead of the mean
        self.cancelled = 0  # number of samples where the channels cancel although the mean was chosen
        self._decided = False
        self._held: list[NDArray[np.float32]] = []  # [channels, n]: samples held until the choice
        self._ahead = 0  # number of samples in `_held`

    def add(self, frame: Any, time: float | None) -> None:
        """Add a decoded frame that begins at `time` seconds. None: at the end of the last frame."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind:
            self._flush()
            self._resampler, self._kind = self._make(), kind
        skip = 0
        if time is not None:
            at = round(time * self.rate)
            gap = at - self.end - self._ahead
            if gap > DRIFT * self.rate or (not self.started and gap < -DRIFT * self.rate):
                self._flush()
                self._resampler = self._make()
                self.end = at
            elif gap < -DRIFT * self.rate:
                skip = -gap  # the frame overlaps earlier samples: the end of one recording and the start of the next
        self.started = True
        for out in self._resampler.resample(frame):
            skip -= self._take(out.to_ndarray(), skip)

    def close(self) -> None:
        """Add the samples that the resampler and the choice of channel still hold. Call it after the last frame."""
        self._flush()

    def window(self, stop: int, length: int) -> NDArray[np.float32]:
        """Return samples stop-length..stop, with zeros where there is no sound. Discard all earlier samples."""
        start = stop - length
        while self.parts and self.parts[0][0] + len(self.parts[0][1]) <= start:
            self.parts.popleft()
        out = np.zeros(length, np.float32)
        for position, part in self.parts:
            if position >= stop:
                break
            low, high = max(position, start), min(position + len(part), stop)
            if low < high:
                out[low - start : high - start] = part[low - position : high - position]
        return out

    def _flush(self) -> None:
        if self._resampler is not None:
            for out in self._resampler.resample(None):
                self._take(out.to_ndarray(), 0)
            self._resampler = None
        if self._held:
            self._decide()

    def _take(self, channels: NDArray[np.float32], skip: int) -> int:
        """Add samples [channels, n] without the first `skip`. Return the number of skipped samples."""
        skipped = min(max(0, skip), channels.shape[1])
        channels = channels[:, skipped:]
        if not channels.shape[1]:
            return skipped
        if len(channels) == 1 or self._decided:
            if self._held:
                self._decide()
            self._append(channels)
        elif not self._held and np.abs(channels).max() < SILENCE:
            self._append(channels)  # silent with either choice
        else:
            if self._held and len(self._held[0]) != len(channels):
                self._decide()
                self._append(channels)
                return skipped
            self._held.append(channels)
            self._ahead += channels.shape[1]
            if self._ahead >= self.rate:
                self._decide()
        return skipped

    def _decide(self) -> None:
        """Choose between the mean and the louder channel, then add the held samples."""
        held, self._held, self._ahead = self._held, [], 0
        sound = np.concatenate(held, 1).astype(np.float64)
        sound = np.nan_to_num(sound)
        power = (sound**2).mean(1)
        mean = float((sound.mean(0) ** 2).mean())
        # Sound in only one channel keeps 1 / channels^2 of its power in the mean. Channels that cancel keep much less.
        if mean < 0.25 * float(power.max()) / len(power) ** 2:
            self.channel = int(power.argmax())
        self._decided = True
        for part in held:
            self._append(part)

    def _append(self, channels: NDArray[np.float32]) -> None:
        if self.channel is not None and len(channels) > max(1, self.channel):
            samples = channels[self.channel].copy()
        elif len(channels) == 1:
            samples = channels[0].copy()
        else:
            samples = channels.mean(0, dtype=np.float32)
        peak = float(np.abs(samples).max())
        if self.clean and not peak <= 1:
            samples = np.nan_to_num(samples, posinf=1.0, neginf=-1.0).clip(-1, 1)
            peak = float(np.abs(samples).max())
        if peak < SILENCE and len(channels) > 1 and float(np.abs(channels).max()) >= SILENCE:
            self.cancelled += len(samples)
        self.peak = max(self.peak, peak)
        self.parts.append((self.end, samples))
        self.end += len(samples)

    def notes(self) -> list[str]:
        """Return notes for the user on the conversion of the channels to mono."""
        if self.channel is not None:
            return [f"the sound's channels cancel each other: channel {self.channel + 1} is used, not their mean"]
        if self.cancelled > self.rate:
            return [f"the sound's channels cancel each other for {self.cancelled / self.rate:.1f} s: silent there"]
        return []
