"""Errors a user can mend. The command line prints their message alone and exits with code 2; `--debug` adds the traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CounterpointError(Exception):
    """Something the user asked for cannot be done as asked; the message names it and says what to do."""


class DataError(CounterpointError):
    """A file or dataset is missing, unreadable or inconsistent; the message names the file."""


class RunError(CounterpointError):
    """A run directory or checkpoint is not what it should be; the message names it."""


class ProtocolError(CounterpointError):
    """A claim's protocol is not sound, or its figures cannot answer it; the message names the claim and the fault."""


class Interrupted(CounterpointError):
    """The user stopped a run; it can be resumed. The command line exits with code 130."""


def unknown(kind: str, name: str, known: Iterable[str]) -> CounterpointError:
    """The error for an unknown name, with near matches: `unknown("system", "maci-sd", slugs)`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"known: {', '.join(known[:20])}" + (", ..." if len(known) > 20 else "")
    )
    return CounterpointError(f"unknown {kind} '{name}'; {hint}")
