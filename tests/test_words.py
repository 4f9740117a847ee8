"""Counted nouns, and that messages count with them."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

import counterpoint
from counterpoint.words import counted


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (1, ("epoch",), "1 epoch"),
        (0, ("seed",), "0 seeds"),
        (2, ("history",), "2 histories"),
        (2, ("day",), "2 days"),
        (3, ("box",), "3 boxes"),
        (3, ("batch",), "3 batches"),
        (3, ("epoch",), "3 epochs"),
        (1, ("row has", "rows have"), "1 row has"),
        (2, ("row has", "rows have"), "2 rows have"),
    ],
)
def test_a_noun_is_in_the_number_of_its_count(number, words, expected):
    assert counted(number, *words) == expected


def test_messages_count_lengths_by_the_helper():
    """A length before a plural would read "1 items". Losses and shapes of core are no messages to a user."""
    root = Path(counterpoint.__file__).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] in ("core", "losses", "views", "functional.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for part, after in itertools.pairwise(parts):
                length = (
                    isinstance(part, ast.FormattedValue)
                    and isinstance(part.value, ast.Call)
                    and isinstance(part.value.func, ast.Name)
                    and part.value.func.id == "len"
                )
                text = after.value if isinstance(after, ast.Constant) else ""
                if length and re.match(r" (items|rows|seeds|epochs|runs|files|pictures|images|videos|trials)\b", text):
                    found.append(f"{file.relative_to(root)}:{part.lineno}: {text[:30]}")
    assert found == []
