"""Load published models of the library transformers, by name or from a folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from counterpoint.errors import CounterpointError


def loaded(load: Callable[[], Any], name: str) -> Any:
    """Load a part of a published model, such as its weights or its tokenizer.

    Args:
        load: the library's own call.
        name: the model's name for the message, such as hf:NAME.

    Raises CounterpointError with the first line of the library's message and what to do without a network.
    """
    try:
        return load()
    except Exception as error:  # transformers' and its HTTP client's own kinds
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"{name} could not be loaded: {said[:300].rstrip('.')}. A model that is not on this machine is downloaded. "
            "If there is no network, name a folder with the model: hf:FOLDER"
        ) from error
