"""The claim machinery: records, verifications that go on where they stopped, tuning, and figures judged anew."""

from __future__ import annotations

import html
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from counterpoint import catalog
from counterpoint.errors import CounterpointError, Interrupted, ProtocolError
from counterpoint.lab import claims, rerun, runner
from counterpoint.lab import verify as room
from counterpoint.lab.protocol import Protocol, of_system, read, slugs
from counterpoint.report.claim import write_claim_report

ROOT = Path(__file__).parents[2]
GAINS = {"mil": 0.0, "mil+contrast": 0.02, "mil+distillation": 0.0, "macil-sd": 0.05}


def claim(**changed) -> Protocol:
    """Return MACIL-SD's protocol without tuning, as if committed."""
    return replace(of_system("macil-sd"), **({"tuning": None, "path": "", "seeds": 5, "variants": {}} | changed))


def fake(slug, data, options, settings, seed, recipe):
    part = claim()
    arm = next(name for name in part.arms if part.arms[name].items() <= settings.items())
    rng = np.random.default_rng([seed, len(arm)])
    value = 0.5 + GAINS[arm] + 0.005 * float(rng.standard_normal())
    return {"av_ap": value, "valid_av_ap": value, "seconds": 30.0, "data": f"{data} {options['seed']}"}


def test_figures_are_those_after_the_last_epoch():
    rows = [{"epoch": e, "test/m": v, "valid/m": v / 2, "train/x": 9.0} for e, v in enumerate([0.1, 0.9, 0.3])]
    assert runner.figures(rows) == pytest.approx({"m": 0.3, "valid_m": 0.15, "train_x": 9.0})


def test_a_record_holds_all_it_takes_to_judge_it(tmp_path):
    variant = replace(claim(), data="arcade")
    record = room.verify("macil-sd", jobs=1, out=tmp_path, run_one=fake, protocol=claim(variants={"arcade": variant}))
    assert record == json.loads((tmp_path / "macil-sd.json").read_text())
    assert record["verdict"] == "holds"
    assert [row["verdict"] for row in record["conjuncts"]] == ["holds"] * 3
    assert record["seeds"] == [0, 1, 2, 3, 4]
    assert record["data_redrawn"] is True
    assert record["minutes"] == 10.0
    assert record["protocol"]["sha256"] == of_system("macil-sd").sha256
    assert set(record["results"]["macil-sd"]) == {"0", "1", "2", "3", "4"}
    assert "seconds" not in record["results"]["macil-sd"]["0"]
    assert set(record["variants"]) == {"arcade"}
    for key in ("claim", "kind", "setting", "arms", "baseline", "metric", "versions", "machine", "notes", "reported"):
        assert record[key], key
    assert room.read_record("macil-sd", tmp_path) == record
    with pytest.raises(CounterpointError, match="make one: counterpoint verify symile"):
        room.read_record("symile", tmp_path)
    with pytest.raises(CounterpointError, match="did you mean symile"):
        room.read_record("simile", tmp_path)


def test_without_variants_the_record_keeps_those_it_had_with_their_own_commit(tmp_path, monkeypatch):
    variant = replace(claim(), sentence="elsewhere")
    both = claim(variants={"arcade": variant})
    monkeypatch.setattr(room.runner, "commit", lambda: {"id": "first", "dirty": False})
    first = room.verify("macil-sd", jobs=1, out=tmp_path, run_one=fake, protocol=both)
    monkeypatch.setattr(room.runner, "commit", lambda: {"id": "second", "dirty": True})
    second = room.verify("macil-sd", jobs=1, out=tmp_path, run_one=fake, protocol=both, variants=False)
    assert second["commit"]["id"] == "second"
    assert second["variants"] == json.loads(json.dumps(first["variants"]))
    assert second["variants"]["arcade"]["commit"]["id"] == "first"
    assert not any("differed" in said for said in second["variants"]["arcade"]["missing"])
    gone = room.verify("macil-sd", jobs=1, out=tmp_path, run_one=fake, protocol=claim(), variants=False)
    assert "variants" not in gone


def test_a_sound_record_lacks_nothing_and_names_its_commit(tmp_path, monkeypatch):
    for dirty, lacks in ((False, 0), (True, 1)):
        monkeypatch.setattr(runner, "commit", lambda dirty=dirty: {"id": "a" * 40, "dirty": dirty})
        record = room.verify("macil-sd", jobs=1, out=tmp_path, run_one=fake, protocol=claim())
        assert record["commit"]["id"] == "a" * 40
        assert len(record["missing"]) == lacks


def test_an_interrupted_verification_goes_on(tmp_path):
    calls = []

    def stops(*words):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(words)
        return fake(*words)

    with pytest.raises(Interrupted, match="stopped after 7 of 20 runs"):
        room.verify("macil-sd", jobs=1, out=tmp_path, run_one=stops, protocol=claim())
    assert not (tmp_path / "macil-sd.json").exists()
    again = []

    def counted(*words):
        again.append(words)
        return fake(*words)

    record = room.verify("macil-sd", jobs=1, out=tmp_path, run_one=counted, protocol=claim())
    assert len(again) == 4 * 5 - 7
    assert record == room.verify(
        "macil-sd", jobs=1, out=tmp_path, protocol=claim(), run_one=lambda *words: pytest.fail("ran again")
    )
    # Another sentence judges the same runs; more seeds need only the new ones.
    again.clear()
    room.verify("macil-sd", jobs=1, out=tmp_path, run_one=counted, protocol=claim(sentence="other"), seeds=6)
    assert {words[4] for words in again} == {5}


