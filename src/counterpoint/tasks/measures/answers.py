"""Measure decoded answers: questions of yes or no, captions, choices and free answers.

Measures, by the kind of a chat:

    all       answer_loss; `cut`, the share of answers that did not end before the limit
    yes-no    accuracy, precision, recall, f1 of "yes", and yes_share (POPE); accuracy of each group of questions;
              pair_accuracy, where each picture has two questions, the share with two right answers (MME's accuracy+: Fu et al.,
              arXiv 2306.13394)
    caption   chair_s, share of captions that name an absent object; chair_i, share of named objects that are absent;
              object_recall, share of the present objects that are named (CHAIR: Rohrbach et al., arXiv 1809.02156);
              cider, CIDEr-D in 0..10 (`measures/captions.py`), where the chats have reference captions
    choice    choice_accuracy; where questions name several true answers, mc1, mc2 and mc3 (TruthfulQA: Lin et al., arXiv
              2109.07958), by the summed log-probabilities of the answers' tokens
    meta      modality_accuracy and others (`measures/modalities.py`)
    free      exact, share of answers that equal the reference
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.chats import ChatSplit, mentioned, says_yes
from counterpoint.data.images import Indices
from counterpoint.data.shown import captioned, png
from counterpoint.encoders.decoding import Answer
from counterpoint.errors import diverged
from counterpoint.tasks.measures.captions import cider_of
from counterpoint.tasks.measures.modalities import modality_figure, modality_measures

SHOWN = 8  # chats on a run's page


def yes_no_measures(truth: Sequence[bool], said: Sequence[bool]) -> dict[str, float]:
    """Compute POPE's measures of answers to questions of yes or no.

    >>> yes_no_measures([True, True, False, False], [True, False, True, False])["f1"]
    0.5
    """
    right = np.asarray(truth, bool)
    yes = np.asarray(said, bool)
    hits = int((right & yes).sum())
    precision, recall = hits / max(1, int(yes.sum())), hits / max(1, int(right.sum()))
    return {
        "accuracy": float((right == yes).mean()),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_share": float(yes.mean()),
    }


def caption_measures(present: Sequence[Sequence[str]], named: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute CHAIR's measures of captions, and the recall of objects.

    Args:
        present: objects that each picture shows.
        named: objects that each caption names.

    Without any named object chair_i is 0.

    >>> caption_measures([["a", "b"], ["c"]], [["a", "d"], ["c"]])
    {'chair_s': 0.5, 'chair_i': 0.3333333333333333, 'object_recall': 0.6666666666666666}
    """
    absent = [[name for name in words if name not in here] for words, here in zip(named, present, strict=True)]
    found = sum(len(set(words) & set(here)) for words, here in zip(named, present, strict=True))
    return {
        "chair_s": sum(bool(words) for words in absent) / len(absent),
        "chair_i": sum(map(len, absent)) / max(1, sum(map(len, named))),
        "object_recall": found / max(1, sum(len(set(here)) for here in present)),
    }


def truth_measures(best: float, truths: Sequence[float], lies: Sequence[float]) -> tuple[float, float, float]:
    """Compute MC1, MC2 and MC3 of one question.

    Args:
        best: score of the best true answer, a log-probability.
        truths: scores of all true answers.
        lies: scores of the false answers, at least one.

    Returns 1 or 0, whether the best answer is above every false one; the share of the true answers' probability; and the share of
    true answers above every false one.

    >>> truth_measures(0.0, [0.0, -9.0], [-1.0])[::2]
    (1.0, 0.5)
    """
    true, false = np.asarray(truths, float), np.asarray(lies, float)
    highest = max(true.max(), false.max())
    shares = np.exp(true - highest).sum(), np.exp(false - highest).sum()
    return float(best > false.max()), float(shares[0] / sum(shares)), float((true > false.max()).mean())


