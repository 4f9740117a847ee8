"""Scenes that are rendered in other processes: a bar on a terminal, a line elsewhere."""

from __future__ import annotations

import pytest

from counterpoint.data.worlds.workers import in_processes


@pytest.mark.parametrize(
    ("jobs", "said"), [(3, ""), (41, "drawing: 41 of them, which may take minutes; the cache keeps them\n")]
)
def test_where_there_is_no_terminal_a_line_announces_many_jobs(capsys, jobs, said):
    assert in_processes(abs, [(-n,) for n in range(jobs)], "drawing") == list(range(jobs))
    assert capsys.readouterr().err == said
