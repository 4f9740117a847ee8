"""The claim machinery: intervals, verdicts, records, and verifications that go on where they stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from counterpoint import verify as room
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Claim, Comparison


def claim(**changed):
    base = {
        "sentence": "b beats a",
        "data": "x",
        "setting": {},
        "arms": {"a": {}, "b": {}},
        "baseline": "a",
        "metric": "m",
        "comparisons": (Comparison("b", "a", at_least=0.1),),
    }
    return Claim(**(base | changed))


def test_the_interval_is_the_paired_t_interval():
    values = [0.02, 0.05, -0.01, 0.04, 0.03]
    mean, low, high = room.paired(values)
    assert mean == pytest.approx(0.026)
    # t(0.975; 4) = 2.7764, standard deviation 0.02302, by hand
    half = 2.7764 * 0.0230217 / math.sqrt(5)
    assert (low, high) == (pytest.approx(mean - half, abs=1e-5), pytest.approx(mean + half, abs=1e-5))
    assert math.isnan(room.paired([0.5])[1])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        _, low, high = room.paired(rng.normal(0.3, 1.0, 5))
        hits += low <= 0.3 <= high
    assert 0.935 < hits / 2000 < 0.965


def test_verdicts_read_the_interval():
    assert room.verdict(0.01, 0.2) == "holds"
    assert room.verdict(-0.2, -0.01) == "reversed"
    assert room.verdict(-0.1, 0.2) == "no difference"
    assert room.verdict(math.nan, math.nan).startswith("undecided")


def test_comparisons_are_paired_by_seed():
    results = {"a": {"0": {"m": 0.1}, "1": {"m": 0.9}}, "b": {"0": {"m": 0.3}, "1": {"m": 1.0}}}
    found = room.judge(claim(), results, [0, 1])
    (pair,) = found["comparisons"]
    assert pair["differences"] == pytest.approx([0.2, 0.1])
    assert pair["mean"] == pytest.approx(0.15)
    assert pair["reaches_expected"]
    assert found["verdict"] == pair["verdict"] == "no difference"
    (one,) = room.judge(claim(), results, [0])["comparisons"]
    assert one["low"] is None
    assert one["verdict"].startswith("undecided")


def test_a_comparison_can_have_a_metric_of_its_own_and_count_what_falls_as_gained():
    results = {"a": {"0": {"m": 0.1, "gap": 1.0}}, "b": {"0": {"m": 0.3, "gap": 0.7}}}
    pairs = (Comparison("b", "a", at_least=0.2, metric="gap", lower=True), Comparison("b", "a"))
    gap, m = room.judge(replace(claim(), comparisons=pairs), results, [0])["comparisons"]
    assert gap["differences"] == pytest.approx([0.3])
    assert (gap["metric"], gap["lower"], gap["reaches_expected"]) == ("gap", True, True)
    assert m["differences"] == pytest.approx([0.2])
    assert "lower" not in m


def test_a_run_s_figures_are_the_mean_of_its_last_three_its_best_and_its_last():
    rows = [{"epoch": e, "test/m": v, "train/x": 9.0} for e, v in enumerate([0.1, 0.9, 0.3, 0.4, 0.5])]
    assert room.summarise(rows) == pytest.approx({"m_last3": 0.4, "m_best": 0.9, "m_last": 0.5, "train_x_last": 9.0})


def fake(slug, variant, arm, seed, quick):
    gain = {"mil": 0.0, "mil+contrast": 0.02, "mil+distillation": 0.0, "macil-sd": 0.05}[arm]
    rng = np.random.default_rng([seed, len(arm)])
    value = 0.5 + gain + 0.005 * float(rng.standard_normal())
    return {"av_ap_last3": value, "av_ap_best": value + 0.01, "av_ap_last": value}


def test_a_record_holds_all_it_takes_to_judge_it(tmp_path):
    record = room.verify("macil-sd", seeds=5, jobs=1, out=tmp_path, run_one=fake)
    assert record == json.loads((tmp_path / "macil-sd.json").read_text())
    assert record["verdict"] == "holds"
    assert record["seeds"] == [0, 1, 2, 3, 4]
    assert set(record["results"]["macil-sd"]) == {"0", "1", "2", "3", "4"}
    assert set(record["variants"]) == {"arcade"}
    for key in ("claim", "setting", "arms", "baseline", "metric", "versions", "machine", "notes"):
        assert record[key], key
    assert room.read_record("macil-sd", tmp_path) == record
    with pytest.raises(CounterpointError, match="make one: counterpoint verify symile"):
        room.read_record("symile", tmp_path)
    with pytest.raises(CounterpointError, match="did you mean symile"):
        room.read_record("simile", tmp_path)


def test_an_interrupted_verification_goes_on(tmp_path):
    calls = []

    def stops(slug, variant, arm, seed, quick):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append((variant, arm, seed))
        return fake(slug, variant, arm, seed, quick)

    with pytest.raises(KeyboardInterrupt):
        room.verify("macil-sd", seeds=2, jobs=1, out=tmp_path, run_one=stops)
    assert not (tmp_path / "macil-sd.json").exists()
    again = []

    def counted(*key):
        again.append(key[1:4])
        return fake(*key)

    record = room.verify("macil-sd", seeds=2, jobs=1, out=tmp_path, run_one=counted)
    assert len(again) == 2 * 4 * 2 - 7
    assert not set(again) & set(calls)
    assert record == room.verify(
        "macil-sd", seeds=2, jobs=1, out=tmp_path, run_one=lambda *key: pytest.fail("ran again")
    )
    # More seeds need only the new ones.
    again.clear()
    room.verify("macil-sd", seeds=3, jobs=1, out=tmp_path, run_one=counted)
    assert {seed for _, _, seed in again} == {2}


def test_results_of_another_setting_are_not_used(tmp_path, monkeypatch):
    room.verify("macil-sd", seeds=1, jobs=1, out=tmp_path, variants=False, run_one=fake)
    monkeypatch.setattr(room, "versions", lambda: {"torch": "another"})
    ran = []
    room.verify("macil-sd", seeds=1, jobs=1, out=tmp_path, variants=False, run_one=lambda *k: ran.append(k) or fake(*k))
    assert len(ran) == 4


def test_a_rehearsal_says_that_it_is_one(tmp_path):
    record = room.verify("macil-sd", seeds=2, quick=True, jobs=1, out=tmp_path, variants=False, run_one=fake)
    assert "not evidence" in record["quick"]
    assert [p.name for p in tmp_path.glob("*.json")] == ["macil-sd-quick.json"]


def test_real_arms_in_processes_of_their_own(tmp_path, monkeypatch):
    from counterpoint import catalog

    system = catalog.load_system("macil-sd")
    small = {"epochs": 1}
    monkeypatch.setitem(system.claim.quick, "epochs", 1)
    monkeypatch.setitem(system.claim.quick_data_options, "train", 16)
    monkeypatch.setitem(system.claim.quick_data_options, "test", 6)
    first = room.experiment(system, system.claim, "mil", 1, quick=True)
    assert first == room.experiment(system, system.claim, "mil", 1, quick=True)
    assert 0 < first["av_ap_last"] < 1
    assert first != room.experiment(system, system.claim, "mil", 2, quick=True)
    assert system.claim.quick["epochs"] == small["epochs"]


def test_the_committed_record_is_the_fixed_setting_s():
    """The verdict in the repository belongs to the setting in the code, on at least five seeds."""
    from dataclasses import asdict
    from pathlib import Path

    from counterpoint import catalog

    system = catalog.load_system("macil-sd")
    record = room.read_record("macil-sd", Path(__file__).parents[1] / "results/claims")
    for part, made in ((record, system.claim), (record["variants"]["arcade"], system.claim.variants["arcade"])):
        assert part["setting"] == made.setting
        assert part["arms"] == made.arms
        assert part["claim"] == made.sentence
        assert len(part["seeds"]) >= 5
        judged = room.judge(made, part["results"], part["seeds"])
        assert json.loads(json.dumps(judged)) == {k: part[k] for k in judged}
        assert asdict(made)["baseline"] == part["baseline"]
