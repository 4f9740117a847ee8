"""Detections: their list, the timeline, decisions and exports."""

from __future__ import annotations

import csv
import io
import json
import re

import opentimelineio as otio
import pytest

from counterpoint.serve.review import detection, moment

from .conftest import detection as made_detection
from .conftest import served


def test_a_detection_restores_what_its_json_has():
    row = made_detection("a.mp4")
    again = detection(row, "runs/x").as_dict()
    assert {k: again[k] for k in row if k != "speed"} == {k: v for k, v in row.items() if k != "speed"}


def test_detections_are_listed_and_shown(page):
    html = page.get("/detections").text
    assert "0 of 3" in html
    assert "leaving" not in html  # a link that leads out
    assert html.count("/detection/") == 2
    shown = page.get("/detection/0/0/film.json").text
    assert 'src="/video/0/0/film.json"' in shown
    assert shown.count('<tr data-seek="') == 3
    assert "a warning" in shown
    assert "next video" in shown
    other = page.get("/detection/1/0/film.json").text
    assert "<video" not in other
    assert "not in the folders" in other


def test_a_video_is_served_in_ranges(page, project):
    content = (project / "film.webm").read_bytes()
    part = page.get("/video/0/0/film.json", headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, content[100:200])
    assert part.headers["content-type"] == "video/webm"
    assert page.get("/video/0/0/film.json").content == content


def test_decisions_are_kept_beside_the_detection_and_exported(copied):
    page = served(copied)
    send = {"headers": {"x-form-token": page.form}}
    where = "/decide/0/0/film.json"
    assert page.post(where, json={"moment": "0.50-1.50", "decision": "accept"}, **send).json() == {
        "0.50-1.50": "accept"
    }
    page.post(where, json={"moment": "2.50-3.00", "decision": "reject"}, **send)
    page.post(where, json={"moment": "4.50-5.00", "decision": "accept"}, **send)
    page.post(where, json={"moment": "4.50-5.00", "decision": ""}, **send)
    kept = json.loads((copied / "film.review.json").read_text())
    assert kept["videos"]["film.webm"] == {"0.50-1.50": "accept", "2.50-3.00": "reject"}
    for wrong in ({"moment": "0.00-9.00", "decision": "accept"}, {"moment": "0.50-1.50", "decision": "maybe"}, {}):
        assert page.post(where, json=wrong, **send).status_code == 404
    rows = list(csv.DictReader(io.StringIO(page.get("/export/0/film.json").text)))
    assert [row["decision"] for row in rows[:3]] == ["accept", "reject", "undecided"]
    assert [(row["video"], row["start"], row["score"]) for row in rows[:1]] == [("film.webm", "0.5", "0.9")]
    accepted = page.get("/export/0/film.json?form=json&only=accept").json()
    assert [(row["start"], row["end"]) for row in accepted] == [(0.5, 1.5)]
    html = page.get("/detection/0/0/film.json").text
    decided = json.loads(re.search(r"data-decided>(.*?)</script>", html)[1])
    assert decided == {"0.50-1.50": "accept", "2.50-3.00": "reject", "4.50-5.00": ""}
    assert "2 of 3" in page.get("/detections").text
    # A detection that was written again keeps the decisions on its moments.
    text = (copied / "film.json").read_text()
    (copied / "film.json").write_text(text.replace('"speed": 20.0', '"speed": 10.0'))
    assert served(copied).get("/export/0/film.json").text.count("accept") == 1
    # Decisions on moments that are no more, as with another threshold, do not count.
    (copied / "film.json").write_text(text.replace('"start": 2.5,', '"start": 2.4,'))
    assert "1 of 3" in served(copied).get("/detections").text


def test_a_damaged_file_of_decisions_is_named(copied):
    (copied / "film.review.json").write_text("[]")
    answer = served(copied).get("/detection/0/0/film.json")
    assert (answer.status_code, "film.review.json is damaged" in answer.text) == (400, True)


