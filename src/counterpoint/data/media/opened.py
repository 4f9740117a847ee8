"""Open a media file and choose its tracks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterpoint.data.media.clock import Clock, FrameTimes, reason
from counterpoint.data.media.pictures import orientation, shown_size, sides
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

# Containers with an index or with time stamps that a seek can trust. All others are read from their first byte.
SEEKABLE = {"mov", "matroska", "avi", "asf", "wav", "w64", "aiff", "au", "caf", "flac", "ape", "wv", "tta", "nut"}
# Longer lengths in a header are invalid: a hundred days.
LONGEST_LENGTH = 1e7
# Seconds without an answer after which a stream counts as lost, when it is opened and when it is read.
ANSWER = (15.0, 10.0)


def load_av() -> Any:
    """Import PyAV. CounterpointError when it is not installed."""
    try:
        import av
    except ImportError as error:
        raise CounterpointError("reading video and sound needs PyAV: pip install 'counterpoint[video]'") from error
    # torchvision up to 0.23 turns FFmpeg's messages on. They take the interpreter's lock in the decoder's threads, for which a
    # closing file then waits for ever.
    av.logging.set_level(None)
    return av


@dataclass
class MediaInfo:
    """Properties of a video file, from its header and its first picture."""

    duration: float  # seconds; 0 when the header gives none; after reading: the end time of the pictures
    width: int  # pixels as shown: rotation and shape of pixels applied
    height: int
    rotation: int  # degrees counter-clockwise: 0, 90, 180 or 270
    fps: float  # average; 0 when unknown
    has_audio: bool
    container: str
    video_codec: str
    audio_codec: str | None
    mirrored: bool = False


def decodable(stream: Any) -> bool:
    """Return whether this build of FFmpeg can decode the stream."""
    return stream.codec_context is not None and stream.codec_context.codec is not None


def choose(streams: list[Any], disposition: Any) -> Any:
    """Choose the track that players use: the default track, else the first without a special purpose. None without tracks.

    Args:
        streams: Streams of one kind. Those that cannot be decoded are chosen only if there is no other.
        disposition: PyAV's flags.
    """
    special = disposition.visual_impaired | disposition.hearing_impaired | disposition.comment | disposition.dependent

    def rank(stream: Any) -> tuple[bool, bool, bool]:
        flags = stream.disposition
        return (not decodable(stream), not flags & disposition.default, bool(flags & special))

    return min(streams, key=rank, default=None)


def others_note(kind: str, streams: list[Any], chosen: Any, length: float) -> list[str]:
    """Return a note on the unused tracks of a kind, with language, codec and seconds.

    Args:
        kind: "picture" or "sound".
        streams: All streams of that kind.
        chosen: The stream that is used, or None.
        length: Length of the file in seconds, for tracks that declare no length.
    """
    others = [stream for stream in streams if stream is not chosen]
    if not others:
        return []
    told = []
    for stream in others:
        facts = [getattr(stream, "language", None), getattr(stream.codec_context, "name", None) or "unknown codec"]
        seconds = _length(stream) or length
        facts.append(f"{seconds:.1f} s" if seconds else None)
        told.append(f"stream {stream.index} ({', '.join(f for f in facts if f)})")
    tracks = f"{counted(len(others), f'further {kind} track')}"
    use = f"; stream {chosen.index} is used" if chosen is not None else ""
    return [f"{tracks} not used: {', '.join(told)}{use}"]


def _length(stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    parts = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    return int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3]) if parts else 0.0


def is_address(name: Path | str) -> bool:
    """Return whether a name is an address of a stream, such as "rtsp://camera/1", and not a file."""
    return isinstance(name, str) and re.match(r"[A-Za-z][A-Za-z0-9+.\-]+://", name) is not None


class Opened:
    """An open video file or stream, with its picture and sound tracks and its clock.

    Args:
        path: A file, or the address of a stream as a string.

    Raises DataError when it cannot be opened.
    """

    def __init__(self, path: Path | str) -> None:
        av = load_av()
        self.av, self.path = av, path
        # PyAV's exceptions on broken data: its own, and Python's for numbers out of range.
        self.broken = (av.FFmpegError, ValueError, OverflowError, UnicodeDecodeError, OSError)
        options: dict[str, Any] = {}
        if is_address(path):
            hint = ""
            options = {"timeout": ANSWER} | (
                {"options": {"rtsp_transport": "tcp"}} if str(path).startswith("rtsp") else {}
            )
        else:
            hint = self._checked(Path(path))
            if str(path).lower().endswith((".m3u8", ".m3u")):  # a playlist may wait for its next part
                options = {"timeout": ANSWER}
        try:
            self.container: Any = av.open(str(path), metadata_errors="ignore", **options)
        except self.broken as error:
            kind = "not a stream that can be read" if is_address(path) else "not a media file that can be read"
            raise DataError(f"{path}: {kind}{hint}; {reason(error)}") from error
        try:
            self._choose_tracks()
        except BaseException:
            self.container.close()
            raise

    @staticmethod
    def _checked(path: Path) -> str:
        """Return a hint on the kind of a file, for an error. DataError when it is no file that can be opened."""
        hint = ""
        try:
            if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/", str(path)) and not path.exists():
                address = re.sub(r":/+", "://", str(path), count=1)
                raise DataError(f"{address}: is a web address; download the file and name it")
            if not path.exists():
                raise DataError(f"{path}: no such file")
            if path.is_dir():
                raise DataError(f"{path}: is a directory, not a video file")
            if path.stat().st_size == 0:
                raise DataError(f"{path}: the file is empty")
            with path.open("rb") as file:
                if file.read(12)[4:8] == b"ftyp":
                    hint = " (its index is missing: is the download complete?)"
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be opened ({reason(error)})") from error
        return hint

    def _choose_tracks(self) -> None:
        disposition = self.av.stream.Disposition
        streams = self.container.streams
        # A cover picture in a music file is a "video" stream of one frame; it is not a video.
        cover = disposition.attached_pic | disposition.timed_thumbnails
        self.pictures = [s for s in streams.video if not s.disposition & cover]
        self.sounds = list(streams.audio)
        if not self.pictures:
            raise DataError(f"{self.path}: has no video stream")
        self.video = choose(self.pictures, disposition)
        if not decodable(self.video):
            raise DataError(f"{self.path}: this build of FFmpeg cannot decode its video codec; convert it to H.264")
        audio = choose(self.sounds, disposition)
        self.audio = audio if audio is not None and decodable(audio) else None
        self.video.thread_type = "AUTO"
        self.clock = clock_of(self.av, self.container)
        self.still = 0.0  # end of the latest picture that repeats the one before, on the file's clock

    @property
    def streams(self) -> list[Any]:
        """The chosen tracks."""
        return [self.video] + ([self.audio] if self.audio is not None else [])

    @property
    def rate(self) -> float:
        """The declared number of pictures per second; 0 when unknown."""
        return float(self.video.guessed_rate or self.video.average_rate or 0)

    def repeats(self, packet: Any) -> bool:
        """Return whether a packet is empty and so repeats the picture before it. Decoders treat an empty packet as the end."""
        if packet.size or packet.dts is None:
            return False
        if packet.stream is self.video:
            self.still = max(self.still, float((packet.dts + (packet.duration or 0)) * packet.time_base))
        return True

    def times(self) -> FrameTimes:
        """Make the times of the decoded pictures, from the file's start or from a seek on."""
        base = float(self.video.time_base or 0)
        return FrameTimes(self.clock, self.rate, base, by_dts=self.container.format.name == "avi")

    def info(self) -> MediaInfo:
        """Return the properties from the header. `show` adds those of the first picture."""
        context = self.video.codec_context
        return MediaInfo(
            duration=header_length(self.container),
            width=context.width,
            height=context.height,
            rotation=0,
            fps=float(self.video.average_rate or 0),
            has_audio=self.audio is not None,
            container=self.container.format.name,
            video_codec=context.name,
            audio_codec=self.audio.codec_context.name if self.audio is not None else None,
        )

    def show(self, info: MediaInfo, frame: Any) -> None:
        """Set the displayed size and the orientation from a decoded frame."""
        turned = orientation(frame)
        info.rotation, info.mirrored = turned.rotation, turned.mirrored
        info.width, info.height = shown_size(frame, sides(self.video, frame))

    def notes(self) -> list[str]:
        """Return notes for the user on the tracks that are not used."""
        length = header_length(self.container)
        notes = [] if self.audio is not None else ["no audio track: judged by sight, with silence for sound"]
        if self.audio is None and self.sounds:
            notes = ["no audio track that can be decoded: judged by sight, with silence for sound"]
        return (
            notes
            + others_note("picture", self.pictures, self.video, length)
            + others_note("sound", self.sounds, self.audio, length)
        )


def clock_of(av: Any, container: Any) -> Clock:
    """Make the clock of an open container, at its start."""
    start = container.start_time
    jumpy = bool(container.format.flags & av.format.Flags.ts_discont.value)
    return Clock(start / av.time_base if start is not None else None, jumpy=jumpy)


def header_length(container: Any) -> float:
    """Return the length in seconds from the header; 0 when it gives none or an invalid one."""
    duration = container.duration
    seconds = max(0.0, duration / 1e6) if duration else 0.0
    return seconds if seconds < LONGEST_LENGTH else 0.0


def seekable(container: Any) -> bool:
    """Return whether this container has an index for seeks, so that the outcome of a seek can be checked."""
    return container.start_time is not None and container.format.name.split(",")[0] in SEEKABLE
