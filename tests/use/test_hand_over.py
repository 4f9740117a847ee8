"""Folders of detections: resuming, the files beside each result, and clips, all read back."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import opentimelineio as otio
import pytest
from PIL import Image

from counterpoint import cli
from counterpoint.data.media import cut, probe, write_video
from counterpoint.data.media.clock import FrameTimes
from counterpoint.engine.run import Run
from counterpoint.errors import DataError
from counterpoint.report.detection import distinct_names, timeline
from counterpoint.tasks.moments import Detection, Interval, Thumbnail
from counterpoint.use import cut_lists
from counterpoint.use.contact_sheets import write_contact_sheet
from counterpoint.use.detect import Detector
from counterpoint.use.detections import Kept, detect_files
from counterpoint.use.hand_over import write_clips

LENGTH, FPS = 6.0, 24


def pictures(seconds=LENGTH, fps=FPS):
    """Make pictures whose brightness tells the time: 40 a second."""
    for n in range(round(seconds * fps)):
        yield np.full((48, 64, 3), min(255, round(40 * n / fps)), np.uint8)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "the film.mp4"
    tone = 0.3 * np.sin(np.arange(round(LENGTH * 16000)) / 5).astype(np.float32)
    write_video(path, pictures(), tone, fps=FPS)
    return path


def detection(video, moments, **changes):
    score = np.linspace(0, 1, round(LENGTH / 0.5), dtype=np.float32)
    fields = {"duration": LENGTH, "snippet_seconds": 0.5, "score": score, "audio": score, "visual": score}
    fields |= {"threshold": 0.5, "thumbnails": [], "truth": None, "has_audio": True, "width": 64, "height": 48}
    fields |= {"notes": [], "speed": 9.0, "run": "runs/x", "fps": FPS, "intervals": moments}
    return Detection(video=video, **fields | changes)


MOMENTS = [Interval(1.0, 2.5, 1.25, 0.91), Interval(4.0, LENGTH, 5.0, 0.8)]


# --- cut lists --------------------------------------------------------------------------------------------------------


def test_a_time_line_is_read_back_by_its_library(film, tmp_path):
    file = cut_lists.write_otio(detection(film, MOMENTS), tmp_path / "a.otio")
    line = otio.adapters.read_from_file(str(file))
    video, audio = line.tracks
    assert (video.kind, audio.kind) == ("Video", "Audio")
    assert [c.source_range.start_time.to_seconds() for c in video] == [1.0, 4.0]
    assert [c.source_range.duration.to_seconds() for c in video] == [1.5, 2.0]
    assert video[0].media_reference.target_url == film.as_uri()
    assert video[0].markers[0].marked_range.start_time.to_seconds() == 1.25
    assert video[1].metadata["counterpoint"]["score"] == 0.8
    assert line.duration().to_seconds() == 3.5


def test_an_edit_decision_list_is_read_back(film, tmp_path):
    file, note = cut_lists.write_edl(detection(film, MOMENTS), tmp_path / "a.edl")
    assert note is None
    assert "00:00:04:00 00:00:06:00 00:00:01:12 00:00:03:12" in file.read_text()
    (track,) = otio.adapters.read_from_file(str(file), rate=FPS).tracks
    assert [c.source_range.start_time.to_seconds() for c in track] == [1.0, 4.0]
    assert all(c.name == film.name for c in track)


def test_an_edit_decision_list_holds_999_events(film, tmp_path):
    many = [Interval(n / 300, (n + 0.5) / 300, n / 300, 0.5 + n / 9999) for n in range(1001)]
    file, note = cut_lists.write_edl(detection(film, many), tmp_path / "many.edl")
    assert note == "many.edl holds the 999 highest of 1001 moments: the form has no more"
    assert "\n999  " in file.read_text()
    assert "\n1000 " not in file.read_text()


def test_lists_without_a_moment_are_files_too(film, tmp_path):
    file, _ = cut_lists.write_edl(detection(film, []), tmp_path / "a.edl")
    assert file.read_text().startswith("TITLE: Moments of the film.mp4\n")
    assert [list(t) for t in otio.adapters.read_from_file(str(file), rate=FPS).tracks] in ([], [[]])
    line = otio.adapters.read_from_file(str(cut_lists.write_otio(detection(film, []), tmp_path / "a.otio")))
    assert [list(track) for track in line.tracks] == [[], []]
    assert cut_lists.write_vtt(detection(film, []), tmp_path / "a.vtt").read_text().startswith("WEBVTT\n")


def test_cues_and_tables(film, tmp_path):
    text = cut_lists.write_vtt(
        detection(film, [Interval(3599.9996, 3601.25, 3600.5, 0.7)]), tmp_path / "a.vtt"
    ).read_text()
    assert text.startswith("WEBVTT\n\nNOTE found by runs/x\n\n1\n01:00:00.000 --> 01:00:01.250\nviolence 0.70")
    low = detection(Path("low,est.mp4"), [], score=np.full(4, 0.1, np.float32))
    videos, moments = cut_lists.write_tables([low, detection(film, MOMENTS)], tmp_path)
    rows = list(csv.DictReader(videos.open()))
    assert [(r["rank"], r["video"], r["moments"]) for r in rows] == [("1", str(film), "2"), ("2", "low,est.mp4", "0")]
    assert [r["end"] for r in csv.DictReader(moments.open())] == ["2.500", "6.000"]


def test_a_contact_sheet_shows_the_moments_in_order(film, tmp_path):
    sheet = Image.open(write_contact_sheet(detection(film, MOMENTS), tmp_path / "s.png")).convert("L")
    assert sheet.width == 6 * 246 + 6
    shown = [sheet.getpixel((6 + 246 * n + 120, y)) for y in (130, 130 + 206) for n in range(6)]
    assert shown == sorted(shown)
    assert shown[0] == pytest.approx(40 * 1.125, abs=8)
    assert write_contact_sheet(detection(film, []), tmp_path / "none.png") is None


# --- clips ------------------------------------------------------------------------------------------------------------


def brightness(path, at):
    with av.open(str(path)) as file:
        frames = [(f.time, f.to_ndarray(format="gray").mean()) for f in file.decode(video=0)]
    first = frames[0][0]
    return min(frames, key=lambda f: abs(f[0] - first - at))[1]


def test_a_clip_is_copied_where_a_key_picture_is_near(film, tmp_path):
    clip, how = cut(film, 0.5, 2.5, tmp_path / "clips" / "one", comment="found by runs/x")
    assert how == "copied, begins 0.5 s early at a key picture"
    assert clip.name == "one.mp4"
    found = probe(clip)
    assert found.duration == pytest.approx(2.5, abs=0.15)
    assert (found.has_audio, found.video_codec) == (True, "h264")
    assert brightness(clip, 2.0) == pytest.approx(80, abs=6)
    assert [p.name for p in clip.parent.iterdir()] == ["one.mp4"]
    with av.open(str(clip)) as file:
        assert file.metadata["comment"] == "found by runs/x"


def test_a_clip_is_encoded_again_where_it_cannot_be_copied(film, tmp_path):
    """The only key picture is at the beginning."""
    clip, how = cut(film, 3.0, 4.5, tmp_path / "two", comment="found by runs/x")
    assert how == "encoded again"
    found = probe(clip)
    assert found.duration == pytest.approx(1.5, abs=0.1)
    assert (found.has_audio, found.width, found.height) == (True, 64, 48)
    assert brightness(clip, 0.0) == pytest.approx(120, abs=6)
    assert brightness(clip, 1.4) == pytest.approx(176, abs=6)
    with av.open(str(clip)) as file:
        assert file.metadata["comment"] == "found by runs/x"


def test_a_clip_is_encoded_from_the_key_picture_before_it(tmp_path, monkeypatch):
    """Reading from the beginning of a long recording for each clip would take hours. Both ways make the same clip."""
    tone = 0.2 * np.sin(np.arange(12 * 16000) ** 1.5 / 4000).astype(np.float32)  # its pitch tells the time
    for name in ("a.mp4", "a.mkv"):
        write_video(
            tmp_path / name, (np.full((48, 64, 3), 20 * n // FPS, np.uint8) for n in range(12 * FPS)), tone, fps=FPS
        )
        with av.open(str(tmp_path / name)) as source, av.open(str(tmp_path / f"keys-{name}"), "w") as file:
            stream = file.add_stream("libx264", rate=FPS, options={"bf": "2", "sc_threshold": "0"})
            stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = 64, 48, "yuv420p", 5 * FPS
            sound = file.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux():
                if packet.stream.type == "audio" and packet.dts is not None:
                    packet.stream = sound
                    file.mux(packet)
                elif packet.stream.type == "video":
                    for frame in packet.decode():
                        frame.pict_type = 0
                        file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    looks = 0

    def counted(self, frame):
        nonlocal looks
        looks += 1
        return timed(self, frame)

    timed = FrameTimes.time
    monkeypatch.setattr(FrameTimes, "time", counted)
    for name in ("a.mp4", "a.mkv"):
        film, looks = tmp_path / f"keys-{name}", 0
        clip, how = cut(film, 8.0, 9.5, tmp_path / f"clip-{name}")
        assert (how, looks <= 5 * FPS) == ("encoded again", True), looks
        monkeypatch.setattr(sys.modules["counterpoint.data.media.cut"], "_key_before", lambda *args: None)
        whole, _ = cut(film, 8.0, 9.5, tmp_path / f"whole-{name}")
        monkeypatch.undo()
        monkeypatch.setattr(FrameTimes, "time", counted)
        shown, heard = [], []
        for file in (clip, whole):
            with av.open(str(file)) as made:
                shown.append([(f.time, f.to_ndarray(format="gray").mean()) for f in made.decode(video=0)])
            with av.open(str(file)) as made:
                heard.append(np.concatenate([f.to_ndarray()[0] for f in made.decode(audio=0)]))
        assert len(shown[0]) == len(shown[1]) == 36
        np.testing.assert_allclose(shown[0], shown[1], atol=1)
        assert shown[0][0][1] == pytest.approx(160, abs=4)
        assert len(heard[0]) == len(heard[1])
        assert np.corrcoef(*heard)[0, 1] > 0.99


def test_a_copied_clip_begins_with_the_key_picture_of_a_matroska_file(tmp_path):
    """After a seek in Matroska, the first pictures have no decoding time where some are stored out of order."""
    with av.open(str(tmp_path / "b.mkv"), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"bf": "2", "b-adapt": "0", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = 64, 48, "yuv420p", 24
        for picture in pictures():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    clip, how = cut(tmp_path / "b.mkv", 3.5, 5.0, tmp_path / "clip")
    assert how == "copied, begins 0.5 s early at a key picture"
    with av.open(str(clip)) as file:
        frames = [(f.time, f.to_ndarray(format="gray").mean()) for f in file.decode(video=0)]
    assert len(frames) == pytest.approx(48, abs=3)
    assert frames[0] == pytest.approx((0.0, 120), abs=6)
    assert np.diff([time for time, _ in frames[:-1]]).max() < 0.06


def test_codecs_that_mp4_does_not_take_are_copied_into_matroska(tmp_path):
    write_video(tmp_path / "a.webm", pictures(2), None, fps=FPS)
    with av.open(str(tmp_path / "old.avi"), "w") as file:
        stream = file.add_stream("mjpeg", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for picture in pictures(2):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    clip, how = cut(tmp_path / "old.avi", 0.5, 1.5, tmp_path / "three", steady=True)
    assert (clip.suffix, how) == (".mkv", "copied")
    assert probe(clip).duration == pytest.approx(1.0, abs=0.1)
    with pytest.raises(DataError, match=r"gone\.mp4: no such file"):
        cut(tmp_path / "gone.mp4", 0, 1, tmp_path / "four")


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(run_of_clips):
    return Detector(Run.open(run_of_clips))


@pytest.fixture
def folder(film, tmp_path):
    """Make a folder of two videos, one of them through a link, and one broken file."""
    (tmp_path / "in").mkdir()
    shutil.copy(film, tmp_path / "in" / "a.mp4")
    os.utime(tmp_path / "in" / "a.mp4", (1e9, 1e9))
    (tmp_path / "in" / "linked").symlink_to(film.parent)
    (tmp_path / "in" / "broken.mp4").write_text("no video")
    return tmp_path / "in"


def test_a_finished_file_is_not_read_again(detector, folder, tmp_path, monkeypatch):
    videos = [folder / "a.mp4", folder / "linked" / "the film.mp4"]
    watched = []
    real = detector.detect
    monkeypatch.setattr(detector, "detect", lambda path, **o: watched.append(path) or real(path, **o))
    out = tmp_path / "out"
    first, _ = detect_files(detector, videos[:1], threshold=1e-5, kept=Kept(out, detector, 1e-5))
    both, _ = detect_files(detector, videos, threshold=1e-5, kept=Kept(out, detector, 1e-5))
    assert watched == videos
    np.testing.assert_allclose(both[0].score, first[0].score, atol=1e-6)
    assert both[0].intervals
    assert [t.jpeg for t in both[0].thumbnails] == [t.jpeg for t in first[0].thumbnails]
    # Another threshold needs no second reading; a changed file, other weights and a damaged result do.
    (again, _), _ = detect_files(detector, videos, threshold=0.999, kept=Kept(out, detector, 0.999))
    assert (again.threshold, again.intervals, len(watched)) == (0.999, [], 2)
    os.utime(videos[0], (2e9, 2e9))
    detect_files(detector, videos, threshold=0.999, kept=Kept(out, detector, 0.999))
    assert watched[2:] == videos[:1]
    result = Kept(out, detector).folder(videos[1]) / "detection.json"
    result.write_text(result.read_text()[:-20])
    detect_files(detector, videos, threshold=0.999, kept=Kept(out, detector, 0.999))
    assert watched[3:] == videos[1:]
    monkeypatch.setattr(detector, "weights", "others")
    detect_files(detector, videos, threshold=0.999, kept=Kept(out, detector, 0.999))
    assert watched[4:] == videos


def test_a_file_that_grows_while_it_is_read_is_read_again(detector, folder, tmp_path, monkeypatch):
    real, watched = detector.detect, []

    def growing(path, **options):
        watched.append(path)
        found = real(path, **options)
        if len(watched) == 1:
            with path.open("ab") as file:
                file.write(b"more")
        return found

    monkeypatch.setattr(detector, "detect", growing)
    for _ in range(3):
        detect_files(detector, [folder / "a.mp4"], kept=Kept(tmp_path / "out", detector))
    assert len(watched) == 2


def test_the_command_writes_a_folder(run_of_clips, folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["detect", str(folder), "--run", str(run_of_clips), "--threshold", "0.0001", "--out", str(out)]
    assert cli.main([*words, "--clips", str(tmp_path / "clips")]) == 2  # one file is broken
    said = capsys.readouterr()
    assert "broken.mp4: not a media file" in said.err
    assert "encoded again" in said.out or "copied" in said.out
    assert f"Results: {out}" in said.out
    index = json.loads((out / "detections.json").read_text())
    assert [row["rank"] for row in index["videos"]] == [1, 2]
    assert index["videos"][0]["highest"] >= index["videos"][1]["highest"]
    assert index["failed"][0][0].endswith("broken.mp4")
    for row in index["videos"]:
        place = out / row["folder"]
        result = json.loads((place / "detection.json").read_text())
        assert result["files"] == ["moments.vtt", "moments.edl", "moments.otio", "contact-sheet.png"]
        assert all((place / name).stat().st_size for name in result["files"])
        assert len(result["score"]) == 9
        for picture in result["pictures"]:
            Image.open(place / picture["file"]).verify()
    page = (out / "detection.html").read_text()
    assert "moments.edl" in page
    assert not list(tmp_path.rglob(".*"))  # nothing half-written is left
    clips = sorted((tmp_path / "clips").iterdir())
    assert len(clips) == sum(row["moments"] for row in index["videos"])
    before = [p.stat().st_mtime_ns for p in clips]
    assert cli.main([*words, "--clips", str(tmp_path / "clips")]) == 2
    assert [p.stat().st_mtime_ns for p in clips] == before


def test_clips_follow_the_moments_and_the_video(film, tmp_path):
    """A moment that begins alike but ends later has a clip of its own; so has a video that was replaced."""
    video, key = Path(shutil.copy(film, tmp_path / "a.mp4")), Kept.name
    out = tmp_path / "clips"
    made, said = write_clips([detection(video, [Interval(0.5, 1.5, 1.0, 0.9)])], out, key)
    first = made[video][0]
    assert [first.name] == [f"{key(video)}-00000.50-00001.50s.mp4"]
    made, said = write_clips([detection(video, [Interval(0.5, 2.5, 1.0, 0.9)])], out, key)
    assert probe(made[video][0]).duration == pytest.approx(2.5, abs=0.15)
    assert said[-1] == (
        f"{out}: 1 older clip belongs to no moment of this result, such as {first.name}; remove what you do not need"
    )
    os.utime(made[video][0], ns=(0, 0))
    first.unlink()
    made, said = write_clips([detection(video, [Interval(0.5, 2.5, 1.0, 0.9)])], out, key)
    assert len(said) == 1
    assert made[video][0].stat().st_mtime_ns > 0


def test_a_result_that_is_read_back_has_its_poster_and_the_scores_of_its_pictures(tmp_path):
    """Times are rounded when they are written."""
    moment = Interval(20 / 3, 22 / 3, 7.0 - 1 / 3, 0.91)
    found = detection(tmp_path / "a.mp4", [moment], duration=9.0)
    found.thumbnails = [Thumbnail(moment.peak, b"picture")]
    shown = {"source": "a.mp4", "embedded": False, "link": None, "remark": ""}
    again = Detection.of_dict(json.loads(json.dumps(found.as_dict())), found.thumbnails)
    for result in (found, again):
        html = timeline(result, shown)
        assert "0:06.7 · 0.91" in html
        assert "poster=" in html


def test_videos_of_one_name_are_told_apart():
    paths = [Path("in/north/a/1.mp4"), Path("in/south/a/1.mp4"), Path("in/2.mp4"), Path("in/south/b/1.mp4")]
    assert distinct_names(paths) == ["north/a/1.mp4", "south/a/1.mp4", "2.mp4", "b/1.mp4"]
    assert distinct_names([Path("/1.mp4"), Path("/1.mp4")]) == ["/1.mp4", "/1.mp4"]
    assert distinct_names([]) == []


def test_ctrl_c_names_the_way_to_continue(run_of_clips, folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Detector, "detect", interrupt)
    words = ["detect", str(folder), "--run", str(run_of_clips), "--html", str(tmp_path / "a.html")]
    assert cli.main(words) == 130
    assert "stopped; with --out DIR, finished files are kept" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 130
    assert "type the same command again to continue" in capsys.readouterr().err