def test_results_of_other_code_or_libraries_are_not_used(tmp_path, monkeypatch):
    room.verify("macil-sd", jobs=1, out=tmp_path, run_one=fake, protocol=claim())
    ran = []

    def counted(*words):
        ran.append(words)
        return fake(*words)

    monkeypatch.setattr(runner, "versions", lambda: {"torch": "another"})
    room.verify("macil-sd", jobs=1, out=tmp_path, run_one=counted, protocol=claim())
    assert len(ran) == 20
    monkeypatch.setattr(runner, "sources", lambda: "another")
    room.verify("macil-sd", jobs=1, out=tmp_path, run_one=counted, protocol=claim())
    assert len(ran) == 40


def test_the_stamp_covers_every_source_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("a = 1")
    first = runner.sources(tmp_path)
    runner.sources.cache_clear()
    (tmp_path / "deep" / "a.py").write_text("a = 2")
    second = runner.sources(tmp_path)
    runner.sources.cache_clear()
    (tmp_path / "b.py").write_text("")
    assert len({first, second, runner.sources(tmp_path)}) == 3
    runner.sources.cache_clear()


def test_a_rehearsal_says_that_it_is_one(tmp_path):
    record = room.verify("macil-sd", seeds=2, quick=True, jobs=1, out=tmp_path, run_one=fake, protocol=claim())
    assert "not evidence" in record["quick"]
    assert [p.name for p in tmp_path.glob("*.json")] == ["macil-sd-quick.json"]


def test_unsound_verifications_are_refused(tmp_path):
    def run(**changed):
        return room.verify("macil-sd", jobs=1, out=tmp_path, **({"run_one": fake, "protocol": claim()} | changed))

    with pytest.raises(ProtocolError, match="3 seeds; a claim needs at least 5"):
        run(seeds=3)
    with pytest.raises(ProtocolError, match="is the same for different seeds"):
        run(run_one=lambda *words: fake(*words) | {"data": "same"})
    with pytest.raises(ProtocolError, match="trained on other data"):
        run(run_one=lambda *words: fake(*words) | {"data": f"{words[4]} {words[3]}"}, protocol=claim(seeds=6))
    with pytest.raises(ProtocolError, match="is missing in arm"):
        run(run_one=lambda *words: {"data": words[4], "seconds": 0.0}, protocol=claim(seeds=7))
    with pytest.raises(ProtocolError, match="ceiling"):
        run(run_one=lambda *words: {"av_ap": 0.999, "data": words[4]}, protocol=claim(seeds=8))
    assert not list(tmp_path.glob("*.json"))


def test_a_protocol_is_committed_before_its_seeds_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "uncommitted", lambda path: True)
    with pytest.raises(ProtocolError, match="commit it before its seeds run"):
        room.verify("macil-sd", jobs=1, out=tmp_path, run_one=fake, protocol=claim(path="x.toml"))


def test_the_commit_and_changes_are_named(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True)

    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(runner, "PACKAGE", package)
    assert runner.commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert runner.commit()["dirty"] is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text("{}")
    assert runner.commit()["dirty"] is False  # records are what is being written
    (package / "new.py").write_text("")
    assert runner.commit()["dirty"] is True
    assert len(runner.commit()["id"]) == 40
    assert runner.uncommitted(str(package / "new.py"))
    assert not runner.uncommitted(str(package / "__init__.py"))


TUNED = """
sentence = "b beats a"
kind = "outcome"
data = "digits?train=100"
[arms.a]
temperature = 0.1
[arms.b]
temperature = 0.2
[metrics.m]
unit = "accuracy"
[[conjuncts]]
says = "b beats a"
arm = "b"
baseline = "a"
metric = "m"
[tuning]
metric = "m"
seeds = [100, 101]
[tuning.grid]
lr = [1.0, 2.0, 3.0]
"""


def test_tuning_chooses_on_valid_for_each_arm_by_pilot_seeds(tmp_path):
    seen = []

    def one(slug, data, options, settings, seed, recipe):
        best = 1.0 if settings["temperature"] == 0.1 else 3.0
        seen.append((settings["temperature"], settings["lr"], seed))
        noise = 0.001 * seed % 7
        return {"valid_m": -abs(settings["lr"] - best), "m": settings["lr"] + noise, "data": seed}

    record = room.verify("simclr", jobs=1, out=tmp_path, run_one=one, protocol=read(TUNED, "simclr"))
    assert record["tuned"]["chosen"] == {"a": {"lr": 1.0}, "b": {"lr": 3.0}}
    pilots = [row for row in seen if row[2] >= 100]
    assert len(pilots) == 2 * 3 * 2  # the same grid for both arms
    assert {(t, lr) for t, lr, seed in seen if seed < 100} == {(0.1, 1.0), (0.2, 3.0)}
    with pytest.raises(ProtocolError, match="tuning needs 'valid/m'"):
        room.verify(
            "simclr", jobs=1, out=tmp_path / "x", protocol=read(TUNED, "simclr"), run_one=lambda *words: {"m": 0.0}
        )


