"""Make small odd media files, from a seed, whose pictures and sound encode the time.

The brightness of a picture (`level`) and the pitch of the sound (`pitch`) rise with the time of their recording. A few
sources are encoded once. Every file is a copy of their packets into some container, with offsets, cuts, dropped pictures and
further tracks. `Made` computes the expected picture and sound at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 16000
SECONDS = 3.0
SIZE = (64, 48)


def level(seconds):
    """Return the brightness (0..255) of the picture recorded at a time."""
    return 20 + 70 * np.asarray(seconds)


def pitch(seconds):
    """Return the frequency (Hz) of the sound recorded at a time."""
    return 500 + 1000 * np.asarray(seconds)


def heard(wave):
    """Return the time at which a short piece of sound was recorded; None when it is silent."""
    if np.abs(wave).max() < 0.02:
        return None
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 8 * len(wave))) ** 2
    near = spectrum > 0.1 * spectrum.max()
    frequency = float((np.arange(len(spectrum)) * spectrum)[near].sum() / spectrum[near].sum()) * RATE / (8 * len(wave))
    return (frequency - 500) / 1000


@dataclass
class Made:
    """A file and the truth about it. Times are seconds."""

    path: Path
    what: str
    fps: float
    shown: list[tuple[float, float]]  # (time in the file, time recorded) of every picture, in order of time
    sounds: list[tuple[float, float, float]]  # (from, to) in the file, and the time recorded at its beginning
    length: float

    def picture(self, seconds):
        """Return the time at which the picture shown at a time was recorded."""
        before = [recorded for time, recorded in self.shown if time <= seconds + 1e-3]
        return before[-1] if before else self.shown[0][1]

    def sound(self, start, stop):
        """Return when the middle of a piece of sound was recorded; None in silence, nan where sound begins or ends in it."""
        for low, high, recorded in self.sounds:
            if low + MARGIN <= start and stop <= high - MARGIN:
                return (start + stop) / 2 - low + recorded
            if start < high + MARGIN and low - MARGIN < stop:
                return np.nan
        return None


MARGIN = 0.12  # seconds around the ends of sound that are not judged: codecs pad there


def encode_video(path, codec, fps, options=None, seconds=SECONDS, dark=False, size=SIZE):
    """Encode the pictures into a file of their own."""
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=fps, options=options or {})
        video.width, video.height = size
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for n in range(round(seconds * fps)):
            picture = np.full((size[1], size[0], 3), 0 if dark else level(n / fps).round(), np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode(None))
    return path


def encode_sound(path, codec, rate=48000, layout="mono", seconds=SECONDS, silent=False):
    """Encode the sound into a file of its own."""
    time = np.arange(round(seconds * rate)) / rate
    wave = (0.0 if silent else 0.5) * np.sin(2 * np.pi * (500 * time + 500 * time**2)).astype(np.float32)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        planes = np.repeat(wave[:, None], 2 if layout == "stereo" else 1, 1).astype(np.float32)
        for start in range(0, len(planes), 1024):
            piece = np.ascontiguousarray(planes[start : start + 1024].reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(piece, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


class Sources:
    """The encoded tracks that files are put together from."""

    def __init__(self, folder):
        self.folder = Path(folder)
        gop = {"g": "10", "bf": "2", "preset": "ultrafast", "x264-params": "bframes=2:b-adapt=0:keyint=10:log-level=0"}
        one = {**gop, "g": "1000", "x264-params": "bframes=2:b-adapt=0:keyint=1000:scenecut=0:log-level=0"}
        self.video = {}
        for name, codec, fps, options in [
            ("x25", "libx264", 25, gop),
            ("x10", "libx264", 10, {**gop, "x264-params": "bframes=0:keyint=10:log-level=0"}),
            ("one30", "libx264", 30, one),
            ("mpeg2", "mpeg2video", 25, {"g": "10", "bf": "2"}),
            ("mpeg4", "mpeg4", 24, {"g": "12"}),
            ("jpeg", "mjpeg", 20, {}),
            ("vp8", "libvpx", 20, {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
        ]:
            self.video[name] = (encode_video(self.folder / f"{name}.mkv", codec, fps, options), fps)
        self.audio = {
            name: encode_sound(self.folder / f"{name}.{ending}", codec, rate, layout)
            for name, ending, codec, rate, layout in [
                ("aac", "mkv", "aac", 48000, "stereo"),
                ("mp2", "mkv", "mp2", 44100, "mono"),
                ("pcm", "mkv", "pcm_s16le", 22050, "mono"),
                ("opus", "mkv", "libopus", 48000, "mono"),
            ]
        }
        self.dark = encode_video(self.folder / "dark.mkv", "libx264", 25, gop, dark=True)
        self.silent = encode_sound(self.folder / "silent.mkv", "aac", silent=True)

    def plain(self, path, video, audio, base=0.0, hole=(9.0, 9.0)):
        """Write a file of tracks that start together, `base` seconds into the file's clock; no sound in the hole."""
        found, fps = self.video[video]
        tracks = [_packets(found, "video")] + ([_packets(self.audio[audio], "audio")] if audio else [])
        with av.open(str(path), "w") as out:
            rows = []
            for n, (_, template, packets) in enumerate(tracks):
                track = out.add_stream_from_template(template)
                packets[:] = [row for row in packets if n == 0 or not hole[0] <= row[1] < hole[1]]
                rows += [(decoding, n, packet, time, track) for packet, time, decoding in packets]
            for decoding, n, packet, time, track in sorted(rows, key=lambda row: row[:2]):
                _write(out, packet, track, time + base, decoding + base, 0.0 if n else 1 / fps)
        shown = sorted((time, time) for _, time, _ in tracks[0][2])
        sounds = []
        if audio:
            last, time, _ = tracks[1][2][-1]
            end = time + float(last.duration * last.time_base)
            sounds = [(0.0, end, 0.0)] if hole[0] > end else [(0.0, hole[0], 0.0), (hole[1], end, hole[1])]
        for container, _, _ in tracks:
            container.close()
        return Made(
            Path(path), video, fps, shown, sounds, max([shown[-1][0] + 1 / fps] + [high for _, high, _ in sounds])
        )


