"""`benchmarks/check.py` finds the ratios of every record, and those that fell."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("bench_check", ROOT / "benchmarks" / "check.py")
assert spec is not None
assert spec.loader is not None
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)

RECORDS = sorted((ROOT / "results" / "bench").glob("*.json"))
WITHOUT = {"search", "indices"}  # compare indices of other libraries with each other


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_record_has_ratios_and_a_fall_of_a_fifth_is_found(path: Path) -> None:
    record = json.loads(path.read_text())
    found = dict(check.ratios(record))
    assert bool(found) != (path.stem in WITHOUT)
    assert check.fallen(record, record) == []
    slower = json.loads(path.read_text(), parse_float=lambda text: 0.8 * float(text))
    assert len(check.fallen(record, slower)) >= len(found) / 2


def test_a_tenth_is_allowed_and_new_cases_are_no_fall() -> None:
    before = {"rows": [{"n": 4, "ratio": 2.0}, {"n": 8, "ratio": 3.0}]}
    now = {"rows": [{"n": 8, "ratio": 2.7}, {"n": 4, "ratio": 1.6}, {"n": 16, "ratio": 0.1}]}
    assert check.fallen(before, now) == [("/rows[n=4]/ratio", 2.0, 1.6)]
