"""`tools/prose.py` finds what CONTRIBUTING.md's rules forbid, and the project has none of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("prose", ROOT / "tools" / "prose.py")
assert spec is not None
assert spec.loader is not None
prose = importlib.util.module_from_spec(spec)
sys.modules["prose"] = prose
spec.loader.exec_module(prose)

LONG = (
    "Every one of these many words stands in a single sentence that goes on and on until the reader has lost its verb."
)


@pytest.mark.parametrize(
    ("source", "rules"),
    [
        ('def f():\n    """Which pairs have no place."""\n', ["first-word"]),
        ('def f():\n    """Mask pairs out."""\n', []),
        ('class C:\n    """A row of numbers."""\n', []),
        ('class C:\n    @property\n    def f(self):\n        """The width."""\n', []),
        ('def f():\n    """Return x, put up with bad rows."""\n', ["phrase"]),
        (f'"""{LONG}"""\n', ["long"]),
        ('"""Numbers [n][3] of tokens.\n\n    rows: those [n][dim].\n"""\n', ["link", "link"]),
        ('"""The place `x[n][3]`.\n\n>>> x[0][1]\n"""\n', []),
        (f"x = 1  # {LONG}\n", ["long"]),
        (f'raise ValueError(f"{{x}} {LONG}")\n', ["long"]),
        (
            '"""Two parts of a sentence, each of which has few words; the second one begins after a semicolon, as here."""\n',
            [],
        ),
        ('"""Text.\n\n    loss = ' + "a + " * 30 + 'b\n\nMore text.\n"""\n', []),
    ],
)
def test_each_rule_finds_its_kind_and_nothing_else(tmp_path: Path, source: str, rules: list[str]) -> None:
    path = tmp_path / "file.py"
    path.write_text(source)
    assert [rule for text in prose.texts(path) for rule, _, _ in prose.findings(text)] == rules


def test_findings_name_file_line_and_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text('x = 1\n\n\ndef f():\n    """What it is."""\n')
    monkeypatch.setattr(sys, "argv", ["prose", "a.py"])
    assert prose.main() == 1
    assert "a.py:5: first-word: 'What it is.'" in capsys.readouterr().out
