"""Comparisons: pairing, records, what cannot be compared, and that an interrupted one goes on."""

from __future__ import annotations

import json

import pytest

from counterpoint import cli
from counterpoint.errors import CounterpointError
from counterpoint.lab import compare, runner
from counterpoint.systems.classics.simclr import SimCLR


@pytest.fixture
def fake(monkeypatch):
    calls = []

    def one(slug, data, options, settings, seed, recipe, metric=None):
        calls.append((slug, seed))
        return {"knn_accuracy": 0.5 + 0.01 * seed + 0.1 * (slug == "moco-v2"), "seconds": 60.0}

    monkeypatch.setattr(runner, "run_one", one)
    return calls


def test_differences_are_paired_by_seed(fake, tmp_path):
    record = compare.compare(["simclr", "moco-v2"], "digits", seeds=3, jobs=1, out=tmp_path)
    (pair,) = record["comparisons"]
    assert pair["differences"] == pytest.approx([0.1] * 3)
    assert pair["verdict"] == "better"
    assert record["setting"]["epochs"] == record["arms"].get("simclr", {}).get("epochs", record["setting"]["epochs"])
    assert set(record["arms"]["simclr"]) & set(record["setting"]) == set()
    assert json.loads((tmp_path / f"{record['name']}.json").read_text())["results"] == record["results"]
    assert sorted(fake) == sorted((slug, seed) for slug in ("simclr", "moco-v2") for seed in range(3))


def test_what_is_done_is_not_done_again_unless_settings_change(fake, tmp_path):
    compare.compare(["simclr", "moco-v2"], "digits", seeds=2, jobs=1, out=tmp_path)
    compare.compare(["simclr", "moco-v2"], "digits", seeds=3, jobs=1, out=tmp_path)
    assert len(fake) == 6
    compare.compare(["simclr", "moco-v2"], "digits", seeds=2, jobs=1, out=tmp_path, overrides={"epochs": 3})
    assert len(fake) == 10


def test_settings_that_differ_are_reported(fake, tmp_path, monkeypatch):
    from dataclasses import replace

    from counterpoint.systems.classics import moco

    monkeypatch.setattr(moco, "V2", replace(moco.V2, recipe=moco.V2.recipe | {"epochs": 99}))
    record = compare.compare(["simclr", "moco-v2"], "digits", seeds=2, jobs=1, out=tmp_path)
    assert any("Not the same epochs" in note and "moco-v2 99" in note for note in record["notes"])


@pytest.mark.usefixtures("drawn")
def test_the_command_prints_a_table_and_writes_a_page(fake, tmp_path, capsys):
    words = f"compare simclr moco-v2 --data digits --seeds 2 --jobs 1 --out {tmp_path}".split()
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "against simclr" in out
    assert "+0.1000" in out
    (page,) = tmp_path.glob("*.html")
    assert "counterpoint compare simclr moco-v2 --data digits" in page.read_text()


@pytest.mark.parametrize(
    ("slugs", "options", "said"),
    [
        (["simclr"], {}, "at least two different"),
        (["simclr", "simclr"], {}, "at least two different"),
        (["simclr", "clip"], {}, "different headline metrics"),
        (["simclr", "moco-v3"], {}, "did you mean"),
        (["simclr", "moco-v2"], {"seeds": 0}, "at least 1"),
        (["simclr", "moco-v2"], {"metric": "accuracy"}, "all have: knn_accuracy"),
        (["simclr", "moco-v2"], {"overrides": {"depth": 3}}, "no setting depth"),
    ],
)
def test_runs_that_cannot_be_compared_raise_an_error(fake, tmp_path, slugs, options, said):
    with pytest.raises(CounterpointError, match=said):
        compare.compare(slugs, "digits", out=tmp_path, **({"seeds": 1, "jobs": 1} | options))


