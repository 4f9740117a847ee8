"""Trainings that the page starts: the form, the process, its log, its end."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import pytest

from counterpoint.errors import CounterpointError
from counterpoint.serve import jobs as room
from counterpoint.serve.job_pages import command, settings

from .conftest import served


def wait(until, seconds=60.0):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_a_form_becomes_a_list_of_arguments(page):
    form = {
        "system": "simclr",
        "data": "digits",
        "name": "mine",
        "epochs": "3",
        "seed": "4",
        "settings": "temperature=0.1\n\nencoder = conv-s",
    }
    name, words = command(page.site, form)
    out = str(page.site.jobs.out)
    start = ["train", "simclr", "--data", "digits", "--seed", "4", "--out", out, "--name", "mine"]
    assert (name, words[: len(start)]) == ("mine", start)
    assert sorted(zip(words[len(start) :: 2], words[len(start) + 1 :: 2], strict=True)) == [
        ("--encoder", "conv-s"),
        ("--epochs", "3"),
        ("--temperature", "0.1"),
    ]
    # Without a name: the system's with a number that is free.
    assert command(page.site, {"system": "simclr", "data": "digits"})[0] == "simclr-1"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"system": "simcr"}, "did you mean"),
        ({"system": ""}, "unknown system"),
        ({"data": "digit"}, "unknown data source"),
        ({"data": "digits?train=\0"}, "a zero byte"),
        ({"epochs": "many"}, "epochs is a whole number"),
        ({"epochs": "2.5"}, "epochs is a whole number"),
        ({"epochs": "[1"}, "cannot be read"),
        ({"settings": "temperature=hot"}, "temperature is a number"),
        ({"settings": "ring=3"}, "ring is true or false"),
        ({"settings": "temperature=-1"}, "temperature must be"),
        ({"seed": "-1"}, "the seed is a whole number"),
        ({"seed": "1; rm -rf x"}, "the seed is a whole number"),
        ({"settings": "temperatur=1"}, "temperature"),
        ({"settings": "--out=/tmp"}, "NAME=VALUE"),
        ({"settings": "out=/tmp"}, "no such file|outside|unknown|did you mean"),
        ({"settings": "temperature: 1"}, "NAME=VALUE"),
        ({"name": "../up"}, "a name has letters"),
        ({"name": "-x"}, "a name has letters"),
        ({"name": ".serve"}, "a name has letters"),
        ({"name": "first"}, "exists already"),
    ],
)
def test_wrong_forms_come_back_with_the_reason(page, change, expected):
    form = {"form_token": page.form, "system": "simclr", "data": "digits", "name": "new", **change}
    answer = page.post("/train", data=form)
    assert answer.status_code == 400
    reason = re.search(r'role="alert">(.*?)</p>', answer.text, re.DOTALL)
    assert reason is not None
    assert re.search(expected, reason[1])
    assert f'value="{form["name"]}"' in answer.text  # what was typed is still there
    assert page.site.jobs.all() == []


@pytest.mark.parametrize("path", ["/train", "/resume", "/search"])
def test_json_that_is_no_object_is_refused(page, path):
    answer = page.post(path, json=[1], headers={"x-form-token": page.form})
    assert (answer.status_code, answer.text) == (400, "Send a JSON object.")


def test_settings_are_read_as_yaml_reads_them():
    assert settings("a=1\nb-c = [1, 2]\n d=x y\n") == {"a": 1, "b_c": [1, 2], "d": "x y"}
    with pytest.raises(CounterpointError, match="cannot be read"):
        settings("a=[")
    for text in ("[&a [1, 2], *a]", "*a", "2026-13-01", "1" * 5000, "[" * 5000):
        with pytest.raises(CounterpointError, match=r"a: the value .* cannot be read"):
            settings(f"a={text}")


@pytest.mark.slow
def test_a_job_runs_is_found_by_a_new_server_and_ends(copied):
    page = served(copied)
    job = page.site.jobs.start("list", ["systems"], copied / "runs" / "list")
    assert job.command[0] == sys.executable
    wait(lambda: not page.site.jobs.running(page.site.jobs.get("list")))
    again = served(copied)
    found = again.site.jobs.get("list")
    assert (found.code, again.site.jobs.running(found)) == (0, False)
    assert "systems. More about one" in again.site.jobs.tail(found)
    html = again.get("/job/list").text
    assert "finished" in html
    assert "counterpoint systems" in html
    assert again.get("/job/list/log").headers["x-done"] == "1"
    answer = again.post("/stop", data={"form_token": again.form, "name": "list"})
    assert (answer.status_code, "is not running" in answer.text) == (400, True)
    assert again.get("/job/none").status_code == 404


def test_a_training_does_not_know_the_server_s_token(monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_TOKEN", "t" * 20)
    assert "t" * 20 not in room.environment().values()


def test_a_process_that_took_the_number_of_an_ended_one_is_not_stopped(copied, monkeypatch):
    page = served(copied)
    ended = room.Job("old", str(copied / "runs/old"), ("python", "-m", "counterpoint"), os.getpid(), "1", 0.0)
    (copied / "runs/.serve").mkdir()
    page.site.jobs._write(ended)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it would stop a process of another program"))
    assert not page.site.jobs.running(page.site.jobs.get("old"))
    with pytest.raises(CounterpointError, match="is not running"):
        page.site.jobs.stop("old")
    # A record that was changed to lie elsewhere is not read.
    (copied / "runs/.serve/old.json").write_text(
        (copied / "runs/.serve/old.json").read_text().replace("runs/old", "x/old")
    )
    assert page.site.jobs.all() == []


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's /proc")
@pytest.mark.slow
def test_a_training_starts_and_stops_and_can_be_resumed(copied, monkeypatch):
    page = served(copied)
    form = {"form_token": page.form, "system": "simclr", "data": "digits", "name": "live", "epochs": "400"}
    form["settings"] = "encoder=conv-s\nbatch_size=256"
    answer = page.post("/train", data=form)
    assert (answer.status_code, answer.headers.get("location")) == (303, "/job/live")
    job = page.site.jobs.get("live")
    run = copied / "runs" / "live"
    try:
        assert page.post("/train", data=form).status_code == 400  # the name is taken
        wait((run / "metrics.csv").is_file)
        assert ">training<" in page.get("/runs?q=live").text
        assert "this server started it" in page.get("/run/0/runs/live").text.lower()
        # Another server of the folder knows the process by its number and its start.
        other = served(copied)
        assert other.site.jobs.running(other.site.jobs.get("live"))
        assert other.post("/stop", data={"form_token": other.form, "name": "live"}).status_code == 303
        wait(lambda: not page.site.jobs.running(page.site.jobs.get("live")))
        html = page.get("/job/live").text
        assert "it can be resumed" in html
        assert ">interrupted<" in page.get("/runs?q=live").text  # at once, although it wrote a moment ago
        assert page.post("/resume", data={"form_token": page.form, "run": "0/runs/first"}).status_code == 400
        assert (run / "last.ckpt").is_file()
        assert 'action="/resume"' in page.get("/run/0/runs/live").text
        assert 'action="/resume"' not in page.get("/run/0/runs/second").text  # it has no checkpoint
        words = []
        monkeypatch.setattr(page.site.jobs, "start", lambda *given: words.append(given) or job)
        assert page.post("/resume", data={"form_token": page.form, "run": "0/runs/live"}).status_code == 303
        assert words == [("live", ["train", "--resume", str(run)], run)]
    finally:
        if page.site.jobs.running(job):
            os.kill(job.pid, signal.SIGKILL)


def test_the_list_of_trainings_tells_how_each_ended(copied):
    page = served(copied)
    (copied / "runs" / ".serve").mkdir(parents=True, exist_ok=True)
    for name, code in {"good": 0, "halted": 130, "bad": 2, "unknown": None}.items():
        page.site.jobs._write(
            room.Job(name, str(page.site.jobs.out / name), ("counterpoint",), 2**30, "", 1.0, code=code)
        )
    html = page.get("/train").text
    found = dict(re.findall(r'href="/job/(\w+)".*?<span class="state \w+">(\w+)</span>', html))
    assert found == {"good": "finished", "halted": "interrupted", "bad": "failed", "unknown": "ended"}
