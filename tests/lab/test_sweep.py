"""The sweep over temperatures, and all claims together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterpoint import cli
from counterpoint.lab import claims
from counterpoint.lab import sweep as analyse

WORDS = [
    "--data",
    "digits?size=8&train=80&held_out=0.05&valid=0.05",
    "--encoder",
    "mlp-s",
    "--recipe",
    "digits-plain",
    "--batch-size",
    "40",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert (
        cli.main(["train", "simclr", *WORDS, "--epochs", "2", "--hidden", "8", "--out", str(out), "--name", "r"]) == 0
    )
    assert (
        cli.main(["train", "byol", *WORDS, "--epochs", "1", "--hidden", "8", "--out", str(out), "--name", "byol"]) == 0
    )
    return out / "r"


@pytest.mark.usefixtures("drawn")
def test_a_sweep_writes_a_record_and_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["analyse", str(run), "--temperature-sweep", "--temperatures", "0.1", "1.0", "--jobs", "1"]
    assert cli.main(words) == 0
    record = json.loads((run / "temperature-sweep.json").read_text())
    assert record["temperatures"] == [0.1, 1.0]
    assert set(record["measures"]) == set(analyse.MEASURES)
    assert record["measures"]["embedding_uniformity"][0] != record["measures"]["embedding_uniformity"][1]
    page = (run / "temperature-sweep.html").read_text()
    assert "tolerance" in page
    assert "<svg" in page
    kept = sorted((run / ".sweep").glob("*.json"))
    stamps = [file.stat().st_mtime_ns for file in kept]
    assert cli.main(words) == 0  # nothing is trained again
    assert [file.stat().st_mtime_ns for file in kept] == stamps
    assert "0.1" in capsys.readouterr().out


def test_what_cannot_be_swept_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([str(run)], "--temperature-sweep"),
        ([str(run.parent / "byol"), "--temperature-sweep"], "no setting temperature"),
        ([str(run), "--temperature-sweep", "--temperatures", "0.1"], "at least two"),
        ([str(run.parent / "none"), "--temperature-sweep"], "none"),
    ):
        assert cli.main(["analyse", *words]) == 2
        assert said in capsys.readouterr().err


def _record(slug: str, mean: float, verdict: str, unit: str = "accuracy") -> dict[str, object]:
    row = {
        "says": "It gains.",
        "arm": "method",
        "baseline": "plain",
        "metric": "m",
        "unit": unit,
        "direction": "higher",
        "test": "superiority",
        "margin": 0.0,
        "mean": mean,
        "low": mean - 0.1,
        "high": mean + 0.1,
        "detectable": 0.2,
        "verdict": verdict,
    }
    return {"slug": slug, "kind": "outcome", "metric": "m", "conjuncts": [row], "seeds": [0, 1], "verdict": verdict}


def test_all_claims_are_drawn_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for slug, mean, verdict in (("mochi", 0.4, "holds"), ("cwcl", -0.2, "reversed"), ("dcl-quick", 9.0, "holds")):
        (tmp_path / f"{slug}.json").write_text(json.dumps(_record(slug, mean, verdict)))
    document = tmp_path / "page.md"
    document.write_text(f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n")
    assert cli.main(["claims", "--out", str(tmp_path), "--into", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert (
        "| `mochi` | outcome | **holds**, 2 seeds | It gains. | m | better: low > 0 | +0.400 | +0.300 .. +0.500 | 0.200 | holds |"
        in text
    )
    assert "dcl-quick" not in text
    assert "reversed" in capsys.readouterr().out
    drawn = (tmp_path / "claims.svg").read_text()
    assert drawn.startswith("<?xml")
    assert drawn == (cli.main(["claims", "--out", str(tmp_path)]), (tmp_path / "claims.svg").read_text())[1]


def test_no_records_or_markers_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", "--out", str(tmp_path)]) == 2
    assert "no claims are recorded" in capsys.readouterr().err
    (tmp_path / "mochi.json").write_text(json.dumps(_record("mochi", 0.4, "holds")))
    (tmp_path / "page.md").write_text("nothing")
    assert cli.main(["claims", "--out", str(tmp_path), "--into", str(tmp_path / "page.md")]) == 2
    assert "block" in capsys.readouterr().err
    (tmp_path / "mochi.json").write_text("{")
    assert cli.main(["claims", "--out", str(tmp_path)]) == 2


def test_a_temperature_without_effect_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "isogclr", *WORDS, "--epochs", "1", "--hidden", "8", "--out", str(tmp_path), "--name", "r"]
    assert cli.main(words) == 0
    words = [
        "analyse",
        str(tmp_path / "r"),
        "--temperature-sweep",
        "--temperatures",
        "0.1",
        "0.2",
        "0.3",
        "--jobs",
        "1",
    ]
    assert cli.main(words) == 2
    assert "has no effect" in capsys.readouterr().err
    assert len(list((tmp_path / "r" / ".sweep").glob("*.json"))) == 2  # nor is the third tried


def test_temperatures_are_told_apart_and_the_page_says_how(run: Path) -> None:
    near = ["0.1", "0.10000001"]
    words = ["analyse", str(run), "--temperature-sweep", "--temperatures", *near, "1.0", "--jobs", "1"]
    assert cli.main(words) == 0
    record = json.loads((run / "temperature-sweep.json").read_text())
    assert record["temperatures"] == [0.1, 0.10000001, 1.0]
    assert {"0.1-0.json", "0.10000001-0.json", "1.0-0.json"} <= {f.name for f in (run / ".sweep").glob("*.json")}
    page = (run / "temperature-sweep.html").read_text()
    assert f"{run} --temperature-sweep --seeds 1 --temperatures 0.1 0.10000001 1" in page
    for wrong in (("nan", "0.1"), ("0.1", "inf"), ("-1", "0.1")):
        assert cli.main(["analyse", str(run), "--temperature-sweep", "--temperatures", *wrong]) == 2


def test_a_claim_of_one_seed_has_no_interval(tmp_path: Path) -> None:
    record = _record("mochi", 0.4, "undecided")
    record["conjuncts"][0] |= {"low": None, "high": None}
    (tmp_path / "mochi.json").write_text(json.dumps(record | {"seeds": [0]}))
    document = tmp_path / "page.md"
    document.write_text(f"{claims.BEGIN}\n{claims.END}\n")
    assert cli.main(["claims", "--out", str(tmp_path), "--into", str(document)]) == 0
    assert "| +0.400 | - | 0.200 | undecided |" in document.read_text()
    assert (tmp_path / "claims.svg").read_text().startswith("<?xml")


def test_every_part_of_a_claim_has_a_row_and_every_unit_a_panel(tmp_path: Path) -> None:
    record = _record("mochi", 0.4, "partly")
    other = {**record["conjuncts"][0], "says": "It is even.", "unit": "uniformity", "verdict": "reversed"}
    refused = {**record["conjuncts"][0], "says": "It costs nothing.", "verdict": "not judged", "refused": "ceiling"}
    for name in ("mean", "low", "high", "detectable"):
        del refused[name]
    record["conjuncts"] += [other, refused]
    (tmp_path / "mochi.json").write_text(json.dumps(record))
    document = tmp_path / "page.md"
    document.write_text(f"{claims.BEGIN}\n{claims.END}\n")
    claims.write(tmp_path, [document])
    text = document.read_text()
    assert "|  |  |  | It is even. | m | better: low > 0 | +0.400 | +0.300 .. +0.500 | 0.200 | reversed |" in text
    assert "|  |  |  | It costs nothing. | m | better: low > 0 | - | - | - | not judged |" in text
    drawn = (tmp_path / "claims.svg").read_text()
    assert "gain in accuracy" in drawn
    assert "gain in uniformity" in drawn
