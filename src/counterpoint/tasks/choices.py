"""Compare scores of possible answers: the share of choices that they take right, and what they give to the true answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from counterpoint.engine.survey import Survey

SHOWN = 6  # choices on the page
Scores = Callable[[dict[str, Any]], Tensor]


def choice_accuracy(survey: Survey, split: str, scores: Scores) -> float | None:
    """Return the share of a split's choices that scores take right; None without any choice.

    Args:
        survey: access to chats.
        split: name of the split.
        scores: scores of a batch's options, one for each.
    """
    evaluator = survey.evaluator(split)
    for rows in survey.in_batches(split):
        batch = survey.batch(split, rows)
        if "options" in batch:
            evaluator.choose(batch, scores(batch["options"]))
    found: float | None = evaluator.compute().get("choice_accuracy")
    return found


def truth_figure(survey: Survey, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Show the share that several scores give the true answer of some test choices.

    A chat with a rejected answer serves as a choice of two. The figure is empty without both.

    Args:
        survey: access to chats.
        scores: scores of a batch's options by the name of their method.
    """
    split = survey.split("test")
    chats = [chat for chat in split.chats if chat.choices]
    if not chats:
        pairs = [chat for chat in split.chats if chat.rejected not in ("", chat.answer)]
        chats = [replace(chat, choices=(chat.answer, chat.rejected), kind="choice") for chat in pairs]
    if not chats:
        return {}
    split = replace(split, chats=chats[:SHOWN])
    rows = range(len(split))
    options = survey.batch(split, rows)["options"]
    shares = {method: score(options) for method, score in scores.items()}
    table = []
    owner = options["owner"].tolist()
    for at, n in enumerate(rows):
        mine = [k for k, row in enumerate(owner) if row == at]
        right = split.chats[n].choices.index(split.chats[n].answer)
        cells = [f"{float(share[mine].softmax(0)[right]):.0%}" for share in shares.values()]
        table.append([split.chats[n].question, split.chats[n].answer, *cells])
    return {
        "Truth by method": {
            "kind": "table",
            "columns": ["question", "true answer", *scores],
            "rows": table,
            "caption": "Share of the true answer among the possible ones, by the scores of each method.",
        }
    }
