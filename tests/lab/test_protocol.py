"""Protocols: what is read, and every way in which one is refused."""

from __future__ import annotations

import dataclasses

import pytest

from counterpoint import catalog
from counterpoint.data import SOURCES
from counterpoint.errors import CounterpointError, ProtocolError
from counterpoint.lab import protocol as room

SOUND = """
sentence = "b beats a."
kind = "outcome"
data = "digits?train=600"
seeds = 5

[setting]
epochs = 2
[arms.a]
[arms.b]
temperature = 0.2

[metrics.m]
unit = "accuracy"
bounds = [0.0, 1.0]

[[conjuncts]]
says = "b beats a"
arm = "b"
baseline = "a"
metric = "m"
margin = 0.1

[tuning]
metric = "valid/m"
seeds = [100, 101]
[tuning.grid]
lr = [0.1, 0.2]
wd = [0.0, 1.0, 2.0]

[variants.other]
data = "cifar10"
setting = {epochs = 3}
"""


def test_a_sound_protocol_is_read():
    found = room.read(SOUND, "x")
    assert (found.kind, found.seeds, list(found.arms)) == ("outcome", 5, ["a", "b"])
    assert found.settings("b", {"lr": 0.2}) == {"epochs": 2, "lr": 0.2, "temperature": 0.2}
    assert found.options(3) == {"seed": 3}
    assert len(found.tuning.points()) == 6
    assert found.tuning.metric == "m"
    other = found.variants["other"]
    assert (other.data, other.setting, other.sentence) == ("cifar10", {"epochs": 3}, "b beats a.")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds = 5", "seeds = 4", "needs 5 to 100 seeds"),
        ("seeds = 5", "seed = 5", "unknown field 'seed'"),
        ("seeds = 5", "data_seeded = false", "drawn again for each seed"),
        ("seeds = 5", "minutes = 600", "budget"),
        ("[tuning]\n", "[tuning]\nother = 1\n", r"unknown field 'other' in \[tuning\]"),
        ('unit = "accuracy"', 'units = "accuracy"', "unknown field 'units'"),
        ("margin = 0.1", "margins = 0.1", "unknown field 'margins'"),
        ('kind = "outcome"', 'kind = "fact"', "outcome or mechanism or identity"),
        ("margin = 0.1", "margin = -0.1", "non-inferiority"),
        ("margin = 0.1", 'test = "equivalence"', "margin above 0"),
        ("margin = 0.1", 'direction = "up"', "higher or lower"),
        ("margin = 0.1", 'test = "t"', "superiority or non-inferiority"),
        ('metric = "m"', 'metric = "m_best"', "chosen on the test split"),
        ('metric = "m"', 'metric = "n"', r"lacks its table \[metrics.n\]"),
        ("[metrics.m]", "[metrics.m_best]", "chosen on the test split"),
        ("[metrics.m]", "[metrics.valid_m]", "of the valid split"),
        ("bounds = [0.0, 1.0]", "bounds = [1.0, 0.0]", "the lower, then the upper bound"),
        ("bounds = [0.0, 1.0]", 'only_in = ["b"]', "has another meaning in arm 'a'"),
        ("bounds = [0.0, 1.0]", 'constant_in = ["a"]', "constant by construction"),
        ("bounds = [0.0, 1.0]", 'only_in = ["c"]', "an arm that is not there: 'c'"),
        ('baseline = "a"', 'baseline = "c"', "an arm that is not there: 'c'"),
        ('baseline = "a"', 'baseline = "b"', "with itself"),
        ('baseline = "a"', "", "either a baseline or a value"),
        ('baseline = "a"', 'baseline = "a"\nvalue = 0.5', "either a baseline or a value"),
        ("seeds = [100, 101]", "seeds = [3]", "pilot seed 3 is a seed of the claim"),
        ("seeds = [100, 101]", "seeds = [50]", "pilots are 100 and up"),
        ("seeds = [100, 101]", "seeds = []", "one or more different pilot seeds"),
        ("[tuning.grid]", "[tuning.arms.b]\nlr = [0.1]\n[tuning.grid]", "grid differs between arms"),
        ("temperature = 0.2", "lr = 0.2", "grid differs between arms: arm 'b' fixes lr"),
        ('metric = "valid/m"', 'metric = "test/m"', "on the test split"),
        ("lr = [0.1, 0.2]", "lr = 0.1", "a list of values"),
        ('data = "digits?train=600"', "", "lacks 'data'"),
        ('sentence = "b beats a."', "sentence = 3", "wrong type"),
        ('sentence = "b beats a."', "sentence = ", "not valid TOML"),
    ],
)
def test_an_unsound_protocol_is_refused_by_name(old, new, said):
    assert old in SOUND
    with pytest.raises(ProtocolError, match=said) as caught:
        room.read(SOUND.replace(old, new, 1), "x")
    assert str(caught.value).startswith("claim of x")


