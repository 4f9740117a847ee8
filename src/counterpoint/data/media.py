"""Video files, read as a stream of snippets in bounded memory, and written (PyAV over FFmpeg).

Snippets go by presentation time, not by counting frames, so variable frame rates, gaps and late sound come out right:
with F frames per snippet of s seconds, sample n shows the latest frame at or before (n + 1/2) s / F.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.errors import CounterpointError, DataError

if TYPE_CHECKING:
    from counterpoint.encoders import AudioBackbone, VisualBackbone

# A jump between two timestamps longer than this (seconds) is taken for a damaged clock, not for a still picture.
LONGEST_STILL = 600.0
# How far (seconds) sound may lie behind its picture in the file before it is given up; bounds what waits in memory.
LONGEST_WAIT = 300.0
SILENCE = 1e-4


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise CounterpointError("reading video needs PyAV: pip install 'counterpoint[video]'") from error
    return av


@dataclass
class MediaInfo:
    """What a video file says of itself."""

    duration: float  # seconds; 0 when the file does not say
    width: int  # as shown, rotation applied
    height: int
    rotation: int  # degrees counter-clockwise
    fps: float  # average; 0 when unknown
    has_audio: bool
    container: str
    video_codec: str
    audio_codec: str | None


class Snippet(NamedTuple):
    """One snippet: its number, frames [F, H, W, 3] uint8 RGB, and the mono sound that ends with it."""

    number: int
    frames: NDArray[np.uint8]
    wave: NDArray[np.float32]


def sample_times(snippets: int, frames_per_snippet: int, snippet_seconds: float) -> NDArray[np.float64]:
    """When (seconds) the frames of the first `snippets` snippets are sampled: [snippets * frames_per_snippet]."""
    return (np.arange(snippets * frames_per_snippet) + 0.5) * snippet_seconds / frames_per_snippet


class _Input:
    """An open file with its picture and sound streams; DataError for what cannot be opened."""

    def __init__(self, path: Path) -> None:
        av = _av()
        self.path = path
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if path.is_dir():
            raise DataError(f"{path}: is a directory, not a video file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        try:
            self.container = av.open(str(path), metadata_errors="ignore")
        except (av.FFmpegError, ValueError, OSError) as error:
            hint = " (its index is missing: an unfinished or cut download?)" if _looks_like_mp4(path) else ""
            raise DataError(f"{path}: not a media file that can be read{hint}; {_reason(error)}") from error
        try:
            streams = self.container.streams
            # A cover picture in a music file is a "video" stream of one frame; it is not a video.
            pictures = [s for s in streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not pictures:
                raise DataError(f"{path}: has no video stream")
            self.video = pictures[0]
            self.audio = streams.audio[0] if streams.audio and _decodable(streams.audio[0]) else None
            if not _decodable(self.video):
                raise DataError(f"{path}: its video codec is not known to this build of FFmpeg")
            self.video.thread_type = "AUTO"
            start = self.container.start_time
            self.origin = start / av.time_base if start is not None else None
        except BaseException:
            self.container.close()
            raise

    def info(self) -> MediaInfo:
        context = self.video.codec_context
        duration = self.container.duration
        seconds = max(0.0, duration / 1e6) if duration else 0.0
        return MediaInfo(
            duration=seconds if seconds < 1e7 else 0.0,  # a hundred days: a damaged header
            width=context.width,
            height=context.height,
            rotation=0,
            fps=float(self.video.average_rate or 0),
            has_audio=self.audio is not None,
            container=self.container.format.name,
            video_codec=context.name,
            audio_codec=self.audio.codec_context.name if self.audio is not None else None,
        )


def _decodable(stream: Any) -> bool:
    return stream.codec_context is not None and stream.codec_context.codec is not None


def _looks_like_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(12)[4:8] == b"ftyp"


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).strip() or type(error).__name__


def probe(path: Path | str) -> MediaInfo:
    """What a video file says of itself; DataError when it cannot be opened or has no decodable picture."""
    source = _Input(Path(path))
    with source.container:
        info = source.info()
        for frame in _decoded(source, [source.video], []):
            _turn(info, frame[1])
            return info
    raise DataError(f"{path}: not a single frame could be decoded")


def _turn(info: MediaInfo, frame: Any) -> None:
    """Take rotation and shown size from a decoded frame."""
    info.rotation = _rotation(frame)
    info.width, info.height = (frame.height, frame.width) if info.rotation % 180 else (frame.width, frame.height)


def _rotation(frame: Any) -> int:
    return round(frame.rotation / 90) % 4 * 90


def _decoded(source: _Input, streams: list[Any], damage: list[str]) -> Iterator[tuple[Any, Any]]:
    """(stream, frame) in file order. Packets that cannot be decoded are passed over and written down in `damage`."""
    av = _av()
    # What PyAV raises on broken data: its own errors, and Python's for values that fit no number.
    broken = (av.FFmpegError, ValueError, OverflowError, UnicodeDecodeError)
    packets = iter(source.container.demux(streams))
    failures = 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except broken as error:
            damage.append(_reason(error))
            return
        try:
            frames = packet.decode()
            failures = 0
        except av.error.EOFError:
            continue
        except broken as error:
            damage.append(_reason(error))
            failures += 1
            if failures > 1000:  # nothing but rubbish from here on
                return
            continue
        for frame in frames:
            yield packet.stream, frame


def _pixels(frame: Any, size: tuple[int, int], reformatter: Any) -> NDArray[np.uint8]:
    """RGB [H, W, 3] of a frame as shown, scaled (not cropped) to size = (width, height)."""
    turns = _rotation(frame) // 90
    width, height = size if turns % 2 == 0 else size[::-1]
    scaled = reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA")
    pixels = scaled.to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


class _Pictures:
    """Picks the frames to sample from a stream of frames in order of time."""

    def __init__(self, spacing: float, size: tuple[int, int]) -> None:
        self.spacing = spacing
        self.size = size
        self.reformatter = _av().video.reformatter.VideoReformatter()
        self.next = 0  # number of the next sample
        self.frame: Any = None  # the latest frame, and its pixels once they were wanted
        self.pixels: NDArray[np.uint8] | None = None
        self.time = 0.0
        self.shift = 0.0
        self.last_length = 0.0

    def add(self, frame: Any, time: float) -> Iterator[NDArray[np.uint8]]:
        time += self.shift
        if time - self.time > LONGEST_STILL or time < self.time - 1.0:
            jump = self.time + self.last_length - time  # a broken clock: go on where it was
            self.shift += jump
            time += jump
        time = max(time, self.time)
        if self.frame is None:
            self.frame = frame  # what is asked for before the first frame shows it
        else:
            self.last_length = min(time - self.time, 1.0)
        yield from self._until(time)
        self.frame, self.pixels, self.time = frame, None, time

    def end(self, fps: float) -> Iterator[NDArray[np.uint8]]:
        """The samples the last frame still covers."""
        if self.frame is not None:
            yield from self._until(self.time + (self.last_length or (1 / fps if fps > 0.1 else self.spacing)))

    def _until(self, time: float) -> Iterator[NDArray[np.uint8]]:
        while (self.next + 0.5) * self.spacing < time - 1e-9:
            if self.pixels is None:
                self.pixels = _pixels(self.frame, self.size, self.reformatter)
            self.next += 1
            yield self.pixels


class _Sound:
    """Mono sound at one rate, laid on the time line; forgets what was used."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        # Channels are averaged here: FFmpeg's own mix to mono is louder, and would clip.
        self.resampler = _av().AudioResampler(format="fltp", rate=rate)
        self.parts: deque[NDArray[np.float32]] = deque()
        self.first = 0  # sample number of the first kept sample
        self.end = 0  # sample number after the last
        self.peak = 0.0

    def add(self, frame: Any, time: float | None) -> None:
        if time is not None:
            at = round(time * self.rate)
            gap = at - self.end
            # Small drifts are the codec's padding; larger ones are real: late sound, or a hole in it.
            if 0.05 * self.rate < gap < LONGEST_STILL * self.rate:
                self._append(np.zeros(gap, np.float32))
            elif -LONGEST_STILL * self.rate < gap < -0.05 * self.rate and self.end == 0:
                self.end = self.first = at  # starts before the picture
        for out in self.resampler.resample(frame):
            self._append(out.to_ndarray().mean(0, dtype=np.float32))

    def _append(self, samples: NDArray[np.float32]) -> None:
        if len(samples):
            samples = np.nan_to_num(samples, posinf=1.0, neginf=-1.0).clip(-1, 1)
            self.peak = max(self.peak, float(np.abs(samples).max()))
            self.parts.append(samples)
            self.end += len(samples)

    def window(self, stop: int, length: int) -> NDArray[np.float32]:
        """Samples stop-length..stop, zeros where there is no sound; what lies before them is forgotten."""
        start = stop - length
        while self.parts and self.first + len(self.parts[0]) <= start:
            self.first += len(self.parts.popleft())
        out = np.zeros(length, np.float32)
        position = self.first
        for part in self.parts:
            low, high = max(position, start), min(position + len(part), stop)
            if low < high:
                out[low - start : high - start] = part[low - position : high - position]
            position += len(part)
            if position >= stop:
                break
        return out


