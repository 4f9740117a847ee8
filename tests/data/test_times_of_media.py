"""200 odd media files: pictures and sound at their times, from the front, at any place, and in the middle."""

from __future__ import annotations

import struct
from fractions import Fraction

import av
import made_media
import numpy as np
import pytest
from made_media import RATE, heard, level, make

from counterpoint.data.media import SnippetReader, frame_at, frames_at, probe, sample_times, snippets, write_video
from counterpoint.data.sounds import decode_sound
from counterpoint.errors import DataError

SNIPPET = 0.5


class Eye:
    """Hands frames through."""

    name, dim, frames_per_snippet, frame_size = "eye", 1, 4, (8, 8)

    def __call__(self, frames):
        return frames.mean((1, 2, 3, 4))[:, None].astype(np.float32)


class Ear:
    """Hands sound through."""

    name, dim, sample_rate, window_seconds = "ear", 1, RATE, SNIPPET

    def __call__(self, wave):
        return wave.mean(1, keepdims=True)


def recorded(picture):
    """Return the time at which a picture was recorded."""
    return (float(picture.mean()) - 20) / 70


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    return made_media.Sources(tmp_path_factory.mktemp("sources"))


def check(made):
    """Return faults of how a file is read, as text."""
    faults = []
    near = 2.1 / made.fps + 0.03

    def picture(name, time, shown):
        expected = [made.picture(t) for t in (time - near, time, time + near)]
        if not min(expected) - near <= recorded(shown) <= max(expected) + near:
            faults.append(f"{name} at {time:.2f} s shows {recorded(shown):.2f}, not {expected[1]:.2f}")

    with SnippetReader(made.path, Eye(), Ear(), snippet_seconds=SNIPPET) as reader:
        snippets = list(reader.snippets())
    end = made.shown[-1][0] + 1 / made.fps
    if abs(reader.info.duration - end) > near + 0.05:
        faults.append(f"length {reader.info.duration:.2f}, not {end:.2f}")
    times = sample_times(len(snippets), 4, SNIPPET)
    for time, shown in zip(times, np.concatenate([s.frames for s in snippets]), strict=True):
        if time < end:  # beyond the end, the last sample fills up the snippet
            picture("frame", time, shown)
    for snippet in snippets:
        stop = (snippet.number + 1) * SNIPPET
        for start in (stop - 0.45, stop - 0.25):
            piece = snippet.wave[round((start - stop) * RATE) :][: RATE // 5]
            sound("sound", made, start, piece, faults)
    wanted = [0.0, end * 0.31, end * 0.77, end + 5]
    for time, shown in zip(wanted, frames_at(made.path, wanted, width=8), strict=True):
        if shown is None:
            faults.append(f"no picture at {time:.2f} s")
        else:
            picture("frames_at", min(time, end), shown)
    length = probe(made.path).duration
    if abs(length - made.length) > near + 0.1:
        faults.append(f"probe gives {length:.2f} s, not {made.length:.2f}")
    if made.sounds:
        try:
            wave = decode_sound(made.path, RATE, RATE // 5).wave
        except DataError as error:
            wave = np.zeros(RATE // 5, np.float32)
            if "silent" not in str(error) and "holds no sound" not in str(error):
                faults.append(str(error))
        sound("decode_sound", made, length / 2 - 0.1, wave, faults)
    return faults


def sound(name, made, start, piece, faults):
    """Add a fault where a piece of sound from `start` on was not recorded when it should have been."""
    expected, found = made.sound(start, start + len(piece) / RATE), heard(piece)
    if expected is None or found is None:
        wrong = (expected is None) != (found is None) and not (expected is not None and np.isnan(expected))
    else:
        wrong = abs(found - expected) > 0.1
    if wrong:
        faults.append(f"{name} from {start:.2f} s was recorded at {found}, not {expected}")


@pytest.mark.parametrize("part", range(8))
def test_pictures_and_sound_come_at_their_times(sources, tmp_path, part):
    faults = {}
    for number in range(part * 25, part * 25 + 25):
        made = make(number, sources, tmp_path)
        found = check(made)
        if found:
            faults[f"{made.path.name} {made.what}"] = found[:4]
        made.path.unlink()
    assert not faults, "\n".join(f"{name}: {found}" for name, found in faults.items())


def joined(path, parts, gap=0.0):
    """Join several files with separate clocks in one, as `cat` does."""
    path.write_bytes(b"".join(part.path.read_bytes() for part in parts))
    shown, sounds, start = [], [], 0.0
    for part in parts:
        shown += [(start + time, recorded) for time, recorded in part.shown]
        sounds += [(start + low, start + high, recorded) for low, high, recorded in part.sounds]
        start += part.length
    return made_media.Made(path, "joined", parts[0].fps, shown, sounds, start)


@pytest.mark.parametrize("bases", [(0, 0, 0), (500, 7, 100), (0, 3000, 0)])
def test_joined_recordings_go_on_at_each_joint_for_pictures_and_sound(sources, tmp_path, bases):
    parts = [sources.plain(tmp_path / f"{i}.ts", "x25", "mp2", base=base) for i, base in enumerate(bases)]
    made = joined(tmp_path / "joined.ts", parts)
    assert check(made) == []
    with SnippetReader(made.path, Eye(), Ear(), snippet_seconds=SNIPPET) as reader:
        list(reader.snippets())
    assert any("clock jumps 2 times" in note for note in reader.notes)
    assert not reader.steady


def test_time_goes_on_where_a_transport_stream_counts_from_zero_again(sources, tmp_path):
    made = sources.plain(tmp_path / "wrap.ts", "x25", "mp2", base=2**33 / 90000 - 1.4 - 1.0)
    assert check(made) == []


@pytest.mark.parametrize("name", ["x10", "x25"])
@pytest.mark.parametrize("kept", [2, 5, 1000])
def test_pictures_without_time_stamps_are_counted(sources, tmp_path, name, kept):
    made = sources.plain(tmp_path / "a.ts", name, None)
    made.path.write_bytes(without_stamps(made.path.read_bytes(), kept))
    assert check(made) == []


def without_stamps(raw, kept):
    """Make a transport stream in which only every `kept`-th PES packet has a time stamp; its bytes stay in place as stuffing."""
    data, number = bytearray(raw), 0
    for at in range(0, len(data), 188):
        body = at + 4 + (data[at + 4] + 1 if data[at + 3] & 0x20 else 0)
        if data[at + 1] & 0x40 and data[body : body + 3] == b"\0\0\1" and data[body + 3] & 0xF0 == 0xE0:
            if number % kept:
                length = data[body + 8]
                data[body + 7] &= 0x3F
                data[body + 9 : body + 9 + length] = b"\xff" * length
            number += 1
    return bytes(data)


def test_sound_goes_on_where_layout_and_rate_change(sources, tmp_path):
    for name, rate, layout in (("a", 44100, "mono"), ("b", 48000, "stereo"), ("c", 32000, "mono")):
        sources.audio[name] = made_media.encode_sound(tmp_path / f"{name}.mkv", "mp2", rate, layout)
    parts = [sources.plain(tmp_path / f"{name}.ts", "x25", name) for name in "abc"]
    assert check(joined(tmp_path / "joined.ts", parts)) == []


def packed(path, to):
    """Copy a file into a transport stream as FFmpeg's program does: up to 0.7 s of sound in one packet of the stream."""
    with av.open(str(path)) as found, av.open(str(to), "w", options={"max_delay": "700000"}) as out:
        tracks = {stream.index: out.add_stream_from_template(stream) for stream in found.streams}
        for packet in found.demux():
            if packet.dts is not None:
                packet.stream = tracks[packet.stream_index]
                out.mux(packet)
    return to


@pytest.mark.parametrize("rates", [(16000, 48000), (48000, 16000)])
def test_sound_goes_on_where_several_frames_of_another_rate_share_a_time_stamp(sources, tmp_path, rates):
    for rate in rates:  # silence takes few bytes, so many frames of it share a packet of the stream
        sources.audio[str(rate)] = made_media.encode_sound(tmp_path / f"{rate}.mkv", "aac", rate, silent=True)
    parts = [sources.plain(tmp_path / f"{rate}.mkv", "x25", str(rate)) for rate in rates]
    for part in parts:
        part.path = packed(part.path, part.path.with_suffix(".ts"))
    made = joined(tmp_path / "joined.ts", parts)
    with SnippetReader(made.path, Eye(), Ear(), snippet_seconds=SNIPPET) as reader:
        list(reader.snippets())
    assert any("clock jumps 1 time " in note for note in reader.notes)
    assert reader.info.duration == pytest.approx(made.length, abs=0.2)
    assert probe(made.path).duration == pytest.approx(made.length, abs=0.8)


@pytest.mark.parametrize("ending", ["mkv", "ts", "mp4", "flv"])
def test_a_hole_in_the_sound_is_silent_and_moves_nothing(sources, tmp_path, ending):
    assert check(sources.plain(tmp_path / f"a.{ending}", "x25", "aac", hole=(0.8, 1.9))) == []


def test_pictures_go_on_where_their_size_changes(sources, tmp_path):
    first = sources.plain(tmp_path / "a.ts", "x25", "mp2")
    sources.video["large"] = (
        made_media.encode_video(tmp_path / "l.mkv", "libx264", 25, {"g": "10"}, size=(96, 80)),
        25,
    )
    second = sources.plain(tmp_path / "b.ts", "large", "mp2")
    assert check(joined(tmp_path / "joined.ts", [first, second])) == []


# --- how pictures are shown -------------------------------------------------------------------------------------------

STRAIGHT = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)]
TURNED = [(0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", STRAIGHT + TURNED)
def test_the_display_matrix_is_applied_whole(tmp_path, matrix):
    path, picture = tmp_path / "a.mp4", np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 255  # the corner at top left, as stored
    picture[16:, :32] = 128  # below it
    write_video(path, [picture] * 12, None)
    raw = bytearray(path.read_bytes())
    a, b, c, d = (v << 16 for v in matrix)
    struct.pack_into(">9i", raw, raw.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(raw))

    def place(p, q):
        """Return where a stored point, seen from the middle, is shown."""
        return (matrix[0] * p + matrix[2] * q > 0, matrix[1] * p + matrix[3] * q > 0)

    frame = frame_at(path, 0.2, width=64 if matrix[0] else 32).mean(2)
    assert frame.shape == ((32, 64) if matrix[0] else (64, 32))
    corners = {
        (x, y): frame[slice(h, None) if y else slice(0, h), slice(w, None) if x else slice(0, w)].mean()
        for x in (False, True)
        for y in (False, True)
        for h, w in [(frame.shape[0] // 2, frame.shape[1] // 2)]
    }
    assert corners[place(-1, -1)] > 240
    assert 115 < corners[place(-1, 1)] < 140
    info = probe(path)
    assert (info.width, info.height) == frame.shape[::-1]
    assert info.mirrored == (matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(16, 11), Fraction(1, 2)])
def test_pixels_that_are_not_square_are_shown_as_players_show_them(tmp_path, ending, aspect):
    path = tmp_path / f"a.{ending}"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 66, 48, "yuv420p"
        video.codec_context.sample_aspect_ratio = aspect
        for _ in range(5):
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 66, 3), 9, np.uint8), format="rgb24")))
        out.mux(video.encode(None))
    info, frame = probe(path), frame_at(path, 0.1, width=round(66 * aspect))
    assert (info.width, info.height) == (round(66 * aspect), 48)
    assert frame.shape == (48, round(66 * aspect), 3)