@pytest.mark.parametrize("text", ['{"videos": [], "warnings": null}', '{"videos": ' + "[" * 100_000, '["intervals"]'])
def test_other_files_with_the_words_of_a_detection_do_no_harm(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    (tmp_path / "film.json").write_text(json.dumps(made_detection("film.mp4")))
    answer = served(tmp_path).get("/detections")
    assert (answer.status_code, answer.text.count("/detection/0/0/film.json")) == (200, 1)


def test_moments_are_named_by_their_times():
    row = detection(made_detection("a"), "")
    assert [moment(i) for i in row.intervals] == ["0.50-1.50", "2.50-3.00", "4.50-5.00"]


def test_folders_of_results_are_reviewed_too(copied):
    for name in ("a", "b"):
        folder = copied / "found" / "videos" / f"{name}-1"
        (folder / "peaks").mkdir(parents=True)
        (folder / "peaks" / "0.75.jpg").write_bytes(b"jpeg of " + name.encode())
        pictures = [{"time": 0.75, "file": "peaks/0.75.jpg"}, {"time": 2.75, "file": "../../../../../secret.txt"}]
        made = {"format": 1, **made_detection(f"{name}.mp4"), "run": "runs/m", "pictures": pictures}
        (folder / "detection.json").write_text(json.dumps(made))
    (copied / "found" / "detections.json").write_text(json.dumps({"format": 1, "videos": [{"video": "a.mp4"}]}))
    page = served(copied)
    html = page.get("/detections").text
    assert html.count("<h2>found</h2>") == 1  # both videos in one table
    key = "0/found/videos/b-1/detection.json"
    shown = page.get(f"/detection/0/{key}").text
    assert shown.count("data:image/jpeg;base64,anBlZyBvZiBi") == 1
    send = {"headers": {"x-form-token": page.form}}
    assert page.post(f"/decide/0/{key}", json={"moment": "0.50-1.50", "decision": "accept"}, **send).status_code == 200
    assert (copied / "found/videos/b-1/detection.review.json").is_file()
    rows = page.get("/export/0/found?form=json").json()
    assert sorted({row["video"] for row in rows}) == ["a.mp4", "b.mp4"]
    assert [row["decision"] for row in rows].count("accept") == 1
    assert [row["video"] for row in rows] == ["a.mp4"] * 3 + ["b.mp4"] * 3
    assert page.get("/export/0/fou").status_code == 404
    # From a video to the next one of its folder, in the order of the list.
    first = page.get("/detection/0/0/found/videos/a-1/detection.json").text
    assert f'rel="next" href="/detection/0/{key}"' in first
    assert 'rel="next"' not in page.get(f"/detection/0/{key}").text


def test_accepted_moments_are_cut_lists(copied):
    page = served(copied)
    for times in ("0.50-1.50", "4.50-5.00"):
        page.post(
            "/decide/0/0/film.json", json={"moment": times, "decision": "accept"}, headers={"x-form-token": page.form}
        )
    lists = {form: page.get(f"/cuts/0/0/film.json?form={form}") for form in ("vtt", "edl", "otio")}
    assert "/cuts/0/0/film.json?form=edl" in page.get("/detection/0/0/film.json").text
    assert re.findall(r"(\S+) --> (\S+)", lists["vtt"].text) == [
        ("00:00:00.500", "00:00:01.500"),
        ("00:00:04.500", "00:00:05.000"),
    ]
    assert lists["edl"].text.count("FROM CLIP NAME") == 2
    line = otio.adapters.read_from_string(lists["otio"].text)
    assert [clip.source_range.start_time.to_seconds() for clip in line.tracks[0]] == pytest.approx([0.5, 4.5], abs=0.05)
    assert line.tracks[0][0].media_reference.target_url == (copied / "film.webm").resolve().as_uri()
    assert lists["edl"].headers["content-disposition"] == 'attachment; filename="film-accepted.edl"'
    assert page.get("/cuts/0/0/film.json?form=exe").status_code == 404


def test_a_video_that_no_browser_plays_is_said_to_be_one(copied):
    (copied / "x.avi").write_bytes(b"")
    (copied / "film.json").write_text((copied / "film.json").read_text().replace("/gone/x.avi", "x.avi"))
    assert "Browsers do not play .avi files" in served(copied).get("/detection/1/0/film.json").text
