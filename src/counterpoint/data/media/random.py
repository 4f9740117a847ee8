"""Find the picture at a time, the length and the properties of a file, if possible without reading it all.

The time at which a seek lands is checked. Where a container has no reliable index, or its clock may jump, the file is read
from its first byte. Then all packets are examined, but only those around a wanted time are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.media.clock import Clock, demuxed
from counterpoint.data.media.opened import MediaInfo, Opened, header_length, seekable
from counterpoint.data.media.pictures import pixels, shown_size, sides
from counterpoint.data.media.snippets import decoded
from counterpoint.errors import DataError

# Maximum compressed bytes kept since the last key picture; beyond, all pictures are decoded from the beginning.
_KEPT_BYTES = 128 * 2**20
# Number of packets after a seek that must include a key picture.
_SOUGHT_PACKETS = 2000
_EPS = 1e-6  # seconds


def probe(path: Path | str) -> MediaInfo:
    """Return the properties of a video file. Measure its length where the header is not reliable.

    Raises DataError when it cannot be opened or has no picture that can be decoded.
    """
    source = Opened(Path(path))
    with source.container:
        info = source.info()
        for _, frame in decoded(source, [source.video], []):
            source.show(info, frame)
            break
        else:
            raise DataError(f"{path}: not a single frame could be decoded")
        if seekable(source.container):
            info.duration = measured_length(source.container, source.streams, source.clock, source.broken)
            return info
    source = Opened(Path(path))
    with source.container:
        info.duration = measured_length(source.container, source.streams, source.clock, source.broken)
    return info


def measured_length(
    container: Any,
    streams: list[Any],
    clock: Clock,
    broken: tuple[Any, ...],
    seen: Callable[[Any], None] | None = None,
) -> float:
    """Return the seconds from the clock's origin to the end of the last packet of the streams.

    Where seeks are reliable, only the end is read. If it agrees with the header's length, that length is returned. Afterwards
    the container's position is undefined.

    Args:
        container: An open container of PyAV, at its start.
        streams: The chosen tracks.
        clock: The container's clock, unused so far.
        broken: Types of exceptions that mean damage.
        seen: Called with every packet, but only when all packets are read from the first on.
    """
    header = header_length(container)
    origin = clock.origin
    if seekable(container) and header and origin is not None:
        if _index_agrees(container, streams, header + origin):
            return header
        try:
            container.seek(round((origin + max(0.0, header - 0.3)) * 1e6), backward=True)
            clock.restart()
            end = _end(container, streams, clock, broken)
        except broken:
            end = None
        if end is not None:
            length = end - origin
            return header if abs(length - header) < 0.1 else length
        try:
            container.seek(round(origin * 1e6), backward=True)
        except broken:
            return header
        clock.restart()
    end = _end(container, streams, clock, broken, seen)
    if end is None:
        return header
    length = end - (origin if origin is not None else clock.origin or 0.0)
    return header if abs(length - header) < 0.1 else length


def _index_agrees(container: Any, streams: list[Any], end: float) -> bool:
    """Return whether an MP4 file's index reaches the end of the tracks, with its last packets within the file."""
    if not container.format.name.startswith("mov"):
        return False
    latest = 0.0
    for stream in streams:
        entries = getattr(stream, "index_entries", None)  # PyAV 16 and newer
        if not entries:
            return False
        last = entries[-1]
        if last.pos + last.size > container.size:
            return False
        latest = max(latest, last.timestamp * float(stream.time_base))
    return abs(end - latest) < 0.5


def _end(
    container: Any,
    streams: list[Any],
    clock: Clock,
    broken: tuple[Any, ...],
    seen: Callable[[Any], None] | None = None,
) -> float | None:
    """Read from the container's position, and return the time at which the last packet ends; None without a packet."""
    ends: dict[int, float] = {}
    dated: dict[int, float] = {}  # the same, of packets with a time stamp only
    bases = {stream.index: float(stream.time_base or 0) for stream in streams}
    first: float | None = None
    for packet in demuxed(container, streams, clock, broken, []):
        if seen is not None:
            seen(packet)
        if not packet.size:
            continue
        track = packet.stream_index
        base = bases[track]
        span = (packet.duration or 0) * base
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None:  # count from the packet before
            ends[track] = ends.get(track, clock.origin or 0.0) + span
            continue
        first = stamp * base if first is None else min(first, stamp * base)
        ends[track] = dated[track] = max(dated.get(track, stamp * base), stamp * base + span)
    if clock.origin is None:
        clock.origin = first
    return max(ends.values(), default=None)


def frame_at(path: Path | str, seconds: float, *, width: int) -> NDArray[np.uint8] | None:
    """Return the picture displayed at a time; see `frames_at`."""
    return frames_at(path, [seconds], width=width)[0]


def frames_at(
    path: Path | str, seconds: Sequence[float], *, width: int, steady: bool = False
) -> list[NDArray[np.uint8] | None]:
    """Return the pictures displayed at the given times.

    Args:
        path: Path of the file.
        seconds: Times from the container's start, in seconds, in any order. Times before the first picture give the first
            picture; times after the last give the last.
        width: Width of the pictures in pixels, at least 1. The height follows from the displayed shape.
        steady: Whether the file was read before without a jump of its clock. Then seeks are used in any container.

    Returns RGB [H, W, 3] for each time; None where no picture can be decoded. Raises DataError for a file that cannot be
    opened.
    """
    found: list[NDArray[np.uint8] | None] = [None] * len(seconds)
    order = sorted(range(len(seconds)), key=lambda i: seconds[i])
    wanted = [float(seconds[i]) for i in order]
    source = Opened(Path(path))
    with source.container:
        if source.clock.origin is None:
            reached = None
        elif steady or seekable(source.container):
            reached = [_sought(source, time, width) for time in wanted]
        else:
            reached = _scanned(source, wanted, width)
    missing = [k for k in range(len(wanted)) if reached is None or reached[k] is None]
    for k, i in enumerate(order):
        found[i] = reached[k] if reached is not None else None
    if missing:
        source = Opened(Path(path))
        with source.container:
            for k, picture in zip(missing, _from_start(source, [wanted[k] for k in missing], width), strict=True):
                found[order[k]] = picture
    return found


