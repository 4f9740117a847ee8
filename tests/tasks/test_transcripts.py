"""Word errors and exact matches of transcripts."""

from __future__ import annotations

import pytest

from counterpoint.tasks.measures.transcripts import transcript_figures, word_errors


@pytest.mark.parametrize(
    ("reference", "found", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "", 3),
        ("", "a b", 2),
        ("a b c", "b c a", 2),
        ("a b", "a x b", 1),
        ("a b", "b a", 2),
    ],
)
def test_word_errors_count_substitutions_deletions_and_insertions(reference, found, errors):
    assert word_errors(reference.split(), found.split()) == errors
    assert word_errors(found.split(), reference.split()) == errors


def test_errors_are_over_the_words_of_all_references():
    found = transcript_figures(["a b c", "d", ""], ["a b", "d", ""])
    assert found == {"word_error": 1 / 4, "exact_match": 2 / 3}
    assert transcript_figures([], []) == {}
    assert transcript_figures([""], ["a"]) == {}
