"""Measure models that caption pictures and embed pictures and texts: answers, and retrieval in both directions.

    caption_exact        share of pairs whose decoded caption equals the reference
    cider                CIDEr-D of these captions, in 0..10 (`measures/captions.py`)
    document_exact       share of documents whose last caption, decoded after the others, equals the reference
    image_to_text_r1     share of pictures whose nearest caption, among the split's different captions, is theirs
    text_to_image_r1     share of captions whose nearest picture is one of theirs

All other measures of answers are those of `tasks/measures/answers.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.errors import diverged
from counterpoint.tasks.measures.answers import ChatEvaluator
from counterpoint.tasks.measures.captions import cider_of
from counterpoint.tasks.measures.retrieval import retrieval


class InterleavedEvaluator(ChatEvaluator):
    """Measure the answers and embeddings of one split."""

    def reset(self) -> None:
        super().reset()
        self.paired: set[int] = set()
        self.rows: dict[str, list[Tensor]] = {"vision": [], "text": [], "captions": []}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        super().update(batch, outputs)
        self.take_rows(batch, outputs)

    def take_rows(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Take the embeddings of a batch's pairs."""
        paired = batch["paired"].cpu()
        self.paired |= set(batch["index"].cpu()[paired].tolist())
        if not bool(paired.any()):
            return
        rows = {"vision": outputs["vision"], "text": outputs["text"], "captions": batch["captions"][batch["paired"]]}
        for name, value in rows.items():
            self.rows[name].append(value.detach().cpu())
            if not bool(self.rows[name][-1].isfinite().all()):
                raise diverged(f"the {name} rows hold NaN or infinite values")

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found = {name: value for name, value in super().compute(final=final).items() if name != "exact"}
        right = {n: a.text.split() == self.split.chats[n].answer.split() for n, a in self.answers.items()}
        pairs = [ok for n, ok in right.items() if n in self.paired]
        others = [ok for n, ok in right.items() if n not in self.paired]
        found |= {"caption_exact": float(np.mean(pairs))} if pairs else {}
        found |= cider_of(self.split, {n: answer.text for n, answer in self.answers.items() if n in self.paired})
        found |= {"document_exact": float(np.mean(others))} if others else {}
        return found | self.retrieval()

    def retrieval(self) -> dict[str, float]:
        """Return the recall at 1 in both directions; {} without pairs."""
        if not self.rows["vision"]:
            return {}
        vision, text, captions = (torch.cat(self.rows[name]) for name in ("vision", "text", "captions"))
        vision, text = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (vision, text))
        known, first = np.unique(captions.numpy(), return_index=True)
        texts, numbers = text[first], torch.from_numpy(known)
        return {
            "image_to_text_r1": retrieval(vision, texts, captions, numbers, at=(1,))["r1"],
            "text_to_image_r1": retrieval(texts, vision, numbers, captions, at=(1,))["r1"],
        }

    def chance(self) -> dict[str, float]:
        """Return what a constant answer and a random choice would reach."""
        if not self.rows["captions"]:
            return super().chance()
        counts = torch.cat(self.rows["captions"]).unique(return_counts=True)[1].double()
        share = float(1 / len(counts))
        return super().chance() | {
            "caption_exact": float(counts.max() / counts.sum()),
            "image_to_text_r1": share,
            "text_to_image_r1": share,
        }
