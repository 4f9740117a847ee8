"""The pages: whole, self-contained, escaped, and true to what they are made from."""

from __future__ import annotations

import csv
import json
import re
import shlex
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from counterpoint import catalog
from counterpoint.engine.run import Run
from counterpoint.errors import RunError
from counterpoint.report import figures
from counterpoint.report.claim import write_claim_report
from counterpoint.report.demo import write_demo_report
from counterpoint.report.detection import write_detection_report
from counterpoint.report.page import clock, number
from counterpoint.report.run import curve_sections, frames, outcome, reproduce, write_run_report
from counterpoint.tasks.moments import Detection, Interval, Thumbnail
from counterpoint.use.detect import jpeg

pytestmark = pytest.mark.usefixtures("all_drawn")

NASTY = '<script>alert("x")</script>&"\''
VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect", "circle", "line"}


class Checker(HTMLParser):
    """Finds what would reach out, what is not closed, ids used twice, and links to nowhere."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            if name == "href" and value.startswith("#"):
                self.links.append(value[1:])
            if name in ("src", "href", "srcset", "poster", "action") and re.match(r"(https?:)?//", value):
                self.problems.append(f"reaches out: {value}")
            if name.startswith("on"):
                self.problems.append(f"inline handler {name}")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:] or 'nothing'}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def checked(path: Path) -> tuple[str, str]:
    """Return (source, visible text) of a page after checking that nothing is wrong with it."""
    source = path.read_text(encoding="utf-8")
    page = Checker()
    page.feed(source)
    assert page.problems == []
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids), "an id is used twice"
    assert set(page.links) <= set(page.ids), "a link leads nowhere"
    assert "default-src 'none'" in source
    assert "<script>alert" not in source
    assert not re.search(r"url\((?!#)[^)]*//", source)
    return source, " ".join("".join(page.text).split())


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "slug": "macil-sd",
                "title": NASTY,
                "data": "arcade?train=3",
                "seed": 2,
                "config": {"lr": 0.1, "contrast": False},
            }
        )
    )
    with (folder / "metrics.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["epoch", "step", "train/loss", "test/av_ap", "lr"])
        for epoch, ap in enumerate([0.2, 0.6, 0.5, 0.4, 0.3]):
            out.writerow([epoch, 10 * epoch, 1 / (epoch + 1), ap, 0.001])
    (folder / "environment.json").write_text(json.dumps({"torch": "2.x", "threads": 2}))
    return folder


def test_page_of_a_run_shows_its_figures_and_commands(run):
    page = write_run_report(Run.open(run))
    assert page == run / "report.html"
    source, text = checked(page)
    assert "macil-sd on arcade?train=3" in text
    assert NASTY in text
    assert "0.4000" in text  # the mean of the last three
    assert "0.6000" in text  # the best
    assert source.count("<svg") >= 3
    assert "counterpoint train macil-sd" in text
    assert "--no-contrast" in text
    assert "counterpoint evaluate '" in text
    assert "threads" in text


def test_page_of_a_run_that_only_began_is_written(run):
    (run / "metrics.csv").unlink()
    (run / "environment.json").unlink()
    _, text = checked(write_run_report(Run.open(run)))
    assert "does not exist yet" in text
    assert "nothing recorded" in text


def test_holes_and_infinities_in_the_metrics_are_drawn(run):
    (run / "metrics.csv").write_text("epoch,step,test/a,test/b,odd\n0,1,nan,,inf\n1,2,0.5,,-inf\n")
    _, text = checked(write_run_report(Run.open(run)))
    assert "0.5000" in text


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.yaml", None, "not a run directory"),
        ("config.yaml", "{", "not readable YAML"),
        ("config.yaml", "[]", "does not name a system"),
        ("metrics.csv", "epoch,a\n0,x\n", "is damaged"),
        ("environment.json", "{", "not readable JSON"),
        ("environment.json", "[]", "should hold names"),
    ],
)
def test_damaged_files_are_named(run, file, content, expected):
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    with pytest.raises(RunError, match=expected):
        write_run_report(Run.open(run))
    assert not (run / "report.html").exists()


def test_the_command_quotes_what_a_shell_would_split():
    line = reproduce({"slug": "x", "data": "videos:/a b", "seed": 0, "config": {"a_b": True, "c": [1, 2], "d": "e f"}})
    words = line.replace("\\\n", " ").split()
    assert "'videos:/a b'" in line
    assert words[:3] == ["counterpoint", "train", "x"]
    assert "--a-b" in words
    assert "--c 1 2" in line
    assert "--d 'e f'" in line


@pytest.mark.parametrize("slug", ["simclr", "teminal", "supremix", "gopro", "clhe", "moco-v2+mochi"])
def test_the_command_of_a_run_is_one_that_train_takes(slug):
    import tyro

    from counterpoint.commands import train
    from counterpoint.systems.settings import stored

    system = catalog.load_system(slug)
    for start in ("", "runs/first"):
        config = system.config()
        if hasattr(config, "start"):
            config = replace(config, start=start)
        line = reproduce({"slug": slug, "data": system.data, "seed": 0, "config": stored(config)})
        made, rest, _ = train.prepare(shlex.split(line.replace("\\\n", " "))[2:])
        assert tyro.cli(made, args=rest).settings() == config


def test_curves_of_unlike_size_do_not_share_a_frame():
    rows = [{"epoch": 0, "a": 1.0, "b": 2.0, "c": 500.0, "d": 0.001}]
    assert frames(["a", "b", "c", "d"], rows) == [["a", "b"], ["c"], ["d"]]


# --- detections -------------------------------------------------------------------------------------------------------


def detection(path, snippets=60, **changes):
    rng = np.random.default_rng(0)
    score = rng.random(snippets).astype(np.float32)
    picture = Thumbnail(3.0, jpeg(np.full((20, 30, 3), 99, np.uint8)))
    base = Detection(
        video=path,
        duration=snippets * 0.5,
        snippet_seconds=0.5,
        score=score,
        audio=score,
        visual=score,
        threshold=0.5,
        intervals=[Interval(2.5, 4.0, 3.0, 0.9)],
        thumbnails=[picture],
        truth=[(2.0, 5.0)],
        has_audio=True,
        width=320,
        height=180,
        notes=[NASTY],
        speed=50.0,
        run="runs/x",
    )
    for name, value in changes.items():
        setattr(base, name, value)
    return base


def test_page_of_detections_shows_every_video_and_failure(tmp_path):
    video = tmp_path / f"a {NASTY.replace('/', '')}.mp4"
    video.write_bytes(b"not really a video")
    page = write_detection_report([detection(video)], tmp_path / "out.html", failures=[(Path("b.mp4"), NASTY)])
    source, text = checked(page)
    assert "data:video/mp4;base64," in source
    assert video.name in text
    assert "0:02.5" in text
    assert "0.90" in text
    assert "b.mp4" in text
    assert NASTY in text
    assert 'data-seek="2.50"' in source
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', source, re.DOTALL)[1])
    assert len(data["fused"]) == 60


def test_large_missing_and_unplayable_videos_are_linked_or_said(tmp_path, monkeypatch):
    monkeypatch.setattr("counterpoint.report.detection.EMBED_BYTES", 10)
    big, old = tmp_path / "bi g#1.mp4", tmp_path / "old.avi"
    for path in (big, old):
        path.write_bytes(bytes(20))
    made = [detection(path) for path in (big, old, tmp_path / "gone.mp4")]
    source, text = checked(write_detection_report(made, tmp_path / "pages" / "out.html"))
    assert 'src="./../bi%20g%231.mp4"' in source
    assert "Browsers do not play .avi files" in text
    assert "no longer exists" in text
    assert "base64,AAAA" not in source
    assert len(re.findall(r"<video", source)) == 1
    assert "All videos" in text


def test_long_silent_and_empty_timelines_are_drawn(tmp_path):
    made = [
        detection(tmp_path / "film.mp4", snippets=20000),
        detection(tmp_path / "mute.mp4", has_audio=False, truth=None),
        detection(tmp_path / "calm.mp4", intervals=[], thumbnails=[], truth=[]),
        detection(tmp_path / "short.mp4", snippets=1),
        detection(tmp_path / "odd.mp4", duration=0.0, score=np.full(60, np.nan, np.float32)),
    ]
    many = [Interval(float(i), i + 0.5, i + 0.25, 0.6) for i in range(500)]
    made.append(detection(tmp_path / "busy.mp4", snippets=2000, intervals=many))
    page = write_detection_report(made, tmp_path / "out.html")
    source, text = checked(page)
    assert page.stat().st_size < 2_000_000
    assert "no sound: scored from the picture alone" in text
    assert "No moment scores above 0.50" in text
    assert "500 moments above 0.50; the 200 highest-scoring are listed" in text
    assert source.count("NaN") == 0


def test_pages_without_a_detection_are_written(tmp_path):
    _, text = checked(write_detection_report([], tmp_path / "a.html", failures=[(Path("x.mp4"), "the file is empty")]))
    assert "the file is empty" in text
    _, text = checked(write_detection_report([], tmp_path / "b.html"))
    assert "No video was given" in text


# --- claims and the demo ----------------------------------------------------------------------------------------------


def record():
    pair = {
        "says": "It gains.",
        "arm": "new",
        "baseline": "old",
        "metric": "ap",
        "unit": "precision",
        "direction": "higher",
        "test": "superiority",
        "margin": 0.02,
        "p_holm": 0.31,
        "detectable": 0.4,
        "differences": [0.05, 0.01],
        "mean": 0.03,
        "low": -0.22,
        "high": 0.28,
        "interval": "95 % paired t interval, 1 degrees of freedom",
        "verdict": "no difference",
    }
    part = {
        "claim": NASTY,
        "data": "x",
        "setting": {"lr": 0.1},
        "metric": "ap",
        "metrics": ["ap", "other"],
        "baseline": "old",
        "arms": {"old": {}, "new": {"contrast": True}},
        "seeds": [0, 1],
        "results": {
            "old": {"0": {"ap": 0.5, "other": 1.0}, "1": {"ap": 0.6, "other": 1.0}},
            "new": {"0": {"ap": 0.55, "other": 1.0}, "1": {"ap": 0.61, "other": 1.0}},
        },
        "kind": "outcome",
        "conjuncts": [pair],
        "reported": [{**pair, "says": "Beside it."}],
        "missing": ["data were not redrawn"],
        "verdict": "no difference",
        "notes": ["a note"],
    }
    return part | {
        "slug": "x",
        "title": "A paper",
        "variants": {"elsewhere": part},
        "versions": {"torch": "2"},
        "machine": {},
    }


def test_page_of_a_claim_shows_its_verdict(tmp_path):
    _, text = checked(write_claim_report(record(), tmp_path / "claim.html"))
    for said in (
        NASTY,
        "no difference",
        "+0.0300",
        "−0.2200 to +0.2800",
        "It gains.",
        "better: low > 0.02",
        "Kind: outcome",
        "Beside it.",
        "data were not redrawn",
        "Dotted: the margin",
        "0.5500",
        "Variant: elsewhere",
        "a note",
    ):
        assert said in text, said
    assert "counterpoint verify x --seeds 2" in text


def test_every_unit_has_a_drawing_of_its_own(tmp_path):
    made = record() | {"variants": {}, "reported": []}
    (pair,) = made["conjuncts"]
    refused = {name: pair[name] for name in ("arm", "baseline", "metric", "unit", "test", "margin", "direction")}
    made["conjuncts"] = [
        pair,
        pair | {"metric": "gap", "unit": "distance", "direction": "lower", "verdict": "reversed"},
        refused | {"says": "It costs nothing.", "verdict": "not judged", "refused": "ceiling"},
    ]
    _, text = checked(write_claim_report(made, tmp_path / "claim.html"))
    assert "difference in ap" in text
    assert "new − old" in text
    assert "old − new" in text
    assert "difference in gap" in text
    assert "It costs nothing." in text
    assert "not judged" in text


def test_a_claim_on_one_seed_has_no_interval(tmp_path):
    made = record()
    made["conjuncts"][0] |= {"low": None, "high": None, "differences": [0.05], "verdict": "undecided: one seed"}
    made["variants"] = {}
    _, text = checked(write_claim_report(made, tmp_path / "claim.html"))
    assert "it takes at least two seeds" in text


def test_the_committed_record_has_a_page(tmp_path):
    root = Path(__file__).parents[2] / "results/claims"
    made = json.loads((root / "macil-sd.json").read_text())
    _, text = checked(write_claim_report(made, tmp_path / "claim.html"))
    assert made["claim"] in text


def test_page_of_the_demo_shows_its_results(tmp_path):
    rows = [{"epoch": float(e), "test/av_ap": 0.1 * e, "train/mil": 1.0} for e in range(3)]
    rows[-1]["test/a_ap"] = 0.4
    results = [{"arm": a, "seed": s, "av_ap": v} for a, s, v in (("mil", 0, 0.5), ("macil-sd", 0, 0.6))]
    page = write_demo_report(
        tmp_path / "report.html",
        results=results,
        histories={"mil, seed 0": rows, "macil-sd, seed 0": rows},
        detections=[detection(tmp_path / "a.mp4")],
        environment={"torch": "2"},
    )
    _, text = checked(page)
    assert "+0.1000" in text
    assert "counterpoint detect VIDEO.mp4 --run runs/x" in text
    assert "test/av_ap" in text
    assert "test/a_ap" not in text  # a curve of one value would be a dot


# --- parts ------------------------------------------------------------------------------------------------------------


def test_numbers_and_times_are_formatted_for_readers():
    assert [number(v) for v in (0.53241, 1234.5, 4e-5, None, float("nan"), 3)] == [
        "0.5324",
        "1234",
        "4.0e-05",
        "–",
        "–",
        "3",
    ]
    assert number(-0.05, sign=True) == "−0.0500"
    assert [clock(t) for t in (0, 59.96, 3725.04)] == ["0:00.0", "1:00.0", "1:02:05.0"]


def test_drawings_say_what_they_show_and_follow_the_page_s_colours():
    drawn = str(figures.curves({"a": ([0, 1, 2], [0.1, np.nan, 0.3])}, title="AP", xlabel="epoch"))
    assert 'aria-label="AP, by epoch: a from 0.1 to 0.3' in drawn
    assert "var(--s1)" in drawn
    assert "#01021" not in drawn
    low, high = figures.envelope(np.array([1.0, 5.0, np.nan, 2.0]), 2)[1:]
    assert low.tolist() == [1.0, 2.0]
    assert high.tolist() == [5.0, 2.0]
    assert figures.path([0, 1, 2], [1, np.nan, 3]) == "M0 1M2 3"
    assert figures.ticks(0) == [0.0]
    for length in (0.3, 7, 100, 5000, 1e6, 1e9):
        marks = figures.ticks(length)
        assert 2 <= len(marks) <= 7
        assert marks[-1] <= length + 1e-9


def test_an_axis_of_shares_has_more_ticks_than_its_ends():
    def ticks(x):
        drawn = figures.curves({"recall": (x, [1.0, 0.9, 0.1])}, title="Recall", xlabel="threshold")
        return [
            float(t) for t in re.findall(r">(\d+(?:\.\d+)?)</text>", str(drawn)[: str(drawn).index("threshold</text>")])
        ]

    assert len([t for t in ticks([0.01, 0.4, 0.96]) if 0 < t < 1]) >= 3
    assert all(t == int(t) for t in ticks([1, 2, 3]))


def test_an_older_page_stays_until_the_new_one_is_whole(run, monkeypatch):
    page = write_run_report(Run.open(run))
    before = page.read_text()
    monkeypatch.setattr("counterpoint.report.page.Page.html", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_run_report(Run.open(run))
    assert page.read_text() == before
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_no_two_of_many_clouds_look_alike():
    assert len({figures.look(number) for number in range(42)}) == 42


def test_what_is_measured_now_and_then_is_a_line_and_a_lone_value_a_dot(monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "curves", lambda series, **_: drawn.update(series) or figures.Markup(""))
    curve_sections([{"epoch": float(n), **({"test/accuracy": n / 30} if n % 10 == 9 else {})} for n in range(30)])
    x, y = drawn["accuracy"]
    assert x.tolist() == [10, 20, 30]  # as the progress bar counts
    assert np.isfinite(y).all()
    monkeypatch.undo()

    def dots(values: list[float]) -> int:
        drawing = str(figures.curves({"a": (np.arange(6), np.array(values))}, title="a", xlabel="epoch"))
        return len(re.findall(r"<use [^>]*--s1", drawing))

    assert dots([1.0, np.nan, 2.0, np.nan, 3.0, 3.5]) == 2
    assert dots([1.0, 2.0, 3.0, np.nan, 3.0, 3.5]) == 0


def test_a_run_without_test_metrics_is_judged_by_valid(tmp_path) -> None:
    rows = [{"epoch": n, "train/loss": 1.0 - n, "valid/accuracy": 0.25 + n / 4} for n in range(2)]
    shown = outcome(rows, tmp_path / "metrics.csv", {})
    assert "accuracy" in shown
    assert "at epoch 2" in shown
    assert "After 2 epochs" in shown
    assert [heading for heading, _ in curve_sections(rows)] == ["Validation metrics", "Training"]


def test_a_run_of_one_epoch_has_tables_in_place_of_curves() -> None:
    sections = dict(curve_sections([{"epoch": 0.0, "step": 3.0, "train/loss": 1.25, "test/accuracy": 0.5, "lr": 0.1}]))
    assert list(sections) == ["Training", "Learning rates"]  # the metrics of the test are the page's first table
    assert "1.25" in sections["Training"]
    assert "<svg" not in "".join(sections.values())


def test_pictures_stand_side_by_side_with_their_texts_escaped() -> None:
    from counterpoint.report.found import found_sections

    rows = [{"cells": [{"png": "AAAA", "text": NASTY}, {"png": "BBBB", "text": "output"}]}]
    section = found_sections({"Restored": {"kind": "captioned", "rows": rows, "caption": "Parts."}})[0][1]
    assert section.count("<img ") == 2
    assert "data:image/png;base64,BBBB" in section
    assert "<script>" not in section
    assert "Parts." in section


def test_a_matrix_of_numbers_shows_decimals_and_its_own_caption() -> None:
    from counterpoint.report.found import found_sections

    part = {"kind": "matrix", "values": [[0.25, 0.5], [0.75, 0.5]], "names": ["a", "b"], "caption": "Gates."}
    ((heading, section),) = found_sections({"Pairs": part})
    assert heading == "Pairs"
    assert "Gates." in section
    assert "Most often confused" not in section
    counts = found_sections({"Confusion": {"kind": "matrix", "values": [[3, 1], [0, 2]], "names": ["a", "b"]}})[0][1]
    assert "Most often confused" in counts
    assert "Gates." not in counts


def test_a_cloud_alone_has_no_legend_whose_mark_looks_like_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(figures, "_legend", lambda _, names: asked.append(names))
    cloud = np.array([[0.0, 1.0], [1.0, 0.5]])
    figures.scatter({"lr": cloud}, axes=("lr", "accuracy"))
    figures.scatter({"a": cloud, "b": cloud}, axes=("lr", "accuracy"))
    assert asked == [2]


def test_more_clouds_than_a_legend_holds_have_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_legend", lambda *_: pytest.fail("a legend"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.scatter({f"class {n}": np.array([[n, 0.5]]) for n in range(2000)}, axes=("size", "temperature"))
    assert "size and temperature: 2000 of 2000 groups around" in drawn


def test_an_empty_setting_has_a_dash_and_not_an_empty_cell() -> None:
    from counterpoint.report import page

    assert [page.plain(value) for value in ("", None, (), {}, 0, False)] == [*["–"] * 4, "0", "no"]