class ChatEvaluator:
    """Measure the answers of one split."""

    def __init__(self, split: ChatSplit, objects: Mapping[str, tuple[str, ...]]) -> None:
        self.split, self.objects = split, objects
        self.reset()

    def reset(self) -> None:
        self.answers: dict[int, Answer] = {}
        self.losses: list[Tensor] = []
        self.picked: dict[int, int] = {}  # of a choice, the option of the best score
        self.truth: dict[int, tuple[float, float, float]] = {}  # MC1, MC2, MC3 of a choice
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        index = batch["index"].tolist()
        losses = outputs["losses"].double().cpu()
        if not bool(torch.isfinite(losses).all()):
            raise diverged("the losses hold NaN or infinite values")
        self.losses.append(losses)
        self.answers |= dict(zip(index, outputs["answers"], strict=True))
        if "scores" in outputs:
            self.choose(batch, outputs["scores"], outputs.get("sums"))

    def choose(self, batch: dict[str, Any], scores: Tensor, sums: Tensor | None = None) -> None:
        """Take the scores of a batch's options alone; `sums`: those over all tokens, where scores are means."""
        index, owner = batch["index"].tolist(), batch["options"]["owner"].cpu()
        for row in owner.unique().tolist():
            self.picked[index[row]] = int(scores.cpu()[owner == row].argmax())
            chat = self.split.chats[index[row]]
            by = dict(zip(chat.choices, (scores if sums is None else sums).cpu()[owner == row].tolist(), strict=True))
            true = {chat.answer, *chat.truths}
            lies = [score for choice, score in by.items() if choice not in true]
            self.truth[index[row]] = truth_measures(by[chat.answer], [by[choice] for choice in true], lies)

    def take(self, rows: Sequence[int] | Indices, answers: Sequence[Answer]) -> None:
        """Take answers alone, without losses."""
        self.answers |= dict(zip(map(int, rows), answers, strict=True))

    def compute(self, *, final: bool = False) -> dict[str, float]:
        chats = self.split.chats
        found: dict[str, float] = {}
        of: dict[str, list[int]] = {}
        for n in sorted({*self.answers, *self.picked}):
            of.setdefault(chats[n].kind, []).append(n)
        if rows := of.get("yes-no"):
            truth, said = [says_yes(chats[n].answer) for n in rows], [says_yes(self.answers[n].text) for n in rows]
            found |= yes_no_measures(truth, said)
            for group in sorted({chats[n].group for n in rows} - {""}):
                right = [a == b for n, a, b in zip(rows, truth, said, strict=True) if chats[n].group == group]
                found[f"{group}_accuracy"] = float(np.mean(right))
            found |= self._pairs(rows, truth, said)
        if rows := of.get("caption"):
            named = [mentioned(self.answers[n].text, self.objects) for n in rows]
            found |= caption_measures([chats[n].objects for n in rows], named)
            found |= cider_of(self.split, {n: self.answers[n].text for n in rows})
        if rows := [n for n in of.get("choice", ()) if n in self.picked]:
            right = [chats[n].choices[self.picked[n]] in (chats[n].answer, *chats[n].truths) for n in rows]
            found["choice_accuracy"] = float(np.mean(right))
            if any(chats[n].truths for n in rows):
                means = np.mean([self.truth[n] for n in rows], 0).tolist()
                found |= dict(zip(("mc1", "mc2", "mc3"), means, strict=True))
        if rows := of.get("meta"):
            replies, wanted = [self.answers[n].text for n in rows], [chats[n].answer for n in rows]
            found |= modality_measures(replies, wanted, [chats[n].objects for n in rows])
        if rows := of.get("free"):
            found["exact"] = float(np.mean([self.answers[n].text.split() == chats[n].answer.split() for n in rows]))
        if self.losses:
            found["answer_loss"] = float(torch.cat(self.losses).mean())
        if self.answers:
            found["cut"] = float(np.mean([not answer.ended for answer in self.answers.values()]))
        if final:
            self.figures = self._shown()
            if rows := of.get("meta"):
                replies, wanted = [self.answers[n].text for n in rows], [chats[n].answer for n in rows]
                self.figures |= modality_figure(replies, wanted)
        return found

    def _pairs(self, rows: Sequence[int], truth: Sequence[bool], said: Sequence[bool]) -> dict[str, float]:
        """Return MME's accuracy+ where every picture has two questions: the share of pictures with two right answers."""
        of: dict[tuple[int, ...], list[bool]] = {}
        for n, a, b in zip(rows, truth, said, strict=True):
            of.setdefault(self.split.chats[n].pictures, []).append(a == b)
        if () in of or any(len(right) != 2 for right in of.values()):
            return {}
        return {"pair_accuracy": float(np.mean([all(right) for right in of.values()]))}

    def chance(self) -> dict[str, float]:
        """Return what a constant answer would reach."""
        truth = [says_yes(self.split.chats[n].answer) for n in self.answers if self.split.chats[n].kind == "yes-no"]
        chats = [self.split.chats[n] for n in self.picked]
        options = [(1 + len(chat.truths)) / len(chat.choices) for chat in chats]
        found = {"accuracy": max(np.mean(truth), 1 - np.mean(truth))} if truth else {}
        found |= {"choice_accuracy": np.mean(options)} if options else {}
        return {name: float(value) for name, value in found.items()}

    def _shown(self) -> dict[str, Any]:
        """Show some chats with their answers, wrong ones first among each kind."""
        chats = self.split.chats
        wrong = [n for n, answer in sorted(self.answers.items()) if answer.text.split() != chats[n].answer.split()]
        right = [n for n in sorted(self.answers) if n not in set(wrong)]
        chosen = [*wrong[: SHOWN // 2], *right[: SHOWN - min(len(wrong), SHOWN // 2)]]
        if not chosen:
            return {}
        head = "Answers to chats that the model never saw; wrong ones first."
        if self.split.images is None:
            lines = [[chats[n].question, self.answers[n].text, chats[n].answer] for n in chosen]
            columns = ["question", "answer", "reference"]
            return {"Answers": {"kind": "table", "columns": columns, "rows": lines, "caption": head}}
        cells = []
        for n in chosen:
            text = f"{chats[n].question} {self.answers[n].text} (reference: {chats[n].answer})"
            if chats[n].pictures:
                pixels = self.split.images.images(np.array(chats[n].pictures[:1]))[0]
                cells.append({"png": png(pixels), "text": text})
        return {"Answers": captioned(cells, 4, head)} if cells else {}
