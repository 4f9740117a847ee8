"""Video files as streams of snippets: time, shape, sound, damage, memory; and what is no video."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from counterpoint.data.media import SnippetReader, frame_at, probe, sample_times, write_video
from counterpoint.data.media.opened import load_av
from counterpoint.errors import DataError

RATE = 16000


class Eye:
    """Mean colour of every frame."""

    name, dim, frames_per_snippet, frame_size = "eye", 12, 4, (32, 16)

    def __call__(self, frames):
        return frames.mean((2, 3)).reshape(len(frames), -1).astype(np.float32)


class Ear:
    """Loudness."""

    name, dim, sample_rate, window_seconds = "ear", 1, RATE, 0.5

    def __call__(self, wave):
        return np.sqrt((wave**2).mean(1, keepdims=True))


def read(path, seconds=0.5):
    with SnippetReader(path, Eye(), Ear(), snippet_seconds=seconds) as reader:
        return list(reader.snippets()), reader


def grey(level, size=(32, 16)):
    return np.full((size[1], size[0], 3), level, np.uint8)


def tone(seconds, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def encode(
    path, frames, times, *, fps=30, codec="ffv1", pix_fmt="yuv444p", wave=None, wave_start=0.0, rate=RATE, layout="mono"
):
    """Encode frames at any times (seconds), sound at any rate and start."""
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=fps)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = pix_fmt
        video.codec_context.time_base = Fraction(1, 1000)
        sound = (
            out.add_stream("pcm_s16le" if path.suffix != ".mp4" else "aac", rate=rate, layout=layout)
            if wave is not None
            else None
        )
        for picture, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if sound is not None:
            planes = np.ascontiguousarray(np.stack([wave] * (2 if layout == "stereo" else 1), 1).reshape(1, -1))
            whole = av.AudioFrame.from_ndarray(planes, format="flt", layout=layout)
            whole.sample_rate, whole.pts, whole.time_base = rate, round(wave_start * rate), Fraction(1, rate)
            out.mux(sound.encode(whole))
            out.mux(sound.encode(None))
    return path


def test_sample_times_lie_in_the_middle_of_equal_parts():
    np.testing.assert_allclose(sample_times(2, 2, 1.0), [0.25, 0.75, 1.25, 1.75])


@pytest.mark.parametrize("fps", [24, 25, 30, 60, 12, 8])
def test_a_sample_shows_the_latest_frame_whatever_the_frame_rate(tmp_path, fps):
    count = 3 * fps
    path = encode(tmp_path / "a.mkv", [grey(n * 250 // count) for n in range(count)], np.arange(count) / fps, fps=fps)
    snippets, reader = read(path)
    assert len(snippets) == 6
    shown = np.concatenate([s.frames for s in snippets])[:, 0, 0, 0]
    times = sample_times(6, 4, 0.5)
    expected = np.floor(times * fps + 1e-6) * 250 // count
    # Frame times are whole milliseconds in the file; a sample exactly on one may see either neighbour.
    fair = np.abs(times * fps - np.rint(times * fps)) > 0.05
    assert np.abs(shown[fair] - expected[fair]).max() <= 2
    assert reader.info.fps == pytest.approx(fps, rel=0.05)


def test_variable_frame_rate_goes_by_time_and_not_by_count(tmp_path):
    times = np.concatenate([np.arange(0, 1, 0.02), np.arange(1, 3, 0.4)])  # 50 frames, then 5
    path = encode(tmp_path / "a.mkv", [grey(int(80 * t)) for t in times], times)
    snippets, _ = read(path)
    shown = np.concatenate([s.frames for s in snippets])[:, 0, 0, 0]
    expected = [int(80 * times[times <= t + 1e-6].max()) for t in sample_times(len(snippets), 4, 0.5)]
    assert len(snippets) == 6
    assert np.abs(shown - np.array(expected)).max() <= 2


def test_ffmpeg_says_nothing_where_another_library_has_asked_it_to(monkeypatch):
    """Its messages take the interpreter's lock in the decoder's threads, and a closing file waits for these."""
    import av

    before = av.logging.get_level()
    try:
        av.logging.set_level(av.logging.ERROR)  # as torchvision does up to 0.23
        load_av()
        assert av.logging.get_level() is None
    finally:
        av.logging.set_level(before)


def test_a_video_that_starts_late_is_laid_on_its_own_clock(tmp_path):
    path = encode(tmp_path / "a.mkv", [grey(int(80 * t)) for t in np.arange(0, 2, 0.05)], np.arange(100, 102, 0.05))
    snippets, reader = read(path)
    assert len(snippets) == 4
    assert snippets[-1].frames[-1, 0, 0, 0] == pytest.approx(80 * 1.9, abs=8)
    assert reader.notes == ["no audio track: judged by sight, with silence for sound"]


@pytest.mark.parametrize(("turn", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_rotated_phone_videos_are_shown_upright(tmp_path, turn, matrix):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :16] = 255  # left edge bright, as stored
    path = tmp_path / "a.mp4"
    write_video(path, [picture] * 24, None)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40
    a, b, c, d = (v << 16 for v in matrix)
    struct.pack_into(">9i", raw, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(raw))
    info = probe(path)
    assert (info.width, info.height) == ((32, 64) if turn != 180 else (64, 32))
    snippets, _ = read(path)
    shown = snippets[0].frames[0].mean(2)
    edges = {"left": shown[:, :4], "right": shown[:, -4:], "top": shown[:2], "bottom": shown[-2:]}
    brightest = max(edges, key=lambda name: edges[name].mean())
    # The matrix turns clockwise: what is stored at the left comes to stand on top, at the right, at the bottom.
    assert brightest == {90: "top", 180: "right", 270: "bottom"}[turn]
    thumbnail = frame_at(path, 0.5, width=40)
    assert thumbnail.shape == ((80, 40, 3) if turn != 180 else (20, 40, 3))


@pytest.mark.parametrize("size", [(61, 47), (3, 5), (1, 1), (500, 2), (7, 300)])
def test_videos_of_odd_and_extreme_sizes_are_read(tmp_path, size):
    path = encode(tmp_path / "a.mkv", [grey(200, size)] * 30, np.arange(30) / 30)
    snippets, reader = read(path)
    assert (reader.info.width, reader.info.height) == size
    assert len(snippets) == 2
    assert snippets[0].frames.shape == (4, 16, 32, 3)
    assert abs(int(snippets[0].frames.mean()) - 200) <= 2


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "mjpeg", "yuvj420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mkv", "libx264", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.ts", "mpeg2video", "yuv420p"),
        ("a.flv", "flv", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("ohne Endung", "mpeg4", "yuv420p"),
    ],
)
def test_every_container_and_codec_is_read(tmp_path, name, codec, pix_fmt):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    path = tmp_path / name
    frames = [grey(60 + 3 * n) for n in range(48)]
    with av.open(str(path), "w", format="avi" if "." not in name else None) as out:
        video = out.add_stream(codec, rate=24)
        video.height, video.width, video.pix_fmt = 16, 32, pix_fmt
        for picture in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)))
        out.mux(video.encode(None))
    snippets, reader = read(path)
    assert len(snippets) == 4
    assert reader.info.duration == pytest.approx(2, abs=0.15)
    levels = [s.frames.mean() for s in snippets]
    assert np.all(np.diff(levels) > 15)
    assert frame_at(path, 1.9, width=32) is not None


def test_sound_of_any_rate_ends_with_its_snippet(tmp_path):
    wave = np.concatenate([np.zeros(44100, np.float32), 0.5 * np.ones(44100, np.float32)])
    path = encode(tmp_path / "a.mkv", [grey(9)] * 60, np.arange(60) / 30, wave=wave, rate=44100, layout="stereo")
    snippets, reader = read(path)
    loud = [float(np.abs(s.wave).mean()) for s in snippets]
    assert loud == pytest.approx([0, 0, 0.5, 0.5], abs=0.02)
    assert all(s.wave.shape == (8000,) for s in snippets)
    assert reader.notes == []


def test_sound_that_starts_late_or_ends_early_leaves_silence(tmp_path):
    frames, times = [grey(9)] * 90, np.arange(90) / 30
    late = encode(tmp_path / "late.mkv", frames, times, wave=tone(1.0), wave_start=1.0)
    loud = [float(np.abs(s.wave).mean()) > 0.1 for s in read(late)[0]]
    assert loud == [False, False, True, True, False, False]


def test_silent_and_missing_sound_are_reported(tmp_path):
    frames, times = [grey(9)] * 30, np.arange(30) / 30
    _, reader = read(encode(tmp_path / "a.mkv", frames, times, wave=np.zeros(RATE, np.float32)))
    assert reader.notes == ["the audio track is silent"]
    snippets, reader = read(encode(tmp_path / "b.mkv", frames, times))
    assert not reader.info.has_audio
    assert not snippets[0].wave.any()


def test_the_last_snippet_counts_when_it_is_half_full(tmp_path):
    for seconds, expected in ((1.15, 2), (1.3, 3), (0.1, 1), (0.5, 1)):
        count = round(seconds * 30)
        path = encode(tmp_path / "a.mkv", [grey(9)] * count, np.arange(count) / 30)
        assert len(read(path)[0]) == expected, seconds


def test_a_single_frame_is_one_snippet(tmp_path):
    path = encode(tmp_path / "a.mkv", [grey(77)], [0.0])
    (snippet,), _ = read(path)
    assert abs(int(snippet.frames[2, 5, 5, 0]) - 77) <= 2


def test_a_cut_file_is_read_as_far_as_it_goes_and_noted(tmp_path):
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 255, (64, 96, 3), dtype=np.uint8) for _ in range(96))
    write_video(tmp_path / "whole.mp4", noise, tone(4.0))
    whole, _ = read(tmp_path / "whole.mp4")
    raw = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(raw[: len(raw) * 6 // 10])
    part, reader = read(tmp_path / "cut.mp4")
    assert len(whole) == 8
    assert 2 <= len(part) < 8
    assert len(reader.notes) == 1
    assert "of 4.0 s" in reader.notes[0]
    np.testing.assert_array_equal(part[0].frames, whole[0].frames)


def test_an_unfinished_recording_is_reported(tmp_path):
    write_video(tmp_path / "a.mp4", [grey(9)] * 48, None)
    raw = (tmp_path / "a.mp4").read_bytes()
    at = raw.index(b"moov")
    (tmp_path / "a.mp4").write_bytes(raw[: at - 4])
    with pytest.raises(DataError, match=r"a\.mp4: not a media file.*index is missing"):
        read(tmp_path / "a.mp4")


@pytest.mark.parametrize("reader", [read, probe, lambda p: frame_at(p, 0, width=10)])
def test_what_is_no_video_is_refused_by_name(tmp_path, reader):
    (tmp_path / "text.mp4").write_text("this is not a video " * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    with av.open(str(tmp_path / "music.wav"), "w") as out:
        sound = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, RATE), np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE
        out.mux(sound.encode(frame))
    expected = {
        "text.mp4": "not a media file",
        "empty.mp4": "the file is empty",
        "noise.mkv": "not a media file",
        "music.wav": "has no video stream",
        "nowhere.mp4": "no such file",
        "": "is a directory",
    }
    for name, said in expected.items():
        with pytest.raises(DataError) as caught:
            reader(tmp_path / name)
        assert said in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)


def test_written_files_are_whole_or_absent(tmp_path):
    def frames():
        yield grey(1)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "a.mp4", frames(), None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], None)
    assert list(tmp_path.iterdir()) == []


def test_frame_at_returns_the_frame_of_any_time(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, [grey(n * 2) for n in range(120)], None)
    for seconds, level in ((0.0, 0), (2.5, 120), (4.9, 236), (100.0, 238), (-3.0, 0)):
        picture = frame_at(path, seconds, width=16)
        assert picture.shape == (8, 16, 3)
        assert abs(float(picture.mean()) - level) < 8, seconds


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_length(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    def long(minutes, name):
        second = av.AudioFrame.from_ndarray((tone(1)[None] * 32767).astype(np.int16), format="s16", layout="mono")
        second.sample_rate, second.time_base = RATE, Fraction(1, RATE)
        with av.open(str(tmp_path / name), "w") as out:
            video = out.add_stream("mpeg4", rate=2)
            video.height, video.width, video.pix_fmt = 16, 32, "yuv420p"
            sound = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
            for n in range(60 * minutes):
                for k in (0, 1):
                    out.mux(video.encode(av.VideoFrame.from_ndarray(grey((n + k) % 250), format="rgb24")))
                second.pts = n * RATE
                out.mux(sound.encode(second))
            out.mux(video.encode(None))
        return tmp_path / name

    short, much = long(1, "short.avi"), long(15, "long.avi")

    def watch(path):
        peak = rows = 0
        with SnippetReader(path, Eye(), Ear(), snippet_seconds=0.5) as reader:
            for visual, _ in reader.features():
                rows += len(visual)
                peak = max(peak, resident())
        return rows, peak

    watch(short)
    _, before = watch(short)
    rows, after = watch(much)
    assert rows == 15 * 60 * 2
    # The sound alone is 58 MB, the frames 3 MB, once decoded.
    assert after - before < 25, f"{after - before:.0f} MB more for 15 times the length"
