"""The list of runs, a run, runs side by side, claims: what the pages show."""

from __future__ import annotations

import json
import os
import re
import shutil
import time

import pytest
import yaml

from counterpoint.engine import state as states
from counterpoint.serve import runs as room
from counterpoint.serve.places import OutsideError, Places
from counterpoint.serve.runs import Index, last_values, matching, sorted_by
from counterpoint.serve.walking import Walk

from .conftest import served


def names(html: str) -> list[str]:
    return re.findall(r'<a href="/run/0/runs/([^"]+)">', html)


def test_the_list_shows_sorts_and_filters_runs(page):
    html = page.get("/runs").text
    assert set(names(html)) == {"first", "second", "third"}
    assert names(html)[-1] == "second"  # the oldest change comes last
    assert "they lead out of these folders: 2 links" in html
    assert html.count(">finished<") == 2
    assert html.count(">stopped<") == 1
    assert names(page.get("/runs?sort=name&down=0").text) == ["first", "second", "third"]
    assert names(page.get("/runs?sort=name&down=1").text) == ["third", "second", "first"]
    assert names(page.get("/runs?q=CLIP+stopped").text) == ["second"]
    assert names(page.get("/runs?q=lr:+0.2").text) == ["second"]
    assert "No run has all these words" in page.get("/runs?q=nothing-like-it").text
    metric = re.search(r"<option selected>(test/[^<]+)</option>", html)
    assert metric is not None
    by_metric = names(page.get("/runs", params={"sort": metric[1], "down": "1"}).text)
    assert by_metric[-1] == "second"  # it stopped before its test: no value comes last


