"""Measure rounds of feedback: accuracy and gap by round and kind of question, and some difficult items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from counterpoint.data.chats import ChatSplit
from counterpoint.data.shown import captioned
from counterpoint.encoders.decoding import Answer


def accuracy_by_group(split: ChatSplit, said: Mapping[int, Answer]) -> dict[str, float]:
    """Compute the share of answers that equal the reference, for each kind of question; "" where a split names none."""
    right: dict[str, list[bool]] = {}
    for n, answer in sorted(said.items()):
        chat = split.chats[n]
        right.setdefault(chat.group, []).append(answer.text.split() == chat.answer.split())
    return {name: float(np.mean(values)) for name, values in sorted(right.items())}


def smallest_rise(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Compute the smallest change of the mean accuracy on `valid` from a round to the next; None below two rounds.

    >>> smallest_rise([{"accuracy": {"a": 0.5}}, {"accuracy": {"a": 0.75}}, {"accuracy": {"a": 0.5}}])
    -0.25
    """
    means = [float(np.mean(list(one["accuracy"].values()))) for one in records if one.get("accuracy")]
    return min(b - a for a, b in pairwise(means)) if len(means) > 1 else None


def round_figures(records: Sequence[Mapping[str, Any]], shown: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Draw accuracy and gap by round and kind of question, the numbers of each round, and difficult items.

    Args:
        records: what happened in each round.
        shown: function from positions of pictures to the first one as a PNG; "" without one.
    """
    found: dict[str, Any] = {}
    for key, title, told in (
        ("accuracy", "Accuracy by round", "Share of right answers on valid chats, by round and kind of question."),
        ("gaps", "Gap by round", "Mean score of the teacher minus the student's, by the round that it led to."),
    ):
        rounds = [one for one in records if one.get(key)]
        names = sorted({name for one in rounds for name in one[key]})
        if rounds:
            values = [[float(one[key].get(name, np.nan)) for one in rounds] for name in names]
            columns = [f"round {one['round']}" for one in rounds]
            named = [name or "all" for name in names]
            found[title] = {"kind": "matrix", "values": values, "names": named, "columns": columns, "caption": told}
    lines = []
    for one in records:
        left = ", ".join(f"{many} {why}" for why, many in one.get("left_out", {}).items())
        cells = [one.get("difficult", ""), one.get("easy", ""), one.get("off_format", ""), one["new"], left or "none"]
        lines.append([one["round"], *cells, one["items"], one["calls"]])
    if lines:
        columns = ["round", "difficult", "easy", "off the format", "new", "left out", "pool", "teacher's calls"]
        told = "Items of each round. The first learns the seeds; later ones assess the pool, and learn new items, too."
        found["Rounds"] = {"kind": "table", "columns": columns, "rows": lines, "caption": told}
    cells = []
    for one in records:
        for question, pictures, its, own, gap in one.get("shown", ()):
            text = f"before round {one['round']}: {question} teacher: {its} · student: {own} (gap {gap:g})"
            cells.append({"png": shown(pictures), "text": text})
    if cells and all(cell["png"] for cell in cells):
        found["Difficult items"] = captioned(cells, 3, "Items on which the student lost.")
    elif cells:
        lines = [[cell["text"]] for cell in cells]
        told = "Items on which the student lost."
        found["Difficult items"] = {"kind": "table", "columns": ["item"], "rows": lines, "caption": told}
    return found