def test_an_effect_that_few_more_seeds_would_show_is_undecided(tmp_path, monkeypatch):
    gains = {"moco-v2": [0.1, -0.02, 0.09], "byol": [0.1, -0.1, 0.001]}

    def one(slug, data, options, settings, seed, recipe):
        return {"knn_accuracy": 0.5 + gains.get(slug, [0, 0, 0])[seed], "seconds": 60.0}

    monkeypatch.setattr(runner, "run_one", one)
    record = compare.compare(["simclr", "moco-v2", "byol"], "digits", seeds=3, jobs=1, out=tmp_path)
    clear, none = (pair["verdict"] for pair in record["comparisons"])
    assert clear.startswith("undecided: an effect of this size needs about ")
    assert none == "no difference"


def test_comparisons_are_judged_as_a_family(tmp_path, monkeypatch):
    """A difference that one comparison alone would show is not shown beside another."""
    gains = {"moco-v2": [0.05, 0.02, 0.06], "byol": [0.001, -0.002, 0.001]}

    def one(slug, data, options, settings, seed, recipe):
        return {"knn_accuracy": 0.5 + gains.get(slug, [0, 0, 0])[seed]}

    monkeypatch.setattr(runner, "run_one", one)
    alone = compare.compare(["simclr", "moco-v2"], "digits", seeds=3, jobs=1, out=tmp_path)
    both = compare.compare(["simclr", "moco-v2", "byol"], "digits", seeds=3, jobs=1, out=tmp_path)
    single, paired = alone["comparisons"][0], both["comparisons"][0]
    assert single["low"] > paired["low"]
    assert "97.5 %" in paired["interval"]
    assert paired["detectable"] > single["detectable"] > 0


def test_the_page_repeats_every_option(fake, tmp_path):
    words = "compare simclr moco-v2 --data digits --seeds 2 --jobs 1 --epochs 1 --batch-size 64 --metric knn_accuracy"
    assert cli.main([*words.split(), "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*.html")
    assert "--seeds 2 --epochs 1 --batch-size 64 --metric knn_accuracy" in page.read_text()


def test_the_page_repeats_settings_as_the_command_takes_them(fake, tmp_path):
    words = "compare simclr moco-v2 --data digits --seeds 1 --jobs 1 --set temperature=0.2 encoder=conv-s ring=false"
    assert cli.main([*words.split(), "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*.html")
    assert "--seeds 1 --set temperature=0.2 encoder=conv-s ring=false" in page.read_text()


def test_pictures_with_masks_are_compared_by_their_cells(tmp_path, monkeypatch):
    """No class of such pictures is known, so there is no nearest-neighbour accuracy."""
    monkeypatch.setattr(
        runner, "run_one", lambda slug, *rest: {"correspondence": 0.4 + 0.1 * (slug == "pixpro"), "alignment": 0.1}
    )
    record = compare.compare(["byol", "pixpro"], "shapes", seeds=2, jobs=1, out=tmp_path)
    assert record["metric"] == "correspondence"
    monkeypatch.setattr(runner, "run_one", lambda *rest: {"alignment": 0.1})
    with pytest.raises(CounterpointError, match="not every system has the metric 'knn_accuracy'"):
        compare.compare(["byol", "simclr"], "shapes", seeds=2, jobs=1, out=tmp_path)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("knn_acuracy", "unknown metric 'knn_acuracy'; did you mean .*knn_accuracy.* Known: .*train_loss"),
        ("nosuch", "unknown metric 'nosuch'; known: .*alignment"),
        ("linear_accuracy", ""),  # computed once, at the end
    ],
)
def test_a_metric_that_no_run_has_ends_the_comparison_after_one_epoch(tmp_path, monkeypatch, metric, said):
    count, before = 0, SimCLR.end_epoch

    def counted(self, epoch):
        nonlocal count
        count += 1
        before(self, epoch)

    monkeypatch.setattr(SimCLR, "end_epoch", counted)
    given = {"encoder": "mlp-s", "epochs": 2, "batch_size": 32, "evaluate_every": 1}
    words = {"seeds": 1, "jobs": 1, "out": tmp_path, "metric": metric, "overrides": given}
    if said:
        with pytest.raises(CounterpointError, match=said):
            compare.compare(["simclr", "dcl"], "digits?size=8&train=64", **words)
    else:
        assert compare.compare(["simclr", "dcl"], "digits?size=8&train=64", **words)["metric"] == metric
    assert count == (1 if said else 2 * 2)


