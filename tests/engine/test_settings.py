"""Checks of settings: words of a `Literal`, numbers in their ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from counterpoint.engine.settings import CheckedSettings
from counterpoint.errors import CounterpointError
from counterpoint.systems.alignment.macil_sd import MacilSDConfig
from counterpoint.systems.classics.simclr import SimCLRConfig
from counterpoint.systems.images.mcl import MCLConfig


@dataclass
class Some(CheckedSettings):
    way: Literal["on", "off"] = "on"
    level: Literal[1, 2] = 1
    free: str = "any"
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.need_known_words()


def test_a_word_outside_the_annotation_is_named_with_the_known_ones():
    assert Some(free="thing", level=2).way == "on"
    with pytest.raises(CounterpointError, match="unknown way 'of'; did you mean off"):
        Some(way="of")  # type: ignore[arg-type]
    with pytest.raises(CounterpointError, match="unknown level '3'"):
        Some(level=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "changed"),
    [(SimCLRConfig, {"schedule": "day"}), (MacilSDConfig, {"feature_order": "last"}), (MCLConfig, {"restrict": "all"})],
)
def test_systems_bags_and_additions_check_their_words(kind, changed):
    (name,) = changed
    with pytest.raises(CounterpointError, match=f"unknown {name}"):
        kind(**changed)
