"""Read a video file once, from beginning to end, as snippets of pictures and sound."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.media.clock import FrameTimes, demuxed, reason
from counterpoint.data.media.opened import Opened, is_address
from counterpoint.data.media.pictures import Sampler, pixels
from counterpoint.data.media.waves import SILENCE, SoundLine
from counterpoint.errors import DataError
from counterpoint.words import counted

if TYPE_CHECKING:
    from counterpoint.encoders import AudioBackbone, VisualBackbone

# Maximum delay (seconds) of sound behind its picture in the file; later sound is left out. It bounds the memory.
LONGEST_WAIT = 300.0
# Maximum number of consecutive packets that cannot be decoded; then the rest of the file is left out.
MOST_FAILURES = 1000
# The same for live streams: how long sound may come behind its picture, and pictures behind their sound.
LIVE_WAIT, LIVE_STALL = 10.0, 30.0
# Remainders shorter than this (seconds) get no note.
_NOTED = 0.1


class Snippet(NamedTuple):
    """One snippet: its number, frames [F, H, W, 3] uint8 RGB, and the mono sound that ends with it."""

    number: int
    frames: NDArray[np.uint8]
    wave: NDArray[np.float32]


def sample_times(snippets: int, frames_per_snippet: int, snippet_seconds: float) -> NDArray[np.float64]:
    """Return the times (seconds) of the sampled frames of the first `snippets`: [snippets * frames_per_snippet]."""
    return (np.arange(snippets * frames_per_snippet) + 0.5) * snippet_seconds / frames_per_snippet


def decoded(source: Opened, streams: list[Any], damage: list[str]) -> Iterator[tuple[Any, Any]]:
    """Yield (stream, frame) in file order. Record every packet that cannot be decoded in `damage`."""
    failures = 0
    for packet in demuxed(source.container, streams, source.clock, source.broken, damage):
        if source.repeats(packet):
            continue
        try:
            frames = packet.decode()
            failures = 0
        except source.av.error.EOFError:
            continue
        except source.broken as error:
            damage.append(reason(error))
            failures += 1
            if failures > MOST_FAILURES:
                return
            continue
        for frame in frames:
            yield packet.stream, frame


class Damage(list[str]):
    """The reasons of parts that could not be decoded: the first ones, and the number of all."""

    KEPT = 10
    parts = 0

    def append(self, reason: str) -> None:
        self.parts += 1
        if len(self) < self.KEPT:
            super().append(reason)


class SnippetReader:
    """A reader of one video file, once, from beginning to end, for a pair of backbones.

        with SnippetReader(path, visual, audio, snippet_seconds=16 / 24) as reader:
            for visual_rows, audio_rows in reader.features():
                ...

    `info` holds the header's facts. After reading, `info.duration` is the end time of the pictures. `notes` holds notes for the
    user: no sound, silence, damage, and all parts that are left out, in seconds.

    Args:
        path: Path of the file, or the address of a stream as a string.
        visual: Defines the number and size of a snippet's frames, and converts them to feature rows.
        audio: Defines rate and length of a snippet's sound, and converts it to feature rows.
        snippet_seconds: Length of a snippet in seconds, > 0.
        live: Whether it is a live stream. Then late sound is left out after 10 s, not 300 s, and sound without pictures for 30 s
            is an error. Memory is bounded for any length.

    Raises DataError when the file cannot be opened or has no picture.
    """

    def __init__(
        self,
        path: Path | str,
        visual: VisualBackbone,
        audio: AudioBackbone,
        *,
        snippet_seconds: float,
        live: bool = False,
    ) -> None:
        self.path = path if is_address(path) else Path(path)
        self.live = live
        self.longest_wait = LIVE_WAIT if live else LONGEST_WAIT
        self.visual, self.audio = visual, audio
        self.seconds = snippet_seconds
        self.source = Opened(self.path)
        self.info = self.source.info()
        self.notes: list[str] = self.source.notes()

    def __enter__(self) -> SnippetReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.container.close()

    @property
    def steady(self) -> bool:
        """Whether the file's clock never jumped in the part that was read, so that seeks by time are reliable."""
        return self.source.clock.origin is not None and not self.source.clock.jumps

    def snippets(self) -> Iterator[Snippet]:
        """Yield the snippets in order. Drop a last snippet that is less than half full, unless it is the only one."""
        source, count = self.source, self.visual.frames_per_snippet
        reformatter = source.av.video.reformatter.VideoReformatter()
        sampler = Sampler(self.seconds / count, self.visual.frame_size, reformatter)
        times = source.times()
        rate = self.audio.sample_rate
        sound = None
        if source.audio is not None:
            # Channels are averaged by SoundLine: FFmpeg's own mix to mono is louder, and would clip.
            sound = SoundLine(lambda: source.av.AudioResampler(format="fltp", rate=rate), rate)
        length = round(self.audio.window_seconds * rate)
        waiting: deque[NDArray[np.uint8]] = deque()
        index = shown = 0
        ended = False
        damage = Damage()
        last: Any = None
        watched = 0.0
        missed = 0.0  # seconds of sound that are too late in the file

        def ready() -> Iterator[Snippet]:
            nonlocal index, missed
            while len(waiting) >= count:
                stop = round((index + 1) * self.seconds * rate)
                late = sound is not None and not ended and sound.end < stop
                if late and len(waiting) / count * self.seconds < self.longest_wait:
                    return
                frames = np.stack([waiting.popleft() for _ in range(count)])
                wave = sound.window(stop, length) if sound is not None else np.zeros(length, np.float32)
                yield Snippet(index, frames, wave)
                index += 1

        for stream, frame in decoded(source, source.streams, damage):
            if stream is source.video:
                if last is None:
                    source.show(self.info, frame)
                watched = times.time(frame)
                last = frame
                shown += 1
                try:
                    waiting.extend(sampler.add(frame, watched))
                except (ValueError, OSError, MemoryError) as error:  # a frame of invalid size or format
                    damage.append(reason(error))
            elif sound is not None:
                try:
                    time, span = self._sound_time(frame), frame.samples / frame.sample_rate
                    given_up = index * self.seconds - span
                    if time is not None and time <= given_up and sound.end / rate <= given_up:
                        missed += span
                    sound.add(frame, time)
                    if self.live and sound.end / rate - watched > LIVE_STALL:
                        raise DataError(f"{self.path}: sound for {LIVE_STALL:.0f} s, but no picture")
                except (ValueError, OSError, ZeroDivisionError) as error:  # sound of an invalid shape
                    damage.append(reason(error))
            yield from ready()
        if last is None:
            why = f"; {damage[0]}" if damage else ""
            raise DataError(f"{self.path}: not a single frame could be decoded{why}")
        exact = source.container.format.name.startswith("mov")
        watched += times.length(last, exact=exact, rest=self.info.duration - watched) or sampler.spacing
        watched = max(watched, source.still - (source.clock.origin or 0.0))
        with contextlib.suppress(ValueError, OSError):  # the last frame may be the damaged one
            waiting.extend(sampler.until(watched))
        if sound is not None:
            sound.close()
        ended = True
        rest = len(waiting) % count
        tail = 0.0
        if rest and (2 * rest >= count or (index == 0 and len(waiting) < count)):
            waiting.extend([waiting[-1]] * (count - rest))
        elif waiting or index:
            tail = watched - (index + len(waiting) // count) * self.seconds
        if not waiting and index == 0 and sampler.frame is not None:
            with contextlib.suppress(ValueError, OSError):
                waiting.extend([pixels(sampler.frame, self.visual.frame_size, reformatter)] * count)
        yield from ready()
        self._finish(watched, tail, times, sound, missed, damage)

    def _sound_time(self, frame: Any) -> float | None:
        """Return the time of a sound frame on the time line; None where it has no time stamp."""
        time = frame.time
        if time is None:
            return None
        if self.source.clock.origin is None:
            self.source.clock.origin = time
        return float(time - self.source.clock.origin)

    def _finish(
        self, watched: float, tail: float, times: FrameTimes, sound: SoundLine | None, missed: float, damage: Damage
    ) -> None:
        """Set the length to the part that was read, and add the notes for the user."""
        header, self.info.duration = self.info.duration, watched
        origin = self.source.clock.origin or 0.0
        if watched + origin > 0.95 * header:  # some files count their length from zero although they begin later
            header = min(header, watched)
        if times.counted > max(times.dated, 16):
            rate = 1 / times.step if times.step else self.source.rate
            kind = (
                f"{rate:.5g} pictures a second" if rate else "25 pictures a second, because the file declares no rate"
            )
            self.notes.append(f"without time stamps: time is counted at {kind}")
        if self.source.clock.jumps:
            often = counted(self.source.clock.jumps, "time")
            self.notes.append(f"the file's clock jumps {often} (joined recordings?): time continues over each jump")
        if sound is not None:
            if sound.peak < SILENCE:
                self.notes.append("the audio track is silent")
            self.notes += sound.notes()
            over = sound.end / sound.rate - watched
            if over > _NOTED:
                self.notes.append(f"{over:.1f} s of sound after the last picture are left out")
            if missed:
                self.notes.append(
                    f"{missed:.1f} s of sound lie more than {self.longest_wait:.0f} s behind their pictures in the file: left out"
                )
        if tail > _NOTED:
            self.notes.append(f"the last {tail:.2f} s, less than half a snippet, are left out")
        if damage:
            where = f"; read {watched:.1f} of {header:.1f} s" if watched < 0.95 * header else ""
            self.notes.append(f"damaged: {counted(damage.parts, 'part')} could not be decoded ({damage[0]}){where}")
        elif (
            header
            and watched < 0.9 * header - 1
            and not (sound is not None and sound.end / sound.rate > 0.9 * header - 1)
        ):
            self.notes.append(f"cut short: pictures end at {watched:.1f} of {header:.1f} s")

    def features(self, batch: int = 16) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Yield (visual [n, Dv], audio [n, Da]) for up to `batch` snippets at a time, in order."""
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
