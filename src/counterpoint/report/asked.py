"""Write the page of a question: its pictures, and the answer of each method with the probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterpoint.report import page as parts
from counterpoint.report.page import Page
from counterpoint.words import counted


def write_asked_report(
    path: Path,
    model: str,
    question: str,
    pictures: Sequence[str],
    found: Sequence[tuple[str, Any]],
    made: Sequence[Any] = (),
) -> Path:
    """Write the page of a question and return its path.

    Args:
        path: The page to write.
        model: Name of the model.
        question: The question.
        pictures: PNGs in base64.
        found: Names of methods with their answers (see `counterpoint.encoders.decoding.Answer`).
        made: What the first answer's modalities became (see `counterpoint.use.converters.Made`).
    """
    page = Page(question, f"Answers of {model} by {counted(len(found), 'method')} of decoding.")
    if pictures:
        page.section(
            "Pictures",
            parts.part("pictures", [f"{n}" for n, _ in enumerate(pictures, 1)], [list(pictures)]),
            anchor="pictures",
        )
    rows = [[method, answer.text, len(answer.tokens), "yes" if answer.ended else "no, cut"] for method, answer in found]
    page.section("Answers", parts.table(["method", "answer", "tokens", "ended"], rows), anchor="answers")
    if made:
        lines = [[one.modality, one.prompt, one.status, str(one.file or one.reason or "")] for one in made]
        page.section("Made", parts.table(["modality", "prompt", "status", "file or reason"], lines), anchor="made")
    for method, answer in found:
        steps = [
            [n, token, f"{chance:.1%}", " · ".join(f"{word} {share:.1%}" for word, share in others)]
            for n, (token, chance, others) in enumerate(
                zip(answer.tokens, answer.probabilities, answer.others, strict=True), 1
            )
        ]
        table = parts.table(["step", "token", "probability", "most probable tokens"], steps)
        page.section(f"Tokens of {method}", table, anchor=f"tokens-{method}")
    return page.write(path)