def _write(out, packet, track, time, decoding, span):
    """Write a packet at a time into a track; a span of 0 keeps the packet's own."""
    fine = Fraction(1, 90000)
    span = span or float(packet.duration * packet.time_base)
    packet.stream = track
    packet.time_base = fine
    packet.duration = round(span / float(fine))
    packet.pts, packet.dts = round(time / float(fine)), round(decoding / float(fine))
    out.mux(packet)


# Container, video sources, audio sources, whether tracks may start at different times.
KINDS = [
    ("mp4", ["x25", "x10", "one30", "mpeg4"], ["aac"], True),
    ("mkv", ["x25", "x10", "one30", "mpeg2", "jpeg"], ["aac", "pcm", "mp2"], True),
    ("ts", ["x25", "x10", "one30", "mpeg2"], ["aac", "mp2"], True),
    ("flv", ["x25", "x10", "one30"], ["aac"], True),
    ("avi", ["mpeg4", "jpeg"], ["mp2", "pcm"], False),
    ("mov", ["x25", "jpeg", "one30"], ["aac", "pcm"], True),
    ("webm", ["vp8"], ["opus"], True),
    ("mpg", ["mpeg2"], ["mp2"], False),
    ("h264", ["x25", "one30", "x10"], [None], False),
    ("nut", ["x25", "mpeg4"], ["aac", "pcm"], True),
]


def _packets(path, kind):
    """Return (packet, display time, decoding time) of the only track, from 0; times in seconds."""
    container = av.open(str(path))
    stream = getattr(container.streams, kind)[0]
    found = [p for p in container.demux(stream) if p.size]
    base = float(stream.time_base)
    first = min(p.pts for p in found) * base
    step = float(1 / stream.average_rate) if kind == "video" else 0.0
    out, decoding = [], -np.inf
    for p in found:
        time = p.pts * base - first
        out.append([p, time, p.dts * base - first if p.dts is not None else None])
    known = next((i for i, (_, _, d) in enumerate(out) if d is not None), 0)
    for i, row in enumerate(out):  # Matroska leaves out the first decoding times
        row[2] = out[known][2] - (known - i) * step if row[2] is None else row[2]
        row[2] = decoding = max(row[2], decoding + 1e-4)
    return container, stream, out