def test_ten_thousand_are_paged_and_read_in_the_background(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    for n in range(260):
        run = tmp_path / "p" / "runs" / f"r{n:03d}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"slug": "simclr", "data": "digits", "seed": n, "config": {}}))
        (run / "metrics.csv").write_text(f"epoch,test/acc\n1,\n2,{n / 1000}\n")
        os.utime(run, (1e9 + n, 1e9 + n))
    page = served(tmp_path / "p")
    while page.site.index()[1]:
        time.sleep(0.01)
    assert names(page.get("/runs").text) == [f"r{n:03d}" for n in range(259, 209, -1)]
    last = page.get("/runs?sort=test/acc&down=1&page=99").text
    assert names(last) == [f"r{n:03d}" for n in range(9, -1, -1)]
    assert "page 6 of 6" in last
    # A new server takes the summaries from its file, and reads only the run that changed.
    read = []
    original = room.summarised
    monkeypatch.setattr(room, "summarised", lambda *words: read.append(words[1]) or original(*words))
    (tmp_path / "p/runs/r007/metrics.csv").write_text("epoch,test/acc\n1,0.9\n")
    os.utime(tmp_path / "p/runs/r007", (2e9, 2e9))
    shutil.rmtree(tmp_path / "p/runs/r008")
    index = Index(page.site.places, Walk(page.site.places))
    found, unread = index(patience=30)
    assert (len(found), unread, [os.path.basename(path) for path in read]) == (259, 0, ["r007"])
    assert found[0].metrics == {"test/acc": 0.9}


def test_damaged_runs_are_named_and_do_no_harm(tmp_path):
    for name, text in {"a": "slug: [", "b": "- a list", "c": "!!python/object/apply:os.system [true]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.yaml").write_text("slug: clip")
    (tmp_path / "d" / "metrics.csv").write_text("epoch,a\n0," + "1" * 200_000 + "\n")  # longer than a field may be
    page = served(tmp_path)
    html = page.get("/runs").text
    assert html.count("damaged:") == 4
    assert "could not determine a constructor" in html  # YAML that would run code is refused
    answer = page.get("/run/0/a")
    assert (answer.status_code, "not readable YAML" in answer.text) == (400, True)


def test_last_values_skip_gaps_and_what_is_not_finite():
    text = "epoch,a,b,c\n0,1.0,2.0,\n1,nan,3.0,\n2,,,\n"
    assert last_values(text) == (3, {"a": 1.0, "b": 3.0})
    assert last_values("") == (0, {})


def test_runs_without_a_value_come_last_both_ways(page):
    runs, _ = page.site.index()
    metric = next(name for run in runs for name in run.metrics if name.startswith("test/"))
    for down in (True, False):
        assert sorted_by(runs, metric, down=down)[-1].name == "second"
    assert [run.name for run in matching(runs, "stopped")] == ["second"]


def test_a_run_s_page_shows_it_and_its_live_part_follows_the_training(copied):
    page = served(copied)
    html = page.get("/run/0/runs/first").text
    for words in ("Outcome", "Settings", "Do it again", "counterpoint train clip", "<svg", "weight_decay"):
        assert words in html
    assert "data-live" not in html  # a finished run does not change
    run = copied / "runs" / "second"
    stamp = re.search(r'data-stamp="([^"]+)"', page.get("/run/0/runs/second").text)
    assert stamp is not None
    same = page.get("/live/0/runs/second", params={"stamp": stamp[1]})
    assert (same.status_code, same.text) == (204, "")
    rows = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(rows + rows.splitlines()[-1].replace("1,", "2,", 1) + "\n")
    now = page.get("/live/0/runs/second", params={"stamp": stamp[1]})
    assert (now.status_code, "3 epochs" in now.text, "x-done" in now.headers) == (200, True, False)
    assert now.headers["x-stamp"] != stamp[1]


def test_the_state_of_a_run_is_the_one_that_its_folder_records(copied):
    run = copied / "runs" / "second"
    page = served(copied)

    def shown(*, machine: str = "", pid: int = 0, born: str = "", state: str = "training") -> str:
        record = {"state": state, "why": f"why it {state}", "machine": machine, "pid": pid, "born": born}
        (run / "state.json").write_text(json.dumps(record))
        now = time.time()
        os.utime(run, (now, now))  # it wrote a moment ago
        (html,) = re.findall(r'<p class="state \w+">([^<]*)</p>', page.get("/run/0/runs/second").text)
        page.site.walk.forget()
        assert f">{html.split()[0].strip(',')}<" in page.get("/runs?q=second").text
        return html

    here, born = states.machine(), states.born(os.getpid())
    assert shown(state="interrupted") == "interrupted after 2 epochs; it has no checkpoint to resume"
    assert shown(state="diverged") == "diverged, 2 epochs: why it diverged"
    assert shown(state="failed") == "failed after 2 epochs: why it failed; it has no checkpoint to resume"
    if born:  # Linux
        assert shown(machine=here, pid=os.getpid(), born=born) == "training, 2 epochs"
        assert (
            shown(machine=here, pid=os.getpid(), born="1") == "stopped after 2 epochs; it has no checkpoint to resume"
        )
    assert shown(machine="elsewhere", pid=1, born="1") == "training, 2 epochs"  # known by the time alone


def test_runs_side_by_side_show_what_differs(page):
    html = page.get("/compare?run=0/runs/first&run=0/runs/second&run=0/runs/third").text
    differing, same = html.split("Settings that are the same")
    rows = dict(re.findall(r'<th scope="row">([^<]+)</th><td>(.*?)</td></tr>', differing))
    assert set(rows) == {"config.lr", "config.epochs"}
    assert "0.2" in rows["config.lr"]
    assert "config.batch_size" in same
    assert "<svg" in html
    for wrong in ("/compare", "/compare?run=0/runs/first", "/compare?" + "&".join(f"run=0/runs/{n}" for n in range(9))):
        assert page.get(wrong).status_code == 400


def test_claims_show_records_and_the_package_s_verdicts(page):
    html = page.get("/claims").text
    assert "/claims/albef" in html
    assert "the package" in html  # most have no record in this folder
    assert re.findall(r'href="/claims/([a-z0-9-]+)"', page.get("/claims?q=albef").text) == ["albef"]
    record = page.get("/claims/albef").text
    assert "Every seed" in record
    assert "<svg" in record
    assert "These folders hold no record" in page.get("/claims/symile").text
    assert "did you mean" in page.get("/claims/albeff").text


def test_comparisons_are_listed_and_shown(copied):
    record = json.loads((copied / "results/claims/albef.json").read_text())
    row = {k: v for k, v in record["conjuncts"][0].items() if k != "verdict"} | {"verdict": "better"}
    made = {k: v for k, v in record.items() if k not in ("conjuncts", "variants")} | {"comparisons": [row]}
    (copied / "results/compare").mkdir()
    (copied / "results/compare/mine.json").write_text(json.dumps(made))
    (copied / "results/compare/bad.json").write_text("{")
    page = served(copied)
    listed = page.get("/claims")
    assert listed.status_code == 200
    assert "0/results/compare/bad.json: bad.json is not a record" in listed.text  # the damaged one is named
    assert "/comparisons/0/results/compare/mine.json" in listed.text
    (copied / "results/claims/albef.json").write_text("[]")
    assert "0/results/claims/albef.json: albef.json is not a record" in page.get("/claims").text
    assert page.get("/claims/albef").status_code == 400
    (copied / "results/claims/albef.json").write_text('{"conjuncts": [3]}')
    assert "albef.json is not a record of a claim" in page.get("/claims/albef").text
    (copied / "results/compare/bad.json").unlink()  # within the half second in which the list of files is kept
    assert page.get("/claims").status_code == 200
    assert page.get("/comparisons/0/results/compare/bad.json").status_code == 404
    (copied / "results/claims/albef.json").unlink()
    assert page.get("/claims/albef").status_code == 404
    (copied / "results/claims/albef.json").write_text(json.dumps(record))
    time.sleep(0.6)
    assert "Do it again" in page.get("/comparisons/0/results/compare/mine.json").text
    assert page.get("/comparisons/0/results/claims/albef.json").status_code == 404


@pytest.mark.parametrize("key", ["9/x", "x", "", "0/../secret.txt", "0//etc/passwd", "0/runs/leaving", "-1/runs/first"])
def test_keys_never_leave_the_folders(project, key):
    with pytest.raises(OutsideError):
        Places([project]).path(key)
