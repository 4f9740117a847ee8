"""Define the errors that a user can correct.

The command line prints only their message and exits with code 2; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CounterpointError(Exception):
    """A request cannot be fulfilled as given. The message names the cause and the remedy."""


class DataError(CounterpointError):
    """A file or dataset is missing, unreadable or inconsistent. The message names the file."""


class RunError(CounterpointError):
    """A run directory or checkpoint is missing, incomplete, damaged or of another kind. The message names it."""


class ProtocolError(CounterpointError):
    """A claim's protocol is invalid, or its figures cannot decide it. The message names the claim and the fault."""


class Interrupted(CounterpointError):
    """The user stopped a run; it can be resumed. The command line exits with code 130."""


def unknown(kind: str, name: str, known: Iterable[str]) -> CounterpointError:
    """Return the error for an unknown name, with near matches: `unknown("system", "maci-sd", slugs)`.

    Args:
        kind: Noun for the message, such as "system".
        name: The unknown name.
        known: The valid names. Up to 3 near matches are suggested, else the first 20 names.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"known: {', '.join(known[:20])}" + (", ..." if len(known) > 20 else "")
    )
    return CounterpointError(f"unknown {kind} '{name}'; {hint}")


def needs_extra(what: str, extra: str) -> CounterpointError:
    """Return the error for a library that is not installed, with the command that installs it.

    >>> print(needs_extra("hf:bert", "language"))
    hf:bert needs the extra [language]: pip install 'counterpoint[language]'

    Args:
        what: What the user asked for.
        extra: Name of the extra in pyproject.toml that brings the library.
    """
    return CounterpointError(f"{what} needs the extra [{extra}]: pip install 'counterpoint[{extra}]'")
