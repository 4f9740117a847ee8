"""Form the words of messages."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "", *, commas: bool = False) -> str:
    """Return a number with its noun in the singular or the plural.

    >>> counted(1, "item"), counted(0, "item"), counted(2, "bag of clips", "bags of clips")
    ('1 item', '0 items', '2 bags of clips')
    >>> counted(2, "category"), counted(3, "batch"), counted(4, "day"), counted(12345, "row", commas=True)
    ('2 categories', '3 batches', '4 days', '12,345 rows')

    Args:
        number: The number.
        noun: The noun in the singular.
        plural: Its plural. Default: by the rules of spelling.
        commas: Separate thousands by commas.
    """
    shown = f"{number:,}" if commas else f"{number}"
    return f"{shown} {noun if number == 1 else plural or _plural(noun)}"


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    hisses = noun.endswith(("s", "x", "z", "ch", "sh")) and not noun.endswith("och")  # epochs
    return f"{noun}es" if hisses else f"{noun}s"
