"""Print each paragraph of an option's help as one, which tyro breaks at the terminal's width, and no empty default.

tyro 1.0 keeps line breaks of the source: of functions, and before indented lines. It shows an empty default as "(default: )".
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
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
def without_empty_defaults() -> Iterator[None]:
    """Print what the block prints, with spaces in place of empty defaults."""
    held = _Held(sys.stdout)
    try:
        with contextlib.redirect_stdout(held):
            yield
    finally:
        print(EMPTY.sub(lambda found: " " * len(found[0]), held.getvalue()), end="")