def make(number, sources, folder):
    """Make file `number` of the series; the same number gives the same file."""
    rng = np.random.default_rng([5, number])
    ending, videos, audios, offsets = KINDS[number % len(KINDS)]
    name, audio = str(rng.choice(videos)), audios[int(rng.integers(len(audios)))]
    path = Path(folder) / f"{number}.{ending}"
    dv, da = (float(rng.choice([0, 0, 0.4, 1.1])), float(rng.choice([0, 0, 0.3, 0.9]))) if offsets else (0.0, 0.0)
    base = float(rng.choice([0, 0, 7, 500])) if ending in ("ts", "nut", "mkv") else 0.0
    if audio is not None and rng.random() < 0.15:
        audio = None
    one = name.startswith("one")
    cut = ending != "h264" and not one and rng.random() < 0.3  # the beginning is missing, up to a key picture
    short_sound, short_pictures = rng.random() < 0.2, not one and rng.random() < 0.2
    drop = name == "jpeg" and ending in ("mkv", "mov") and rng.random() < 0.7
    decoys = ending in ("mkv", "mp4", "mov") and rng.random() < 0.3

    last_span = 0.0
    opened, fps = [], sources.video[name][1]
    container, stream, packets = _packets(sources.video[name][0], "video")
    opened.append(container)
    keys = [i for i, (p, _, _) in enumerate(packets) if p.is_keyframe]
    if cut and len(keys) > 2:
        packets = packets[keys[1] :]
    if short_pictures and len(keys) > 4:
        packets = packets[: keys[-2] - (keys[1] if cut else 0)]
    if drop:
        packets = [row for i, row in enumerate(packets) if i == 0 or rng.random() < 0.6]
    tracks = [("video", stream, packets, dv)]
    heard_rows = []
    if audio is not None:
        container, sound, rows = _packets(sources.audio[audio], "audio")
        opened.append(container)
        if short_sound:
            rows = [row for row in rows if row[1] < 1.8]
        # The sound of what was cut off goes with it.
        start = packets[0][1] if cut else 0.0
        heard_rows = [row for row in rows if row[1] >= start - 1e-6]
        last_span = float(heard_rows[-1][0].duration * sound.time_base)
        tracks.append(("audio", sound, heard_rows, da))
    extra = []
    if decoys:
        for kind, source in (("video", sources.dark), ("audio", sources.silent)):
            if kind == "audio" and audio is None:
                continue
            container, decoy, rows = _packets(source, kind)
            opened.append(container)
            extra.append((kind, decoy, [row for row in rows if row[1] < 2], 0.0))
    with av.open(str(path), "w", format={"mpg": "mpeg", "ts": "mpegts"}.get(ending)) as out:
        queue = []
        for is_decoy, (_, template, rows, shift) in [(True, t) for t in extra] + [(False, t) for t in tracks]:
            track = out.add_stream_from_template(template)
            if decoys:
                track.disposition = av.stream.Disposition(0 if is_decoy else av.stream.Disposition.default)
            early = rows[0][1] if rows and not is_decoy and cut else 0.0
            queue += [(dts + base + shift - early, n, packet, time + base + shift - early, track)
                      for n, (packet, time, dts) in enumerate(rows)]  # fmt: skip
        for decoding, _, packet, time, track in sorted(queue, key=lambda row: (row[0], row[1])):
            _write(out, packet, track, time, decoding, 1 / fps if track.type == "video" else 0.0)
    for container in opened:
        container.close()
    early = packets[0][1] if cut else 0.0
    starts = [dv] + ([da] if heard_rows else []) + ([0.0] if extra else [])
    origin = min(starts)
    shown = sorted((t - early + dv - origin, t) for _, t, _ in packets)
    sounds, ends = [], [shown[-1][0] + 1 / fps]
    if heard_rows:
        span = last_span
        first = heard_rows[0][1]
        low = da - origin
        high = low + heard_rows[-1][1] + span - first
        sounds.append((low, high, first))
        ends.append(high)
    what = f"{name} {audio} dv={dv} da={da} base={base} cut={cut} drop={drop} decoys={decoys}"
    return Made(path, what, fps, shown, sounds, max(ends))
