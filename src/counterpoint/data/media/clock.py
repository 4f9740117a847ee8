"""Put the pictures and the sound of a file on one time line, in seconds from its beginning.

Packets pass through a `Clock` in file order, before they are decoded. The file's own clock may jump (joined recordings, a
restarted recorder). `Clock` then shifts the following packets, so that the time line continues. One shift applies to all
tracks. `FrameTimes` gives every decoded picture its time: its time stamp, or a count where it has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# A gap (seconds) that no still picture explains: longer ones are jumps of the clock.
LONGEST_STILL = 600.0
# The same for containers of broadcasters and recorders, whose clocks often jump (FFmpeg's value).
LONGEST_GAP = 10.0
# How far (seconds) a track's decoding time may go back without being a jump; more where only display times are known.
BACK, BACK_REORDERED = 0.3, 1.0
# Recordings are joined at the end of their own track where the other tracks end no later than this (seconds).
_EVEN = 0.5


@dataclass
class _Track:
    base: float  # duration of a tick, in seconds
    segment: int = 0  # index of the clock's shift that currently applies to the track
    last: float | None = None  # time of its latest packet, shifted
    end: float | None = None  # end time of its latest packet
    exact: bool = False  # whether `last` is a decoding time


class Clock:
    """The shifts of a file's clock, found packet by packet.

    Args:
        origin: The container's start, in seconds. None: the time of the first frame.
        jumpy: Whether the clock of this kind of container often jumps (MPEG-TS, MPEG-PS).
    """

    def __init__(self, origin: float | None, *, jumpy: bool = False) -> None:
        self.origin = origin
        self.shifts = [0.0]
        self.jumpy = jumpy
        self._limit = LONGEST_GAP if jumpy else LONGEST_STILL
        self._tracks: dict[int, _Track] = {}
        self._front = origin

    @property
    def jumps(self) -> int:
        """Number of jumps of the file's clock so far."""
        return len(self.shifts) - 1

    def restart(self) -> None:
        """Reset the positions of the tracks after a seek, but not the origin."""
        self.shifts, self._tracks, self._front = [0.0], {}, None

    def set(self, packet: Any) -> float | None:
        """Shift a packet's time stamps onto the time line. Return its time there (the decoding time if known).

        Time stamps of sound that FFmpeg only counted, because the file has none, are removed: counting samples is more exact.
        """
        track = self._tracks.get(packet.stream_index)
        if track is not None and self.jumpy and packet.pos is None and packet.stream.type == "audio":
            # FFmpeg split this packet from a larger one, and counted its time at the file's initial rate.
            packet.pts = packet.dts = None
            if track.end is not None:
                track.end += max(0, packet.duration or 0) * track.base
                self._front = max(self._front or track.end, track.end)
        dts = packet.dts
        exact = dts is not None
        stamp = dts if exact else packet.pts
        if stamp is None:
            return None
        if track is None:
            track = self._tracks[packet.stream_index] = _Track(float(packet.time_base))
        base = track.base
        raw, span = stamp * base, max(0, packet.duration or 0) * base
        back = BACK if exact and track.exact else max(BACK_REORDERED, 20 * min(span, 1.0))
        if track.segment == len(self.shifts) - 1:  # no jump that other tracks know of is still to come
            fits = self._continues(track, raw + self.shifts[-1], back)
        else:
            fitting = [
                k for k in range(track.segment, len(self.shifts)) if self._continues(track, raw + self.shifts[k], back)
            ]
            # Tracks are interleaved in a file, so this packet is near the latest time of all tracks.
            front = self._front or 0.0
            fitting.sort(key=lambda k: (abs(raw + self.shifts[k] - front), -k))
            fits = bool(fitting)
            track.segment = fitting[0] if fitting else track.segment
        if not fits:
            self.shifts.append(self._joint(track) - raw)
            track.segment = len(self.shifts) - 1
        shift = self.shifts[track.segment]
        time = raw + shift
        track.last, track.exact = time, exact
        track.end = time + span if track.end is None else max(track.end, time + span)
        self._front = track.end if self._front is None else max(self._front, track.end)
        if shift:
            ticks = round(shift / base)
            if packet.pts is not None:
                packet.pts += ticks
            if packet.dts is not None:
                packet.dts += ticks
        return time

    def _continues(self, track: _Track, time: float, back: float) -> bool:
        if track.last is None:
            low = self.origin is None or time >= self.origin - LONGEST_STILL
            return low and (self._front is None or time <= self._front + LONGEST_STILL)
        return track.last - back <= time <= max(track.last, self._front or track.last) + self._limit

    def _joint(self, track: _Track) -> float:
        """Return the time at which the packets after a jump begin."""
        front = self._front or 0.0
        return track.end if track.end is not None and front - track.end <= _EVEN else front