class SnippetReader:
    """Reads one video file once, from front to end, for a pair of backbones.

        with SnippetReader(path, visual, audio, snippet_seconds=16 / 24) as reader:
            for visual_rows, audio_rows in reader.features():
                ...

    `info` holds what the file says of itself (rotation and size after the first frame), `notes` what a user should know
    of how it read: no sound, silence, damage. Raises DataError when the file cannot be opened or shows nothing.
    """

    def __init__(
        self, path: Path | str, visual: VisualBackbone, audio: AudioBackbone, *, snippet_seconds: float
    ) -> None:
        self.path = Path(path)
        self.visual, self.audio = visual, audio
        self.seconds = snippet_seconds
        self.source = _Input(self.path)
        self.info = self.source.info()
        self.notes: list[str] = []
        if not self.info.has_audio:
            self.notes.append("no audio track: judged by sight, with silence for sound")

    def __enter__(self) -> SnippetReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.container.close()

    def snippets(self) -> Iterator[Snippet]:
        """The snippets in order. A last one less than half full is dropped, unless it is the only one."""
        count = self.visual.frames_per_snippet
        pictures = _Pictures(self.seconds / count, self.visual.frame_size)
        sound = _Sound(self.audio.sample_rate) if self.source.audio is not None else None
        length = round(self.audio.window_seconds * self.audio.sample_rate)
        waiting: deque[NDArray[np.uint8]] = deque()
        index = decoded = 0
        damage: list[str] = []
        origin = self.source.origin

        def ready() -> Iterator[Snippet]:
            nonlocal index
            while len(waiting) >= count:
                stop = round((index + 1) * self.seconds * self.audio.sample_rate)
                late = sound is not None and not ended and sound.end < stop
                if late and len(waiting) / count * self.seconds < LONGEST_WAIT:
                    return
                frames = np.stack([waiting.popleft() for _ in range(count)])
                wave = sound.window(stop, length) if sound is not None else np.zeros(length, np.float32)
                yield Snippet(index, frames, wave)
                index += 1

        ended = False
        streams = [self.source.video] + ([self.source.audio] if sound is not None else [])
        for stream, frame in _decoded(self.source, streams, damage):
            time = frame.time
            if origin is None and time is not None:
                origin = time
            relative = time - origin if time is not None and origin is not None else None
            if stream is self.source.video:
                if decoded == 0:
                    _turn(self.info, frame)
                if relative is None:  # some formats carry no clock: count frames
                    relative = pictures.time + pictures.last_length + (1 / self.info.fps if self.info.fps else 0.04)
                decoded += 1
                try:
                    waiting.extend(pictures.add(frame, relative))
                except (ValueError, OSError, MemoryError) as error:  # a frame of impossible size or format
                    damage.append(_reason(error))
            elif sound is not None:
                try:
                    sound.add(frame, relative)
                except (ValueError, OSError) as error:  # sound that changes its shape to something impossible
                    damage.append(_reason(error))
            yield from ready()
        if decoded == 0:
            why = f"; {damage[0]}" if damage else ""
            raise DataError(f"{self.path}: not a single frame could be decoded{why}")
        with contextlib.suppress(ValueError, OSError):  # the last frame may be the damaged one
            waiting.extend(pictures.end(self.info.fps))
        ended = True
        rest = len(waiting) % count
        if rest and (2 * rest >= count or (index == 0 and len(waiting) < count)):
            waiting.extend([waiting[-1]] * (count - rest))
        if not waiting and index == 0 and pictures.frame is not None:
            with contextlib.suppress(ValueError, OSError):
                waiting.extend([_pixels(pictures.frame, self.visual.frame_size, pictures.reformatter)] * count)
        yield from ready()
        watched = pictures.time + pictures.last_length
        if (
            origin and watched + origin > 0.95 * self.info.duration
        ):  # some files count their length from zero all the same
            self.info.duration = min(self.info.duration, watched)
        if sound is not None and sound.peak < SILENCE:
            self.notes.append("the audio track is silent")
        if damage:
            where = f"; read {watched:.1f} of {self.info.duration:.1f} s" if watched < 0.95 * self.info.duration else ""
            self.notes.append(f"damaged: {len(damage)} parts could not be decoded ({damage[0]}){where}")
        elif self.info.duration and watched < 0.9 * self.info.duration - 1:
            self.notes.append(f"cut short: pictures end at {watched:.1f} of {self.info.duration:.1f} s")
        if not self.info.duration:
            self.info.duration = watched

    def features(self, batch: int = 16) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """(visual [n, Dv], audio [n, Da]) for up to `batch` snippets at a time, in order."""
        held: list[Snippet] = []
        for snippet in self.snippets():
            held.append(snippet)
            if len(held) == batch:
                yield self._encode(held)
                held = []
        if held:
            yield self._encode(held)

    def _encode(self, held: list[Snippet]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.visual(np.stack([s.frames for s in held])), self.audio(np.stack([s.wave for s in held]))


def frame_at(path: Path | str, seconds: float, *, width: int) -> NDArray[np.uint8] | None:
    """The picture shown at a time, RGB [H, W, 3] at the given width; None where none can be decoded."""
    av = _av()
    source = _Input(Path(path))
    with source.container:
        origin = source.origin or 0.0
        best = None
        # Some formats have no index to seek by, or lead behind their last key picture; then from the beginning.
        for start in (max(0.0, seconds), 0.0):
            try:
                source.container.seek(round((origin + start) * 1e6), backward=True)
            except av.FFmpegError:
                continue
            for _, frame in _decoded(source, [source.video], []):
                if best is not None and frame.time is not None and frame.time - origin > seconds:
                    break
                best = frame
            if best is not None:
                break
        if best is None:
            return None
        shown = (best.height, best.width) if _rotation(best) % 180 else (best.width, best.height)
        height = max(1, round(width * shown[1] / shown[0]))
        return _pixels(best, (width, height), av.video.reformatter.VideoReformatter())


def write_video(
    path: Path | str,
    frames: Iterable[NDArray[np.uint8]],
    wave: NDArray[np.float32] | None,
    *,
    fps: float = 24,
    sample_rate: int = 16000,
    bit_rate: int | None = None,
) -> None:
    """Write RGB frames [H, W, 3] (even sides) and mono sound in [-1, 1] as H.264 + AAC in .mp4, or what the suffix says.

    `bit_rate` (bits a second) is the pictures' average; by default quality is constant and the rate what it takes.
    MPEG-4 takes H.264's place where FFmpeg was built without it. The file appears whole or not at all.
    """
    av = _av()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".half-{path.name}")
    webm = path.suffix == ".webm"
    codec = "libvpx-vp9" if webm else "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov", ".m4v") else {}
    try:
        with av.open(str(half), "w", options=options) as container:
            video: Any = None
            audio = None
            if wave is not None:
                audio = container.add_stream(
                    "libopus" if webm else "aac", rate=48000 if webm else sample_rate, layout="mono"
                )
            position = 0
            for number, pixels in enumerate(frames):
                if video is None:
                    video = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
                    video.height, video.width = pixels.shape[:2]
                    video.pix_fmt = "yuv420p"
                    if bit_rate is not None or codec != "libx264":
                        video.bit_rate = bit_rate or 2_000_000
                    if codec == "libx264":
                        video.options = {"preset": "veryfast"} | ({} if bit_rate else {"crf": "20"})
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                if audio is not None and wave is not None:
                    stop = min(len(wave), round((number + 1) / fps * sample_rate))
                    container.mux(_sound_packets(av, audio, wave, position, stop, sample_rate))
                    position = stop
            if video is None:
                raise DataError(f"{path}: no frames to write")
            container.mux(video.encode(None))
            if audio is not None and wave is not None:
                container.mux(_sound_packets(av, audio, wave, position, len(wave), sample_rate))
                container.mux(audio.encode(None))
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def _sound_packets(av: Any, stream: Any, wave: NDArray[np.float32], start: int, stop: int, rate: int) -> list[Any]:
    if start >= stop:
        return []
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(wave[None, start:stop], np.float32), format="flt", layout="mono"
    )
    frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
    return list(stream.encode(frame))
