"""Read the names of chat models: family, width, layers and heads of those that are built here, and hf:NAME."""

from __future__ import annotations

import re

from counterpoint.errors import CounterpointError, unknown

SMALL = {"llava-s": "llava-64-3-4", "llama-s": "llama-64-3-4", "qwen2-s": "qwen2-64-3-4", "gpt2-s": "gpt2-64-3-4"}
FAMILIES = ("llava", "llama", "qwen2", "gpt2")
FORMS = [*SMALL, *(f"{family}-W-D-H" for family in FAMILIES), "hf:NAME"]


def check_chat_model(name: str) -> None:
    """Raise CounterpointError for a name of no form in FORMS. Runs before data are read."""
    if name.startswith("hf:") and len(name) > 3:
        return
    shape_of(name)


def shape_of(name: str) -> tuple[str, int, int, int]:
    """Return family, width, layers and heads of a model that is built here."""
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)-(\d+)-(\d+)", SMALL.get(name, name))
    if match is None or match[1] not in FAMILIES:
        raise unknown("model", name, FORMS)
    width, depth, heads = (int(match[n]) for n in (2, 3, 4))
    if min(width, depth, heads) < 1 or width % heads or (width // heads) % 2:
        raise CounterpointError(f"{name}: needs a width that is an even multiple of its heads, and at least one layer")
    return match[1], width, depth, heads


def takes_pictures(name: str) -> bool:
    """Return whether the model of this name may take pictures; one of hf:NAME may."""
    return name.startswith("hf:") or shape_of(name)[0] == "llava"


def patch_side(size: int) -> int:
    """Return the side of a patch: the largest of 16, 8 and 4 that divides the picture into at least 3 x 3."""
    for patch in (16, 8, 4):
        if size % patch == 0 and size // patch >= 3:
            return patch
    raise CounterpointError(
        f"llava models built here need pictures whose size is a multiple of 4, at least 12; got {size}"
    )


def unloaded(name: str, error: Exception) -> CounterpointError:
    """Return the error for a published model that cannot be loaded, with the first line of its cause."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return CounterpointError(
        f"{name} could not be loaded: {text[:300].rstrip('.')}. A model that is not on this machine is downloaded; name a folder, "
        "or a model that is built here, such as llava-s"
    )