def demuxed(
    container: Any, streams: list[Any], clock: Clock, broken: tuple[Any, ...], damage: list[str]
) -> Iterator[Any]:
    """Yield packets of the streams in file order, on the clock's time line. End at the first that cannot be read."""
    packets = iter(container.demux(streams))
    while True:
        try:
            packet = next(packets)
            clock.set(packet)
        except StopIteration:
            return
        except broken as error:
            damage.append(reason(error))
            return
        yield packet


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message, in at most 120 characters."""
    said = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return said[0][:120] if said else type(error).__name__


class FrameTimes:
    """The times of decoded pictures in display order, in seconds from the clock's origin.

    Args:
        clock: The file's clock. Its origin is set from the first frame where the container has none.
        rate: Pictures per second that the stream declares; 0 when it declares none.
        base: Duration of a tick of the frames' time stamps, in seconds.
        by_dts: Use decoding times, because display times are only guessed (AVI has no display times).
    """

    def __init__(self, clock: Clock, rate: float, base: float, *, by_dts: bool = False) -> None:
        self.clock, self.rate, self.base, self.by_dts = clock, rate, base, by_dts
        self.step = 0.0  # seconds from a picture to the next, as last measured; 0 before
        self.counted = 0  # pictures without a time stamp so far
        self.dated = 0  # pictures with a time stamp so far
        self._last: float | None = None
        self._anchor: float | None = None  # time of the latest dated picture; `_since` counts the pictures after it
        self._since = 0
        self._stamps: list[int | None] = [None, None]  # latest pts and dts
        self._faults = [0, 0]  # number of times that each did not increase

    def time(self, frame: Any) -> float:
        """Return the time of the next frame, which is never less than that of the frame before."""
        stamp = self._stamp(frame)
        base = self.base
        span = (frame.duration or 0) * base
        if stamp is None:
            self.counted += 1
            self._since += 1
            measured = self.step if self._anchor is not None else 0.0
            step = measured or span or (1 / self.rate if self.rate > 0.1 else 1 / 25)
            time = 0.0 if self._last is None else self._last + step
        else:
            time = stamp * base
            if self.clock.origin is None:
                self.clock.origin = time - (self._last or 0.0) - (span if self._last is not None else 0.0)
            time -= self.clock.origin
            if self._anchor is not None and time > self._anchor:
                self.step = (time - self._anchor) / (self._since + 1)
            self._anchor, self._since = time, 0
            self.dated += 1
        self._last = time if self._last is None else max(time, self._last)
        return self._last

    def length(self, frame: Any, *, exact: bool, rest: float = 0.0) -> float:
        """Return the duration of the last frame in seconds; 0 when it is unknown.

        Where the container has a duration for each frame (`exact`), it is that duration. Otherwise it is the longer of that
        duration and the latest step. A duration above `LONGEST_GAP` is used only where the frame ends within `rest`, the
        remaining seconds by the header.
        """
        base = self.base
        span = (frame.duration or 0) * base
        if span > max(LONGEST_GAP, rest + 0.1):
            span = 0.0
        if exact and span:
            return span
        known = max(min(self.step, 1.0), span)
        return known or (1 / self.rate if self.rate > 0.1 else 0.0)

    def _stamp(self, frame: Any) -> int | None:
        """Return the more reliable time stamp: the display time, unless it decreases more often than the decoding time."""
        pair = (frame.pts, frame.dts)
        for k, stamp in enumerate(pair):
            if stamp is not None:
                last = self._stamps[k]
                self._faults[k] += last is not None and stamp <= last
                self._stamps[k] = stamp
        pts, dts = pair
        if self.by_dts:
            return dts
        if pts is not None and (dts is None or self._faults[0] <= self._faults[1]):
            return pts
        return dts
