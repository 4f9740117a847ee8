"""Streams and growing folders: scores, alarms, reconnection, bounded memory, and Ctrl-C."""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import threading

import av
import numpy as np
import pytest
import rtsp_server

from counterpoint import cli
from counterpoint.data.media import opened, write_video
from counterpoint.engine.run import Run
from counterpoint.errors import DataError
from counterpoint.use import live
from counterpoint.use.detect import Detector
from counterpoint.use.detections import Kept

THRESHOLD = 0.4


@pytest.fixture(scope="module")
def detector(run_of_clips):
    return Detector(Run.open(run_of_clips))


@pytest.fixture(scope="module")
def playlist(tmp_path_factory, detector):
    """Write a violent arcade clip as a finished HLS playlist of parts of 2 s; return it and the clip."""
    from counterpoint.data import arcade

    script = next(c for c in (arcade.script("test", i) for i in range(100)) if c.label and c.snippets < 28)
    folder = tmp_path_factory.mktemp("hls")
    clip = folder / "clip.mp4"
    arcade.write_clip(script, clip, size=(96, 54))
    options = {"hls_time": "2", "hls_list_size": "0", "hls_segment_filename": str(folder / "part%03d.ts")}
    with av.open(str(clip)) as read, av.open(str(folder / "list.m3u8"), "w", format="hls", options=options) as made:
        tracks = {s.index: made.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            if packet.dts is not None:
                packet.stream = tracks[packet.stream_index]
                made.mux(packet)
    assert "#EXT-X-ENDLIST" in (folder / "list.m3u8").read_text()
    return folder / "list.m3u8", clip


def alarms(file):
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_a_playlist_is_followed_to_its_end(detector, playlist, monkeypatch):
    path, clip = playlist
    scores = []
    feed = live.Alarms.feed
    monkeypatch.setattr(live.Alarms, "feed", lambda self, n, s: scores.append((n, s)) or feed(self, n, s))
    file = io.StringIO()
    lines = live.Lines(file, detector, THRESHOLD)
    count = live.follow(detector, path, lines, say=lambda _: None)
    offline = detector.detect(clip)
    assert count == len(offline.score)
    assert [n for n, _ in scores] == list(range(count))
    assert np.corrcoef([s for _, s in scores], offline.score)[0, 1] > 0.8
    told = alarms(file)
    assert [t["event"] for t in told] == ["start", "end"] * (len(told) // 2)
    assert told
    above = [n for n, s in scores if s > THRESHOLD]
    assert told[0]["start"] == pytest.approx(above[0] * 2 / 3, abs=1e-3)
    assert told[-1]["end"] == pytest.approx((above[-1] + 1) * 2 / 3, abs=1e-3)
    assert max(t["score"] for t in told) == pytest.approx(max(s for _, s in scores), abs=1e-4)
    assert {t["source"] for t in told} == {str(path)}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that prints nothing."""

    def log_message(self, *_):
        pass


def test_the_command_appends_alarms_to_a_file(run_of_clips, playlist, tmp_path, capsys):
    path, _ = playlist
    words = ["detect", str(path), "--run", str(run_of_clips), "--threshold", str(THRESHOLD)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert cli.main([*words, "--alarms", str(tmp_path / "a.jsonl")]) == 0
    # The same by an address.
    handler = functools.partial(Quiet, directory=str(path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words[1] = f"http://127.0.0.1:{server.server_port}/{path.name}"
        assert cli.main([*words, "--alarms", str(tmp_path / "a.jsonl")]) == 0
        server.shutdown()
    kept = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(kept) == 2 * len(printed)
    assert [t["start"] for t in kept] == [json.loads(line)["start"] for line in printed] * 2
    assert [t["source"] for t in kept] == [str(path)] * len(printed) + [words[1]] * len(printed)


def test_a_live_playlist_that_stops_is_connected_to_again(detector, playlist, tmp_path, monkeypatch):
    """Without its end tag the playlist waits for more; then the answer is late, and Ctrl-C ends the second pause."""
    path, _ = playlist
    shutil.copytree(path.parent, tmp_path / "hls")
    (tmp_path / "hls" / "list.m3u8").write_text(path.read_text().replace("#EXT-X-ENDLIST", ""))
    monkeypatch.setattr(opened, "ANSWER", (5.0, 0.5))
    pauses, said = [], []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    lines = live.Lines(io.StringIO(), detector, 1e-6)
    count = live.follow(detector, tmp_path / "hls" / "list.m3u8", lines, say=said.append, sleep=sleep)
    assert count > 10
    assert pauses == [1.0, 1.0]  # the second connection gave snippets, so its pause is the first again
    assert "connection lost" in said[0]
    assert said[-1].endswith("stopped")
    told = alarms(lines.file)
    assert [t["event"] for t in told].count("start") == [t["event"] for t in told].count("end")


def test_a_camera_is_followed_over_rtsp_and_connected_to_again(detector, playlist):
    """The server sends the clip in MPEG-TS and ends the connection; the second connection begins anew."""
    path, clip = playlist
    parts = sorted(path.parent.glob("part*.ts"))
    whole = path.parent / "whole.ts"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    now, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        now[0] = 100.0

    lines = live.Lines(io.StringIO(), detector, THRESHOLD)
    with rtsp_server.serving(whole) as address:
        count = live.follow(detector, address, lines, say=lambda _: None, sleep=sleep, clock=lambda: now[0])
    assert pauses == [1.0, 1.0]
    offline = len(detector.detect(clip).score)
    assert count == pytest.approx(2 * offline, abs=2)
    told = alarms(lines.file)
    first = [t for t in told if t["start"] < 100]
    again = [t for t in told if t["start"] >= 99]
    assert len(first) == len(again) > 0
    assert again[0]["start"] - first[0]["start"] == pytest.approx(100, abs=1)


class Reader:
    """A stream of rows in place of a connection: each of `PLAN` gives that many snippets, or fails to open."""

    PLAN: tuple = ()
    opened = 0

    def __init__(self, source, visual, audio, **options):
        plan = Reader.PLAN[Reader.opened]
        Reader.opened += 1
        if isinstance(plan, BaseException):
            raise plan
        self.plan, self.notes = plan, ["gone"]
        self.info = type("Info", (), {"duration": 0.0})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def features(self, batch):
        for _ in range(self.plan // batch):
            yield np.zeros((batch, 208), np.float32), np.zeros((batch, 128), np.float32)


@pytest.fixture
def plan(monkeypatch, detector):
    import counterpoint.data.media as media

    monkeypatch.setattr(media, "SnippetReader", Reader)
    monkeypatch.setattr(Reader, "opened", 0)
    monkeypatch.setattr(detector, "score_rows", lambda v, a: {"score": np.full(len(v), 0.2, np.float32)})
    return lambda *plans: monkeypatch.setattr(Reader, "PLAN", plans)


def test_pauses_grow_and_times_go_on(detector, plan):
    down = DataError("rtsp://camera/1: refused")
    plan(6, down, down, down, *[down] * 4, 3, KeyboardInterrupt())
    now, pauses, said = [100.0], [], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    lines = live.Lines(io.StringIO(), detector, 0.1)
    count = live.follow(detector, "rtsp://camera/1", lines, say=said.append, sleep=sleep, clock=lambda: now[0])
    assert count == 9
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 1]
    assert said[1] == "rtsp://camera/1: connection lost (refused); again in 2 s"
    first, end, again, last = alarms(lines.file)
    assert (first["event"], first["start"], first["end"]) == ("start", 0.0, None)
    assert (end["event"], end["end"]) == ("end", 4.0)
    assert again["start"] == pytest.approx(183, abs=0.5)  # the sum of the pauses
    assert last["end"] == pytest.approx(again["start"] + 2, abs=1e-3)


def test_the_first_connection_must_succeed(detector, plan):
    plan(DataError("rtsp://camera/1: refused"))
    with pytest.raises(DataError, match="refused"):
        live.follow(detector, "rtsp://camera/1", live.Lines(io.StringIO(), detector), say=lambda _: None)


def test_an_address_that_does_not_answer_is_an_error(run_of_clips, capsys):
    assert cli.main(["detect", "http://127.0.0.1:9/live.m3u8", "--run", str(run_of_clips)]) == 2
    assert "http://127.0.0.1:9/live.m3u8: not a stream that can be read" in capsys.readouterr().err


def test_memory_is_bounded_over_a_long_stream(detector, plan, monkeypatch):
    """Half a day of snippets: neither rows nor alarms accumulate."""
    most = [0]
    feed = live.Rolling.feed

    def fed(self, visual, audio):
        found = feed(self, visual, audio)
        most[0] = max(most[0], self.held, len(self.visual.base) if self.visual.base is not None else 0)
        return found

    monkeypatch.setattr(live.Rolling, "feed", fed)
    plan(64_800, KeyboardInterrupt())
    lines = live.Lines(io.StringIO(), detector, 0.1)
    assert live.follow(detector, "rtsp://camera/1", lines, say=lambda _: None, sleep=lambda _: None) == 64_800
    assert most[0] <= detector.window + live.STEP
    start, end = alarms(lines.file)
    assert (start["start"], end["end"]) == (0.0, 43_200.0)


def test_a_live_reader_gives_up_sound_without_pictures(tmp_path, detector, monkeypatch):
    from counterpoint.data.media import SnippetReader, snippets

    monkeypatch.setattr(snippets, "LIVE_STALL", 1.0)
    grey = [np.full((64, 96, 3), 99, np.uint8)] * 12
    write_video(tmp_path / "a.mkv", grey, np.zeros(16000 * 4, np.float32), fps=24)
    options = {"snippet_seconds": 2 / 3}
    with (
        SnippetReader(tmp_path / "a.mkv", detector.visual, detector.audio, **options, live=True) as reader,
        pytest.raises(DataError, match="but no picture"),
    ):
        list(reader.snippets())
    with SnippetReader(tmp_path / "a.mkv", detector.visual, detector.audio, **options) as reader:
        assert len(list(reader.snippets())) == 1


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_once_it_is_complete(detector, tmp_path):
    film = tmp_path / "film.mp4"
    write_video(film, [np.full((64, 96, 3), 3 * n, np.uint8) for n in range(64)], None)
    contents = film.read_bytes()
    box = tmp_path / "box"
    (box / "sub").mkdir(parents=True)
    target = box / "sub" / "copied.mp4"
    (box / "notes.txt").write_text("no video")
    (box / "broken.mp4").write_text("no video either")
    now, said = [0.0], []

    def sleep(seconds):
        now[0] += seconds
        if now[0] in (2, 4, 6):  # it is copied in pieces
            with target.open("ab") as file:
                size = len(contents) // 3 + 1
                file.write(contents[(int(now[0]) // 2 - 1) * size :][:size])
        if now[0] == 16:  # a finished file is not read again; a changed one is
            target.touch()
        if now[0] > 24:
            raise KeyboardInterrupt

    lines = live.Lines(io.StringIO(), detector, 1e-6)
    kept = Kept(tmp_path / "out", detector, 1e-6)
    count = live.watch(detector, box, lines, say=said.append, kept=kept, sleep=sleep, clock=lambda: now[0])
    assert count == 2
    told = alarms(lines.file)
    assert [(t["event"], t["source"]) for t in told] == [("moment", str(target))] * 2
    assert sum("broken.mp4: not a media file" in line for line in said) == 1
    assert said[-1] == "stopped after 2 files"
    index = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [row["video"] for row in index["videos"]] == [str(target)]
    assert index["failed"][0][0] == str(box / "broken.mp4")
    # Started again, it knows the result and raises no second alarm.
    now[0], again = 18.0, live.Lines(io.StringIO(), detector, 1e-6)
    live.watch(detector, box, again, say=said.append, kept=kept, sleep=sleep, clock=lambda: now[0])
    assert alarms(again.file) == []


def test_a_folder_that_is_away_is_looked_for_again(detector, tmp_path):
    box, said, looks = tmp_path / "box", [], []
    box.mkdir()

    def sleep(_):
        looks.append(box.exists())
        if len(looks) == 1:
            box.rmdir()
        if len(looks) == 3:
            box.mkdir()
        if len(looks) == 5:
            raise KeyboardInterrupt

    live.watch(detector, box, live.Lines(io.StringIO(), detector), say=said.append, sleep=sleep)
    assert [line for line in said if "looking again" in line] == [
        f"{box} cannot be read (No such file or directory); looking again"
    ]
    assert said[-1] == "stopped after 0 files"


def test_a_folder_forgets_files_that_are_gone(tmp_path):
    now = [0.0]
    growing = live.Growing(tmp_path, lambda: now[0])
    for n in range(30):
        (tmp_path / f"{n}.mp4").write_text("x")
        growing.look()
        now[0] += live.SETTLED
        assert growing.look() == [tmp_path / f"{n}.mp4"]
        (tmp_path / f"{n}.mp4").unlink()
    assert len(growing.done) <= 1
    assert len(growing.seen) <= 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--watch", "gone"], "gone: --watch takes a folder"),
        (["--watch", ".", "a.mp4"], "--watch . reads one folder until Ctrl-C; leave out a.mp4"),
        (["rtsp://a/b", "c.mp4"], "name one stream alone"),
        (["rtsp://a/b", "--html", "a.html"], "leave out --html, --clips and --json"),
        (["rtsp://a/b", "--out", "found"], "--out is for files"),
        (["a.mp4", "--alarms", "a.jsonl"], "--alarms is for streams and --watch"),
    ],
)
def test_arguments_that_do_not_fit(run_of_clips, words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["detect", *words, "--run", str(run_of_clips)]) == 2
    assert expected in capsys.readouterr().err