def _shown(source: Opened, frame: Any, width: int) -> NDArray[np.uint8] | None:
    """Convert a frame to the displayed picture of a width; None where its size or format is invalid."""
    shown = shown_size(frame, sides(source.video, frame))
    height = max(1, round(width * shown[1] / shown[0]))
    try:
        return pixels(frame, (width, height), source.av.video.reformatter.VideoReformatter())
    except (ValueError, OSError, MemoryError):  # the caller reads on from the beginning, then has no picture
        return None


def _from_start(source: Opened, wanted: list[float], width: int) -> list[NDArray[np.uint8] | None]:
    """Decode all pictures from the first byte on, up to the last of the (sorted) times."""
    times, found, last = source.times(), list[NDArray[np.uint8] | None](), None
    # The clock needs the sound, too, so its packets are also read.
    for packet in demuxed(source.container, source.streams, source.clock, source.broken, []):
        if packet.stream is not source.video:
            continue
        for frame in _decode(source, packet):
            time = times.time(frame)
            while len(found) < len(wanted) and last is not None and time > wanted[len(found)] + _EPS:
                found.append(_shown(source, last, width))
            last = frame
        if len(found) == len(wanted):
            return found
    rest = _shown(source, last, width) if last is not None else None
    return found + [rest] * (len(wanted) - len(found))


def _decode(source: Opened, packet: Any) -> list[Any]:
    """Decode the frames of a packet; for None, those still in the decoder. Return none where it is damaged."""
    if packet is not None and source.repeats(packet):
        return []
    try:
        return list(packet.decode() if packet is not None else source.video.decode(None))
    except source.broken:
        return []


def _sought(source: Opened, wanted: float, width: int) -> NDArray[np.uint8] | None:
    """Find a key picture at or before the time by a seek, and decode from it on. None where there is none."""
    origin = source.clock.origin or 0.0
    header = header_length(source.container)
    target, back = min(wanted, header) if header else wanted, 1.0
    while target > 0:
        try:
            source.container.seek(round((origin + target) * 1e6), backward=True)
        except source.broken:
            target, back = target - back, 2 * back
            continue
        source.clock.restart()
        packets = _from_key(demuxed(source.container, [source.video], source.clock, source.broken, []))
        first = next(packets, None)
        stamp = None if first is None else first.pts if first.pts is not None else first.dts
        if stamp is not None and first is not None and stamp * float(first.time_base) - origin <= wanted + _EPS:
            start = stamp * float(first.time_base) - origin
            frame = _latest(source, chain([first], packets), start, wanted)
            if frame is not None:
                return _shown(source, frame, width)
        target, back = target - back, 2 * back
    return None


def _from_key(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield packets from the first key picture on. Yield none where no key picture follows soon."""
    for number, packet in enumerate(packets):
        if packet.size and packet.is_keyframe:
            yield packet
            break
        if number > _SOUGHT_PACKETS:
            return
    yield from packets


def _latest(source: Opened, packets: Iterator[Any], start: float, wanted: float) -> Any:
    """Decode packets from a key picture on. Return the latest frame from `start` up to the time; None without one."""
    times, best = source.times(), None
    for packet in packets:
        for frame in _decode(source, packet):
            if frame.pts is None and frame.dts is None and best is None:
                return None
            time = times.time(frame)
            if time > wanted + _EPS and best is not None:
                return best
            if start - _EPS <= time <= wanted + _EPS:
                best = frame
    return best


def _scanned(source: Opened, wanted: list[float], width: int) -> list[NDArray[np.uint8] | None] | None:
    """Examine the packets from the first byte on, and decode from the last key picture before each (sorted) time.

    Return None where key pictures are too far apart to keep the packets between them.
    """
    found: list[NDArray[np.uint8] | None] = []
    origin = source.clock.origin or 0.0
    groups: list[
        tuple[float | None, list[Any]]
    ] = []  # time of a key picture, and the packets from it to the next key picture
    kept = 0

    def take(time: float) -> NDArray[np.uint8] | None:
        for start, _ in reversed(groups):
            if start is not None and start <= time + _EPS:
                break
        else:
            return None
        source.video.codec_context.flush_buffers()
        packets = [p for begin, part in groups if begin is None or begin >= start for p in part]
        frame = _latest(source, iter([*packets, None]), start, time)
        source.video.codec_context.flush_buffers()
        return _shown(source, frame, width) if frame is not None else None

    for packet in demuxed(source.container, source.streams, source.clock, source.broken, []):
        if packet.stream is not source.video or not packet.size:
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        time = stamp * float(packet.time_base) - origin if stamp is not None else None
        decoding = packet.dts * float(packet.time_base) - origin if packet.dts is not None else None
        while decoding is not None and len(found) < len(wanted) and decoding > wanted[len(found)] + _EPS:
            found.append(take(wanted[len(found)]))
        if len(found) == len(wanted):
            return found
        if packet.is_keyframe:
            groups = [*groups[-2:], (time, [])]
            kept = sum(p.size for _, part in groups for p in part)
        if groups:
            groups[-1][1].append(packet)
            kept += packet.size
            if kept > _KEPT_BYTES:
                return None
    return found + [take(time) for time in wanted[len(found) :]]