def test_one_teacher_serves_all_students_and_others_leave_its_setting_out(tmp_path):
    seen = {}

    def run_one(slug, data, options, overrides, seed, *more):
        seen[slug] = overrides
        return {"accuracy": 0.5 + seed / 10, "seconds": 1.0}

    given = {"kd_weight": 0.5, "epochs": 3}
    compare.compare(
        ["kd", "supcon"], "digits", seeds=2, jobs=1, out=tmp_path, metric="accuracy", overrides=given, run_one=run_one
    )
    assert seen == {"kd": given, "supcon": {"epochs": 3}}


DOMAINS = {"digit-domains?unseen=plain": 0.9, "digit-domains?unseen=inverted": 0.5}


@pytest.fixture
def two_domains(monkeypatch):
    from types import SimpleNamespace

    calls = []

    def one(slug, data, options, settings, seed, recipe):
        calls.append((slug, data, seed))
        found = DOMAINS[data] + 0.1 * seed + 0.01 * (slug == "moco-v2") * (1 + (data.endswith("plain")))
        return {"unseen_knn_accuracy": found, "knn_accuracy": 1.0, "seconds": 60.0}

    monkeypatch.setattr(runner, "run_one", one)
    monkeypatch.setattr(compare.sources, "load", lambda *_, **__: SimpleNamespace(domains=("plain", "inverted")))
    return calls


def test_each_domain_is_left_out_and_a_seed_is_the_mean_over_domains(two_domains, tmp_path, capsys):
    words = f"compare simclr moco-v2 --data digit-domains --seeds 2 --jobs 1 --out {tmp_path} --leave-one-domain-out"
    assert cli.main(words.split()) == 0
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["metric"] == "unseen_knn_accuracy"
    assert [record["results"]["simclr"][s]["unseen_knn_accuracy"] for s in "01"] == pytest.approx([0.7, 0.8])
    assert record["comparisons"][0]["differences"] == pytest.approx([0.015, 0.015])
    assert record["domains"]["plain"]["moco-v2"] == pytest.approx({"0": 0.92, "1": 1.02})
    assert record["results"]["simclr"]["0"]["seconds"] == 120.0
    assert len(two_domains) == 8
    shown = capsys.readouterr().out
    assert "inverted" in shown
    page = next(tmp_path.glob("*.html")).read_text()
    assert "Every domain" in page
    assert "--leave-one-domain-out" in page


def test_a_domain_that_is_new_leaves_no_run_of_another_in_its_place(two_domains, tmp_path, monkeypatch):
    from types import SimpleNamespace

    given = {"seeds": 1, "jobs": 1, "out": tmp_path, "leave_one_domain_out": True}
    compare.compare(["simclr", "moco-v2"], "digit-domains", **given)
    monkeypatch.setitem(DOMAINS, "digit-domains?unseen=added", 0.1)
    found = SimpleNamespace(domains=("added", "plain", "inverted"))
    monkeypatch.setattr(compare.sources, "load", lambda *_, **__: found)
    record = compare.compare(["simclr", "moco-v2"], "digit-domains", **given)
    assert {name: runs["simclr"]["0"] for name, runs in record["domains"].items()} == {
        "added": 0.1,
        "plain": 0.9,
        "inverted": 0.5,
    }


@pytest.mark.parametrize(
    ("data", "said"),
    [("digits", "at least two domains; digits has 0"), ("digit-domains?unseen=plain", "take unseen=... out")],
)
def test_data_without_domains_to_leave_out_are_refused(fake, tmp_path, data, said):
    with pytest.raises(CounterpointError, match=said.replace(".", r"\.")):
        compare.compare(["simclr", "moco-v2"], data, out=tmp_path, leave_one_domain_out=True)
    assert not fake
