"""Docstrings are written to be read in the source; this makes Markdown of them where the two differ."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = ("Example:", "Examples:")  # griffe itself knows what `>>>` is in these


class Docstrings(griffe.Extension):
    """For mkdocstrings: every docstring of the package, as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = examples(lists(bounds(obj.docstring.value)))


def bounds(text: str) -> str:
    """Escape the bound in `temperature: > 0`, which would begin a quotation in Markdown."""
    return re.sub(r"^(\s*[\w, ]+: )>(?!>)", r"\1\\>", text, flags=re.MULTILINE)


def lists(text: str) -> str:
    """Add an empty line before and after each list."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        item = line.lstrip().startswith("- ")
        text_again = bool(line[:1].strip()) and not item
        if item != inside and (item or text_again):
            lines.append("")
        inside = item or (inside and not text_again)
        lines.append(line.removeprefix("  ") if inside else line)
    return "\n".join(lines)


def examples(text: str) -> str:
    """Convert `>>>` lines and their output to a block of code."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        begins = line.lstrip().startswith(">>>")
        known = next((old for old in reversed(lines) if old.strip()), "").strip() in SECTIONS
        if begins and not inside and not known:
            inside = True
            lines += ["", "```pycon"]
        elif inside and not line.strip():
            inside = False
            lines.append("```")
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)
