"""Checks of settings: words of a `Literal`, numbers in their ranges."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from counterpoint.engine.settings import CheckedSettings, fitted
from counterpoint.errors import CounterpointError
from counterpoint.systems.alignment.macil_sd import MacilSDConfig
from counterpoint.systems.classics.simclr import SimCLRConfig
from counterpoint.systems.images.mcl import MCLConfig


@dataclass
class Some(CheckedSettings):
    way: Literal["on", "off"] = "on"
    level: Literal[1, 2] = 1
    several: tuple[Literal["a", "b"], ...] = ()
    rate: float = 1.0
    share: float = 0.5
    free: str = "any"
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.need_sound_values()
        self.need_positive("rate")
        self.need_below_one("share")


def test_a_word_outside_the_annotation_is_named_with_the_known_ones():
    assert Some(free="thing", level=2).way == "on"
    with pytest.raises(CounterpointError, match="unknown way 'of'; did you mean off"):
        Some(way="of")
    with pytest.raises(CounterpointError, match="unknown level '3'"):
        Some(level=3)
    assert Some(several=("a", "b", "a")).several
    with pytest.raises(CounterpointError, match="unknown several 'c'"):
        Some(several=("a", "c"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rate": 0.0}, "rate must be > 0, got 0.0"),
        ({"rate": float("nan")}, "rate must be finite, got nan"),
        ({"rate": float("inf")}, "rate must be finite, got inf"),
        ({"share": 1.0}, r"share must lie in 0\.\.1, 1 not included, got 1.0"),
        ({"share": -0.1}, r"share must lie in 0\.\.1, 1 not included"),
    ],
)
def test_a_number_outside_its_range_is_named(changed, said):
    assert Some(rate=1e9, share=0.0)
    with pytest.raises(CounterpointError, match=said):
        Some(**changed)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [(SimCLRConfig, {"schedule": "day"}), (MacilSDConfig, {"feature_order": "last"}), (MCLConfig, {"restrict": "all"})],
)
def test_systems_bags_and_additions_check_their_words(kind, changed):
    (name,) = changed
    with pytest.raises(CounterpointError, match=f"unknown {name}"):
        kind(**changed)


@dataclass
class Typed:
    count: int = 1
    rate: float | None = None
    flag: bool = False
    name: str = ""
    layers: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    level: Literal[1, 2] = 1


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("count", 100.0, 100),  # YAML reads 1e2 as a float
        ("rate", 1, 1),
        ("rate", None, None),
        ("flag", True, True),
        ("name", "x", "x"),
        ("layers", [1, 2.0], (1, 2)),
        ("layers", [], ()),
        ("pair", [3, "b"], (3, "b")),
        ("level", 3, 3),  # words of a Literal are checked elsewhere
    ],
)
def test_a_value_by_name_becomes_what_the_annotation_says(name, value, kept):
    found = fitted(Typed, name, value)
    assert (found, type(found)) == (kept, type(kept))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("count", 1.5, "count takes a whole number, got 1.5"),
        ("count", "three", "count takes a whole number, got 'three'"),
        ("count", True, "count takes a whole number, got True"),
        ("count", None, "count takes a whole number, got None"),
        ("rate", "fast", "rate takes a number or none, got 'fast'"),
        ("flag", 1, "flag takes true or false, got 1"),
        ("name", 3, "name takes a word, got 3"),
        ("layers", 3, "layers takes a list of whole numbers, got 3"),
        ("layers", [1, None], "layers takes a list of whole numbers"),
        ("pair", [1], "pair takes a list of 2"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(name, value, said):
    with pytest.raises(CounterpointError, match=said):
        fitted(Typed(), name, value)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "temperature"])
def test_numbers_that_are_not_finite_are_refused_by_one_rule(name, value):
    from counterpoint.experiment import Experiment

    with pytest.raises(CounterpointError, match=f"{name} must be finite"):
        Experiment.resolve("simclr", overrides={name: value})


def test_a_negative_rate_is_refused():
    from counterpoint.experiment import Experiment

    with pytest.raises(CounterpointError, match="lr must be > 0, got -1"):
        Experiment.resolve("simclr", overrides={"lr": -1.0})


# Settings that may be negative, or whose limits are known later: adapters with the networks, layers with the heads.
SIGNED = {"lora", "depth", "threshold", "omega", "clamp", "epoch_mean", "bias", "log_scale", "margin"}


def test_no_system_takes_a_negative_number_where_it_has_no_meaning():
    from counterpoint import catalog

    taken = set()
    for slug, row in catalog.entries().items():
        if not row.built:
            continue
        config = catalog.load_system(slug).config()
        for setting in dataclasses.fields(config):
            value = getattr(config, setting.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or setting.name in SIGNED:
                continue
            with contextlib.suppress(CounterpointError):
                dataclasses.replace(config, **{setting.name: type(value)(-1.5)})
                taken.add((slug, setting.name))
    assert not taken
