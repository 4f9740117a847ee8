"""Cut a clip out of a video file: copy its packets where that is possible, and encode it again where it is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.media.clock import demuxed
from counterpoint.data.media.opened import Opened, seekable
from counterpoint.data.media.pictures import pixels, shown_size, sides
from counterpoint.data.media.snippets import decoded
from counterpoint.data.media.waves import SoundLine
from counterpoint.data.media.write import write_video

# Codecs of picture and sound that an MP4 file takes and common players play.
COPIED = {"h264", "hevc", "av1", "mpeg4", "vp9"}, {"aac", "mp3", "ac3", "eac3", "opus", "alac", "flac"}
MOST_EARLY = 2.0  # seconds that a copied clip may begin before its moment: at the key picture before it
SOUND_RATE = 48000  # samples per second of an encoded clip
MAX_SIDE = 1280  # pixels of an encoded clip
_ENDINGS = {"mp4": ".mp4", "matroska": ".mkv"}


def cut(
    path: Path, start: float, end: float, out: Path, *, steady: bool = False, comment: str = ""
) -> tuple[Path, str]:
    """Write the part `start`..`end` (seconds) of a video as a file. Return the file, and how it was made.

    The packets are copied where seeks are reliable and a key picture lies at most 2 s before `start`. The clip then
    begins at that picture. Otherwise pictures and sound are decoded and encoded again, from `start` on.

    Args:
        path: The video.
        start, end: The part, in seconds from the container's start; 0 <= start < end.
        out: The file without its ending, which the codecs decide: .mp4, else .mkv.
        steady: Whether the file was read before without a jump of its clock.
        comment: Text that the clip keeps as its comment.

    Raises DataError when the file cannot be opened, or no picture of that part can be decoded.
    """
    source = Opened(path)
    with source.container:
        early = _key_before(source, start) if steady or seekable(source.container) else None
        if early is not None and start - early <= MOST_EARLY:
            sound = source.audio.codec_context.name if source.audio is not None else None
            plain = source.video.codec_context.name in COPIED[0] and (sound is None or sound in COPIED[1])
            kind = "mp4" if plain else "matroska"
            target = out.with_name(out.name + _ENDINGS[kind])
            try:
                _copy(source, early, end, target, kind, comment)
                lead = start - early
                return target, "copied" + (f", begins {lead:.1f} s early at a key picture" if lead > 0.05 else "")
            except (*source.broken, NotImplementedError):
                pass  # the container does not take these streams: encode them
        near = early if seekable(source.container) else None
    target = out.with_name(out.name + ".mp4")
    _encode(path, start, end, target, comment, near)
    return target, "encoded again"


def _key_before(source: Opened, wanted: float) -> float | None:
    """Return the time of the key picture at or before `wanted`, in seconds; None where a seek finds none."""
    origin = source.clock.origin
    if origin is None:
        return None
    try:
        source.container.seek(round((origin + wanted) / float(source.video.time_base)), stream=source.video)
        for number, packet in enumerate(source.container.demux(source.video)):
            if packet.size and packet.is_keyframe and packet.pts is not None:
                time = float(packet.pts * packet.time_base) - origin
                return time if time <= wanted + 1e-3 else None  # times of moments that were written are rounded
            if number > 200:
                return None
    except source.broken:
        return None
    return None


def _copy(source: Opened, first: float, end: float, target: Path, kind: str, comment: str) -> None:
    """Copy the packets of the chosen tracks between two times into a new file, whose clock begins at 0."""
    half = target.with_name(f".half-{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = (source.clock.origin or 0.0) + first
    options = {"movflags": "+faststart"} if kind == "mp4" else {}
    try:
        with source.av.open(str(half), "w", format=kind, options=options) as made:
            if comment:
                made.metadata["comment"] = comment
            tracks = {stream.index: made.add_stream_from_template(stream) for stream in source.streams}
            source.container.seek(round(origin / float(source.video.time_base)), stream=source.video)
            begun, over = False, set[int]()
            for packet in _dated(source.container.demux(source.streams), source.video):
                if packet.dts is None or not packet.size or packet.stream_index in over:
                    continue
                picture = packet.stream is source.video
                if picture and not begun and not packet.is_keyframe:
                    raise ValueError("the first picture is not a key picture")
                begun |= picture
                time = float((packet.pts if packet.pts is not None else packet.dts) * packet.time_base)
                decoding = float(packet.dts * packet.time_base)
                if decoding - origin >= end - first:
                    over.add(packet.stream_index)
                    if len(over) == len(tracks):
                        break
                    continue
                if not picture and (time < origin - 0.05):
                    continue
                shift = round(origin / float(packet.time_base))
                packet.dts -= shift
                if packet.pts is not None:
                    packet.pts -= shift
                packet.stream = tracks[packet.stream_index]
                made.mux(packet)
            if not begun:
                raise ValueError("no picture")
        half.replace(target)
    finally:
        half.unlink(missing_ok=True)


def _dated(packets: Iterable[Any], video: Any) -> Iterator[Any]:
    """Yield packets. Pictures without a decoding time get times before that of the next one.

    After a seek in Matroska, the first pictures have none where some are stored out of order.
    """
    held: list[Any] = []
    for packet in packets:
        if packet.stream is video and packet.size:
            if packet.dts is None:
                held.append(packet)
                continue
            for number, picture in enumerate(held):
                step = packet.duration or max(
                    1, round(1 / ((float(video.guessed_rate or 0) or 25.0) * video.time_base))
                )
                picture.dts = packet.dts - (len(held) - number) * step
                yield picture
            held = []
        yield packet


def _encode(path: Path, start: float, end: float, target: Path, comment: str, near: float | None) -> None:
    """Decode a part of a file, and write it as H.264 and AAC at its own rate.

    The sound comes first, as a whole; the pictures follow one at a time. Both are read from the key picture at `near` seconds.
    Where that is None, or a seek arrives too late, they are read from the file's beginning.
    """
    wave = None if near is None else _sound(path, start, end, near)
    if wave is None:
        wave = _sound(path, start, end, None)
    source = Opened(path)
    with source.container:
        if near is not None and not _sought(source, source.video, near):
            near = None
        rate = min(60.0, max(1.0, source.rate or 25.0))
        frames = _pictures(source, start, end, rate, near)
        first = next(frames, None) if near is not None else None
        if near is None or first is not None:
            frames = frames if first is None else itertools.chain([first], frames)
            write_video(target, frames, wave, fps=rate, sample_rate=SOUND_RATE, comment=comment)
            return
    _encode(path, start, end, target, comment, None)


def _sought(source: Opened, stream: Any, time: float) -> bool:
    """Move to a time of the file, in seconds. Return whether that succeeded."""
    at = (source.clock.origin or 0.0) + time
    try:
        source.container.seek(round(at / float(stream.time_base)), stream=stream)
    except source.broken:
        return False
    source.clock.restart()
    return True


def _sound(path: Path, start: float, end: float, near: float | None) -> NDArray[np.float32] | None:
    """Return the mono sound of a part, with zeros where there is none; None for a file without sound.

    None, too, where reading from `near` on finds no sound as early as `start`.
    """
    source = Opened(path)
    with source.container:
        if source.audio is None:
            return None
        if near is not None and not _sought(source, source.audio, max(0.0, near - 1)):
            return None
        sound = SoundLine(lambda: source.av.AudioResampler(format="fltp", rate=SOUND_RATE), SOUND_RATE)
        # The clock needs the packets of all tracks; only those of the sound are decoded.
        for packet in demuxed(source.container, source.streams, source.clock, source.broken, []):
            if packet.stream is not source.audio:
                continue
            try:
                frames = packet.decode()
            except source.broken:
                continue
            for frame in frames:
                time = None if frame.time is None else float(frame.time - (source.clock.origin or 0.0))
                if near is not None and not sound.started and (time is None or time > start):
                    return None
                if time is None or start - 1 <= time <= end:
                    sound.add(frame, time)
            if sound.end > (end + 1) * SOUND_RATE:
                break
        sound.close()
        if near is not None and not sound.started:
            return None
        return sound.window(round(end * SOUND_RATE), round((end - start) * SOUND_RATE))


def _pictures(source: Opened, start: float, end: float, rate: float, near: float | None) -> Iterator[NDArray[np.uint8]]:
    """Yield the pictures that are displayed at `start`, `start` + 1 / rate, ... before `end`.

    With `near`, the file was moved to the key picture at that time, in seconds. Yield none where the pictures from there have no
    time, or begin after `start`.
    """
    times = source.times()
    reformatter = source.av.video.reformatter.VideoReformatter()
    count, made = max(1, round((end - start) * rate)), 0
    last: Any = None
    size = (2, 2)

    def until(time: float) -> Iterator[NDArray[np.uint8]]:
        nonlocal made
        while last is not None and made < count and start + made / rate < time - 1e-6:
            yield pixels(last, size, reformatter)
            made += 1

    for stream, frame in decoded(source, source.streams, []):
        if stream is not source.video:
            continue
        time = times.time(frame)
        if near is not None and last is None:
            if times.counted or time > start + 1e-6:
                return
            if time < near - 1e-6:  # shown before the key picture, and made from pictures that were not read
                continue
        if last is None:
            width, height = shown_size(frame, sides(source.video, frame))
            scale = min(1.0, MAX_SIDE / max(width, height))
            size = max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
        yield from until(time)
        last = frame
        if made >= count:
            return
    yield from until(end)
