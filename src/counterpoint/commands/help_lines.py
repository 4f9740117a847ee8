"""Print each paragraph of an option's help as one, which tyro breaks at the terminal's width.

tyro 1.0 also keeps line breaks of the source: of functions, and before indented lines.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

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
