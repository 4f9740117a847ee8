"""Define the errors that a user can correct.

The command line prints only their message and exits with code 2; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral


class CounterpointError(Exception):
    """A request cannot be fulfilled as given. The message names the cause and the remedy."""


class DataError(CounterpointError):
    """A file or dataset is missing, unreadable or inconsistent. The message names the file."""


class RunError(CounterpointError):
    """A run directory or checkpoint is missing, incomplete, damaged or of another kind. The message names it."""


class ProtocolError(CounterpointError):
    """A claim's protocol is invalid, or its figures cannot decide it. The message names the claim and the fault."""


# The module that a library is imported by -> the extra that brings it, for libraries that only an extra brings.
EXTRA_OF = {
    **dict.fromkeys(("transformers", "tokenizers"), "language"),
    **dict.fromkeys(("av", "opentimelineio"), "video"),
    **dict.fromkeys(("music21", "verovio", "resvg_py", "tinysoundfont", "pretty_midi"), "music"),
    "qtawesome": "glyphs",
    "espeakng_loader": "speech",
    "diffusers": "generation",
    **dict.fromkeys(("pycocotools", "nibabel", "spandrel"), "dense"),
    "peft": "adapters",
    "faiss": "search",
    "optuna": "sweep",
    "ray": "cluster",
    "lance": "lance",
    "litdata": "litdata",
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    **dict.fromkeys(("starlette", "uvicorn", "multipart", "python_multipart"), "serve"),
    "flwr": "federated",
}


def absent(error: ModuleNotFoundError) -> CounterpointError | None:
    """Return the error for a library that is not installed and that an extra brings. None for any other module.

    >>> print(absent(ModuleNotFoundError("no", name="peft.tuners")))
    this needs the library peft, which is not installed: pip install 'counterpoint[adapters]'
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRA_OF:
        return None
    return CounterpointError(
        f"this needs the library {module}, which is not installed: pip install 'counterpoint[{EXTRA_OF[module]}]'"
    )


class Interrupted(CounterpointError):
    """The user stopped a run; it can be resumed. The command line exits with code 130."""


class Diverged(CounterpointError):
    """A loss or an output of a training is NaN or infinite."""


def diverged(what: str, remedy: str = "lower --lr") -> Diverged:
    """Return the error for a training whose values are not finite.

    >>> print(diverged("the logits hold NaN or infinite values"))
    the logits hold NaN or infinite values: training diverged; lower --lr

    Args:
        what: Which values.
        remedy: What the user can do.
    """
    return Diverged(f"{what}: training diverged; {remedy}")


def unknown(kind: str, name: str, known: Iterable[str]) -> CounterpointError:
    """Return the error for an unknown name, with near matches: `unknown("system", "maci-sd", slugs)`.

    Args:
        kind: Noun for the message, such as "system".
        name: The unknown name.
        known: The valid names. Up to 3 near matches are suggested, in upper or lower case, else the first 20 names.
    """
    known = list(known)
    by_lower = {other.lower(): other for other in known}
    near = [by_lower[other] for other in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
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


def check_seed(seed: int) -> None:
    """Raise CounterpointError for a seed that NumPy's generators do not take: one outside 0 .. 2 ** 32 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise CounterpointError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
