"""Print each paragraph of a help text as one, broken at the terminal's width, and no empty default.

tyro 1.0 keeps line breaks of the source: of functions, and before lines that begin with a space or a sign. It breaks the texts
of options at the terminal's width, but not a command's own text. It shows an empty default as "(default: )".
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

EMPTY = re.compile(r"\(default: (''|\"\")?\)")
BREAK = re.compile(r"(?<!\n)\n[ ]*(?![\s\-*])")  # within a paragraph, not before an item of a list


@contextlib.contextmanager
def whole_paragraphs() -> Iterator[None]:
    """Let docstring_parser, from which tyro takes help texts, return each paragraph as one line within the block."""
    import docstring_parser

    plain = docstring_parser.parse, docstring_parser.parse_from_object

    def joining(parse: Callable[..., Any]) -> Callable[..., Any]:
        def joined(*given: Any, **more: Any) -> Any:
            found = parse(*given, **more)
            for one in found.params:
                one.description = one.description and BREAK.sub(" ", one.description)
            found.short_description = found.short_description and BREAK.sub(" ", found.short_description)
            found.long_description = found.long_description and BREAK.sub(" ", found.long_description)
            return found

        return joined

    docstring_parser.parse, docstring_parser.parse_from_object = map(joining, plain)
    try:
        yield
    finally:
        docstring_parser.parse, docstring_parser.parse_from_object = plain


class _Held(io.StringIO):
    """Text that another stream prints later, formatted as for that stream."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream

    encoding = property(lambda self: self.stream.encoding)

    def isatty(self) -> bool:
        return bool(self.stream.isatty())


@contextlib.contextmanager
def tidy_help() -> Iterator[None]:
    """Print what the block prints: spaces in place of empty defaults, a command's own text broken at the terminal's width."""
    held = _Held(sys.stdout)
    try:
        with contextlib.redirect_stdout(held):
            yield
    finally:
        width = shutil.get_terminal_size().columns
        print("\n".join(_broken(line, width) for line in _tidied(held.getvalue()).split("\n")), end="")


def _tidied(text: str) -> str:
    """Return the text with spaces in place of empty defaults, and with one empty line between paragraphs."""
    return re.sub(r"\n{3,}", "\n\n", EMPTY.sub(lambda found: " " * len(found[0]), text))


def _broken(line: str, width: int) -> str:
    """Return a line of a command's own text, broken at the width; a line of a box, a usage or an example as it is."""
    if re.match(r"[\w`]", line) and not line.startswith(("usage:", "Example:")):
        return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    return line