def test_figures_that_cannot_answer_are_not_judged_anew():
    part = read(TUNED, "x")
    results = {arm: {str(s): {"m": 0.3} for s in range(5)} for arm in ("a", "b")}
    found = room.judge(part, results, range(5), strict=False)
    assert found["verdict"] == "not judged"
    assert "constant" in found["conjuncts"][0]["refused"]
    with pytest.raises(ProtocolError, match="constant"):
        room.judge(part, results, range(5))


@pytest.mark.parametrize("slug", [slug for slug in slugs() if catalog.get(slug).state == "done"])
def test_a_committed_record_is_what_its_protocol_says_of_its_figures(slug, tmp_path):
    """The verdicts in the repository belong to the protocols and figures in it."""
    record = room.read_record(slug, ROOT / "results/claims")
    protocol = of_system(slug)
    assert record["protocol"]["sha256"] == protocol.sha256
    for part, made in [(record, protocol), *_variants(record, protocol)]:
        strict = not any("refused" in row for row in part["conjuncts"])
        judged = room.judge(made, part["results"], part["seeds"], strict=strict)
        assert json.loads(json.dumps(judged)) == {key: part[key] for key in judged}
        assert part["claim"] == made.sentence
        assert len(part["seeds"]) >= 5
        assert not any(name.endswith("_best") for name in part["metrics"])
    page = html.unescape(write_claim_report(record, tmp_path / "page.html").read_text())
    assert all(row["says"].partition(":")[0] in page for row in record["conjuncts"])


def _variants(record, protocol):
    """List the variants of a protocol that were run."""
    return [
        (record["variants"][name], made)
        for name, made in protocol.variants.items()
        if name in record.get("variants", {})
    ]


def test_judging_anew_changes_nothing_that_was_measured(tmp_path):
    names = ("isogclr", "cacr", "dcl", "m3col")
    for name in names:
        (tmp_path / f"{name}.json").write_bytes((ROOT / "results/claims" / f"{name}.json").read_bytes())
    before = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    for record in claims.rejudge_all(tmp_path):
        assert record == before[record["slug"]]
    assert all(record["missing"] == [] for record in before.values())
    assert all(record["tuned"] for name, record in before.items() if name != "dcl")
    verdicts = {name: record["verdict"] for name, record in before.items()}
    assert verdicts == {"isogclr": "holds", "cacr": "partly", "dcl": "partly", "m3col": "partly"}


def test_claims_that_lack_something_are_due(tmp_path, capsys):
    assert set(rerun.due(tmp_path)) == set(slugs())
    assert rerun.main(["--list", "--out", str(tmp_path), "dcl"]) == 0
    assert "dcl: 10 seeds, 3 arms" in capsys.readouterr().out
    record = room.read_record("dcl", ROOT / "results/claims")
    sound = record | {"missing": [], "protocol": record["protocol"] | {"ran": of_system("dcl").sha256}}
    (tmp_path / "dcl.json").write_text(json.dumps(sound))
    assert "dcl" not in rerun.due(tmp_path)


def test_ctrl_c_ends_the_claims_that_are_due(monkeypatch, tmp_path, capsys):
    tried = []

    def stopped(slug, **more):
        tried.append(slug)
        raise Interrupted("stopped after 2 of 30 runs")

    monkeypatch.setattr(rerun, "verify", stopped)
    assert rerun.main(["dcl", "cacr", "--out", str(tmp_path)]) == 130
    assert (tried, "stopped after 2 of 30 runs" in capsys.readouterr().err) == (["dcl"], True)


def test_real_arms_differ_by_seed_and_repeat(tmp_path):
    part = of_system("macil-sd")
    part = replace(part, quick={**part.quick, "epochs": 1}, quick_data_options={"train": 16, "test": 6})

    def run(seed):
        found = runner.run_one(
            "macil-sd", part.data, part.options(seed, quick=True), part.settings("mil", quick=True), seed, False
        )
        return {name: value for name, value in found.items() if name != "seconds"}

    first = run(1)
    assert first == run(1)
    assert 0 < first["av_ap"] < 1
    assert first["data"] != run(2)["data"]


def test_a_set_read_from_the_cache_has_the_digest_of_the_set_that_was_built(tmp_path):
    built = np.arange(12.0).reshape(3, 4)
    np.save(tmp_path / "rows.npy", built)
    read = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert runner.digest_of(SimpleNamespace(train=built)) == runner.digest_of(SimpleNamespace(train=read))
    assert runner.digest_of(SimpleNamespace(train=built)) != runner.digest_of(SimpleNamespace(train=built + 1))