# --- tracks, channels, rates ------------------------------------------------------------------------------------------


def read(path):
    with SnippetReader(path, Eye(), Ear(), snippet_seconds=SNIPPET) as reader:
        return list(reader.snippets()), reader


def test_the_default_tracks_are_used_and_the_others_noted(sources, tmp_path):
    number = next(n for n in range(200) if "decoys=True" in (m := make(n, sources, tmp_path)).what and m.sounds)
    made = make(number, sources, tmp_path)
    snippets, reader = read(made.path)
    assert max(float(np.abs(s.wave).max()) for s in snippets) > 0.3
    assert snippets[-1].frames.mean() > 100
    said = "\n".join(reader.notes)
    assert "1 further picture track not used: stream 0 (" in said
    assert "1 further sound track not used: stream 1 (" in said
    assert " s); stream 2 is used" in said


def two_channels(path, left, right, rate=RATE):
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("pcm_s16le", rate=rate, layout="stereo")
        for _ in range(round(25 * len(left) / rate)):
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(video.encode(None))
        for start in range(0, len(left), 1000):
            piece = np.stack([left[start : start + 1000], right[start : start + 1000]], 1).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece.astype(np.float32)), "flt", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    return path


def test_channels_that_cancel_give_the_louder_one(tmp_path):
    left = 0.5 * np.sin(np.arange(3 * RATE) / 5)
    left[: RATE // 2] = 0  # silent at first
    path = two_channels(tmp_path / "a.mkv", 0.9 * left, -left)
    snippets, reader = read(path)
    assert [float(np.abs(s.wave).max()) for s in snippets] == pytest.approx([0] + [0.5] * 5, abs=0.02)
    assert any("cancel each other: channel 2 is used" in note for note in reader.notes)
    assert np.abs(decode_sound(path, RATE, RATE).wave).max() == pytest.approx(0.5, abs=0.02)
    # Sound in one channel alone does not cancel.
    snippets, reader = read(two_channels(tmp_path / "b.mkv", left, 0 * left))
    assert float(np.abs(snippets[-1].wave).max()) == pytest.approx(0.25, abs=0.02)
    assert not any("cancel" in note for note in reader.notes)


@pytest.mark.parametrize(("ending", "codec"), [("mp3", "libmp3lame"), ("aac", "aac")])
def test_sound_without_a_header_is_timed_by_its_packets(tmp_path, ending, codec):
    """Variable bit rate: the quiet beginning takes few bytes, so bytes tell no time."""
    seconds, path = 24, tmp_path / f"a.{ending}"
    time = np.arange(seconds * 44100) / 44100
    wave = 0.5 * np.sin(2 * np.pi * (500 * time + 20 * time**2))
    wave[time > 14] += 0.3 * np.random.default_rng(0).uniform(-1, 1, int((time > 14).sum()))
    options = {"write_xing": "0", "id3v2_version": "0"} if ending == "mp3" else {}
    with av.open(str(path), "w", options=options) as out:
        sound = out.add_stream(codec, rate=44100, layout="mono", options={"global_quality": "500", "flags": "+qscale"})
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    piece = decode_sound(path, RATE, RATE // 5).wave
    peak = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 8 * len(piece))).argmax() * RATE / (8 * len(piece))
    assert (peak - 500) / 40 == pytest.approx(seconds / 2, abs=0.25)


