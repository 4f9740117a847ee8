"""`counterpoint show SLUG`."""

from __future__ import annotations

import json
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint import catalog
from counterpoint.commands.common import CLAIMS, say


def main(
    slug: Annotated[Positional[str], arg(metavar="SLUG")], *, json_: Annotated[bool, arg(name="json")] = False
) -> int:
    """Show one system: its paper, claim, functions and how to train it.

    Example: counterpoint show simclr

    Args:
        slug: The system's name, as `counterpoint systems` lists it.
        json_: Print JSON.
    """
    entry = catalog.get(slug)
    if json_:
        print(json.dumps(entry.as_dict(), indent=2))
        return 0
    lines = [
        entry.title,
        f"arXiv {entry.arxiv}" if entry.arxiv else "",
        f"{entry.area} · task {entry.task} · {entry.state}",
    ]
    if entry.claim:
        lines += ["", f"Claim: {entry.claim}"]
    if entry.built:
        record = CLAIMS / f"{slug}.json"
        if record.is_file():
            lines.append(f"Verdict on this machine's record: {json.loads(record.read_text())['verdict']} ({record})")
        elif entry.state == "built" and "+" not in slug:
            lines.append("The claim is not yet verified on 5 seeds.")
        lines += ["", "Functions, in counterpoint.functional:", *(f"  {f.partition(':')[2]}" for f in entry.functions)]
        lines += [
            "",
            f"Train:     counterpoint train {slug}           (settings: counterpoint train {slug} --help)",
            f"The claim: counterpoint verify {slug.rpartition('+')[2]}",
        ]
    else:
        lines += ["", "Planned: it is in the catalogue but not built yet."]
    say("\n".join(line for i, line in enumerate(lines) if line or i > 2))
    return 0
