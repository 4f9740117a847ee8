"""A long loop shows a bar on a terminal, and one line elsewhere; a short one shows nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from counterpoint import waiting
from counterpoint.waiting import patient_track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look at the clock take a second."""
    ticks = iter(range(1000))
    monkeypatch.setattr(waiting.time, "monotonic", lambda: float(next(ticks)))


def test_a_short_loop_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(patient_track("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_where_there_is_no_terminal_one_line_tells_how_far_a_long_loop_is(
    clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(patient_track(range(40), "reading")) == list(range(40))
    assert capsys.readouterr() == ("", "reading: 9 of 40 after 10 seconds\n")
    assert list(patient_track(iter(range(20)), "reading")) == list(range(20))
    assert capsys.readouterr().err == "reading: 9 after 10 seconds\n"


def test_a_terminal_has_a_bar_which_ends_with_the_loop(
    clock: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    found = patient_track(range(40), "reading")
    assert next(found) == 0
    assert capsys.readouterr().err == ""
    list(found)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading" in err


def test_of_several_processes_the_first_one_shows_it(
    clock: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert list(patient_track(range(40), "reading")) == list(range(40))
    assert capsys.readouterr().err == ""


def test_steps_are_taken_when_they_are_due() -> None:
    taken = []

    def steps() -> Iterator[int]:
        for n in range(3):
            taken.append(n)
            yield n

    found = patient_track(steps(), "reading", 3)
    assert next(found) == 0
    assert taken == [0]