def test_a_protocol_without_a_conjunct_is_refused():
    before, _, after = SOUND.partition("[[conjuncts]]")
    with pytest.raises(ProtocolError, match="no conjunct"):
        room.read(before + after[after.index("[tuning]") :], "x")


def figures(a, b):
    return {
        "a": {str(s): {"m": value} for s, value in enumerate(a)},
        "b": {str(s): {"m": value} for s, value in enumerate(b)},
    }


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([0.3] * 5, [0.5, 0.6, 0.5, 0.6, 0.5], "baseline 'a' is constant: 0.3"),
        ([0.3, 0.3 + 1e-9, 0.3, 0.3, 0.3], [0.5, 0.6, 0.5, 0.6, 0.5], "constant"),
        ([0.995, 1.0, 0.99, 1.0, 1.0], [1.0, 0.99, 1.0, 0.995, 1.0], "ceiling"),
        ([0.005, 0.0, 0.01, 0.0, 0.0], [0.0, 0.01, 0.0, 0.005, 0.0], "floor"),
        ([0.3, 0.4, float("nan"), 0.3, 0.4], [0.5] * 5, "not a finite number in arm 'a'"),
    ],
)
def test_figures_that_cannot_answer_are_refused_by_name(a, b, said):
    with pytest.raises(ProtocolError, match=said):
        room.check_figures(room.read(SOUND, "x"), figures(a, b), range(5))


def test_a_metric_that_an_arm_lacks_is_refused():
    results = figures([0.3, 0.4, 0.3, 0.4, 0.3], [0.5, 0.6, 0.5, 0.6, 0.5])
    room.check_figures(room.read(SOUND, "x"), results, range(5))
    del results["b"]["2"]["m"]
    with pytest.raises(ProtocolError, match="'m' is missing in arm 'b'"):
        room.check_figures(room.read(SOUND, "x"), results, range(5))


def test_an_arm_alone_may_reach_the_bound():
    text = SOUND.replace('baseline = "a"', "value = 0.5")
    room.check_figures(room.read(text, "x"), figures([0.0] * 5, [1.0] * 5), range(5))


def test_differences_count_gains():
    text = SOUND.replace("margin = 0.1", 'direction = "lower"\nbeyond = ["b", "a"]')
    (one,) = room.read(text, "x").conjuncts
    results = {"a": {"0": {"m": 0.5}}, "b": {"0": {"m": 0.2}}}
    assert one.differences(results, [0]) == pytest.approx([0.3 - 0.3])
    assert (one.judged, one.against) == ("b - a", "b - a")
    plain = dataclasses.replace(one, beyond=None)
    assert plain.differences(results, [0]) == pytest.approx([0.3])
    value = dataclasses.replace(plain, baseline=None, value=0.1, direction="higher")
    assert value.differences(results, [0]) == pytest.approx([0.1])
    assert value.against == "0.1"


@pytest.mark.parametrize("slug", room.slugs())
def test_every_protocol_of_the_package_is_sound(slug):
    found = room.of_system(slug)
    system = catalog.load_system(slug)
    assert found.sentence == catalog.get(slug).claim
    assert len(found.sha256) == 64
    for part in (found, *found.variants.values()):
        assert part.data.partition("?")[0] in SOURCES
        for arm in part.arms:
            point = part.tuning.points()[0] if part.tuning else None
            system.config(**part.settings(arm, point))
            system.config(**part.settings(arm, quick=True))
        for metric in part.metrics:
            assert not metric.endswith(("_last", "_last3"))


def test_systems_without_a_claim_raise_an_error(monkeypatch):
    assert len(room.slugs()) == 63
    with pytest.raises(CounterpointError, match="clip is a baseline without its own claim"):
        room.of_system("clip")
    monkeypatch.setitem(catalog.entries(), "clip", dataclasses.replace(catalog.get("clip"), state="planned"))
    with pytest.raises(CounterpointError, match="clip is planned"):
        room.of_system("clip")
    with pytest.raises(CounterpointError, match="did you mean"):
        room.of_system("simile")


def test_a_file_s_hash_is_the_protocol_s(tmp_path):
    (tmp_path / "y.toml").write_text(SOUND)
    first = room.of_file(tmp_path / "y.toml")
    (tmp_path / "y.toml").write_text(SOUND + "# changed\n")
    assert first.slug == "y"
    assert first.sha256 != room.of_file(tmp_path / "y.toml").sha256