# --- what is left out -------------------------------------------------------------------------------------------------


def test_sound_after_the_last_picture_and_a_short_tail_are_noted_in_seconds(sources, tmp_path):
    sources.video["short"] = (made_media.encode_video(tmp_path / "s.mkv", "libx264", 25, seconds=1.64), 25)
    made = sources.plain(tmp_path / "a.mp4", "short", "aac")
    snippets, reader = read(made.path)
    assert len(snippets) == 3
    assert reader.info.duration == pytest.approx(1.64, abs=0.02)
    over = [note for note in reader.notes if "of sound after the last picture" in note]
    assert len(over) == 1
    assert float(over[0].split()[0]) == pytest.approx(1.36, abs=0.1)
    assert [note for note in reader.notes if "less than half a snippet" in note] == [
        "the last 0.14 s, less than half a snippet, are left out"
    ]


def test_level_is_what_recorded_reads():
    assert recorded(np.full((2, 2, 3), level(1.5))) == pytest.approx(1.5)


def test_empty_packets_repeat_the_picture_before_and_are_no_damage(sources, tmp_path, monkeypatch):
    made = sources.plain(tmp_path / "a.mkv", "jpeg", None)
    demuxed = snippets.demuxed

    def emptied(*given):  # as Theora's files have them, which no encoder here writes
        for number, packet in enumerate(demuxed(*given)):
            if number % 3 and packet.dts is not None:
                empty = av.Packet(0)
                empty.stream, empty.time_base = packet.stream, packet.time_base
                empty.pts, empty.dts, empty.duration = packet.pts, packet.dts, packet.duration
                packet = empty
            yield packet

    monkeypatch.setattr(snippets, "demuxed", emptied)
    with SnippetReader(made.path, Eye(), Ear(), snippet_seconds=SNIPPET) as reader:
        shown = [recorded(picture) for snippet in reader.snippets() for picture in snippet.frames]
    assert not any("damaged" in note for note in reader.notes)
    assert reader.info.duration == pytest.approx(made.length, abs=0.02)
    assert shown == pytest.approx([time - 0.05 for time in sample_times(6, 4, SNIPPET)], abs=0.11)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_last_picture_that_stands_long_is_watched_to_its_end(tmp_path, ending):
    path = tmp_path / f"slides.{ending}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(1, 15), options={"x264-params": "bframes=0:log-level=0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(4):
            picture = np.full((48, 64, 3), 40 + 50 * n, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    with SnippetReader(path, Eye(), Ear(), snippet_seconds=5.0) as reader:
        shown = [float(snippet.frames.mean()) for snippet in reader.snippets()]
    assert reader.info.duration == pytest.approx(60.0, abs=0.1)
    assert shown == pytest.approx(np.repeat([40, 90, 140, 190], 3), abs=4)
