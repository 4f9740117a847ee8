"""Write the page of generated pictures: each prompt with its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from counterpoint.report import page as parts
from counterpoint.report.page import Page
from counterpoint.words import counted


def write_generated_report(
    path: Path, run: str, seed: int, found: Sequence[tuple[str, Sequence[str], Sequence[str]]]
) -> Path:
    """Write the page and return its path.

    Args:
        path: The page to write.
        run: Name of the run.
        seed: Seed of the noise.
        found: Prompts, their unknown words, and their pictures as PNGs in base64.
    """
    many = sum(len(pictures) for _, _, pictures in found)
    page = Page("Generated pictures", f"{counted(many, 'picture')} by {run}, seed {seed}.")
    for n, (prompt, unknown, pictures) in enumerate(found, 1):
        drawn = parts.part("pictures", [str(k) for k, _ in enumerate(pictures, 1)], [list(pictures)])
        said = parts.text(f"Words that the run does not know: {', '.join(unknown)}.") if unknown else ""
        page.section(prompt, parts.join(said, drawn), anchor=f"prompt-{n}")
    return page.write(path)
