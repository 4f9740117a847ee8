"""Meta-responses: answers that name a modality and a prompt for its converter. Importing this module does not import torch.

    Modality: [IMAGE] Prompt: a red fox in the snow

A flag such as [IMAGE] names a modality. For [TEXT] the prompt is the answer itself.

Source: the formats and the parser of ModaVerse (Wang et al., CVPR 2024), by the first author of SwitchGPT (arXiv 2309.07623).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

TEXT = "[TEXT]"
FLAGS = (TEXT, "[IMAGE]", "[AUDIO]", "[VIDEO]")
MODALITY, PROMPT, STOP = "Modality:", "Prompt:", "###"
FORM = re.compile(r"\[[A-Z][A-Z0-9_]*\]")  # of a flag


def render(flag: str, prompt: str) -> str:
    """Write the meta-response of a flag and a prompt.

    >>> render("[IMAGE]", "a red fox")
    'Modality: [IMAGE] Prompt: a red fox'
    """
    return f"{MODALITY} {flag} {PROMPT} {prompt}"


def flags_in(text: str) -> list[str]:
    """Return the different flags in a text, in order."""
    return list(dict.fromkeys(FORM.findall(text)))


def named_flags(text: str) -> list[str]:
    """Return the different flags of a meta-response, in order; those in its prompt do not count."""
    return flags_in(text.partition(PROMPT)[0])


def parse_meta_response(
    text: str, flags: Sequence[str] = FLAGS, default: str = TEXT, strict: bool = False
) -> tuple[list[str], list[str]]:
    """Read the flags and the prompt of a reply.

    Args:
        text: the reply of a model.
        flags: the known flags; others are ignored.
        default: the flag of a reply without any.
        strict: count flags between "Modality:" and "Prompt:" alone. Otherwise those of the whole reply count, as in the authors'
            code.

    Returns the flags, and the prompt once for each. The most frequent flag is first; ties are in the order of `flags`. The prompt
    is the text after the first "Prompt:" up to "###". A reply without "Prompt:" has the default flag and an empty prompt; the
    authors' parser raises there.

    Raises ValueError where `flags` is empty or lacks `default`.

    >>> parse_meta_response("Modality: [IMAGE] [AUDIO] [IMAGE] Prompt: a barking dog ###")
    (['[IMAGE]', '[AUDIO]'], ['a barking dog', 'a barking dog'])

    Source: the parser of ModaVerse's code.
    """
    if default not in flags:
        raise ValueError(f"default must be one of flags, got {default!r} and {list(flags)}")
    head, marker, rest = text.partition(PROMPT)
    if not marker:
        return [default], [""]
    searched = head.partition(MODALITY)[2] if strict else text
    counts = {flag: searched.count(flag) for flag in flags}
    found = sorted((flag for flag in counts if counts[flag]), key=lambda flag: -counts[flag]) or [default]
    prompt = rest.partition(STOP)[0].strip()
    return found, [prompt] * len(found)


def well_formed(text: str, flags: Sequence[str] = FLAGS) -> bool:
    """Return whether a reply has the form of a meta-response: known flags, and a prompt that is not empty.

    >>> well_formed("Modality: [IMAGE] Prompt: a fox"), well_formed("Modality: Prompt: a fox"), well_formed("a fox")
    (True, False, False)
    """
    known = "|".join(re.escape(flag) for flag in flags) or "(?!)"
    found = re.match(rf"\s*{MODALITY}\s*(?:(?:{known})\s*)+{PROMPT}(.*)", text, re.DOTALL)
    return found is not None and bool(found[1].partition(STOP)[0].strip())


def replacements(flags: Sequence[str] = FLAGS) -> dict[str, str]:
    """Return what stands for flags and markers in a user's text, so that it cannot pass for a meta-response."""
    found = {flag: f"({flag.strip('[]')})" for flag in flags}
    return found | {marker: f"{marker[:-1]} :" for marker in (MODALITY, PROMPT)} | {STOP: "# # #"}
