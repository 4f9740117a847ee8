"""`counterpoint ask RUN QUESTION`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from counterpoint.commands.common import Count, Device, Place, Text, console, say, table, unset
from counterpoint.files import check_empty, check_writable


def main(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    *,
    image: Annotated[tuple[Path, ...], unset(metavar="FILE")] = (),
    method: Annotated[tuple[str, ...], arg(metavar="NAME")] = ("plain",),
    system: Annotated[Text, unset(metavar="TEXT")] = None,
    temperature: float = 1.0,
    new_tokens: Annotated[Count, unset(metavar="N")] = None,
    seed: int = 0,
    out: Annotated[Place, unset(metavar="DIR")] = None,
    picture: str = "drawn",
    html: Annotated[Place, unset(metavar="FILE")] = None,
    device: Device = "auto",
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Ask a model a question, by one or several methods of decoding.

    Example: counterpoint ask runs/first "is there a brick ?" --image a.png --method plain ritual vcd --html asked.html

    Args:
        run: A finished run of the task chats or interleaved, or hf:NAME, a model of transformers by its name or folder.
        question: The question. <image> marks the place of a picture; by default pictures come first.
        image: Pictures, which are cut to squares of the model's size.
        method: plain, greedy, ritual, ritual+, same, vcd or m3id; of a run of lol also lol, icd, dola, fusion, refocus or
            instructed. Several are compared.
        system: An instruction that comes before the question. Default: none.
        temperature: Temperature of the draws; 0: the most probable token at each step.
        new_tokens: Maximum number of tokens of an answer, at least 1. Default: as many as the run's own; 64 for hf:NAME.
        seed: Seed of the draws and of random transformations; they are the same on every device.
        out: A new folder for the files that the answer asks for, of a run of switchgpt. Default: none.
        picture: Converter of pictures for --out: drawn, run:RUN (a run of the task generation) or hf:NAME (of diffusers).
        html: A page to write, with the probabilities of all tokens. Default: none.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        json_: Print JSON.
    """
    from counterpoint.use.ask import ask, produce

    if out is not None:
        check_empty(out)
    if html is not None:
        check_writable(html)
    found = ask(
        run,
        question,
        image,
        method,
        system=system or "",
        temperature=temperature,
        new_tokens=new_tokens,
        seed=seed,
        device=device,
    )
    made = [] if out is None else produce(run, found[0].answer.text, out, picture=picture, seed=seed, device=device)
    if json_:
        rows: list[dict[str, Any]] = [{"method": name} | answer._asdict() for name, answer in found]
        if out is not None:
            rows[0]["made"] = [one._asdict() | {"file": None if one.file is None else str(one.file)} for one in made]
        print(json.dumps(rows, indent=2))
    else:
        shown = table("method", "answer", "first token", right=("first token",))
        shown.columns[1].overflow = "fold"
        for name, answer in found:
            first = f"{answer.probabilities[0]:.0%}" if answer.probabilities else ""
            shown.add_row(name, answer.text + ("" if answer.ended else " …"), first)
        console().print(shown)
        for one in made:
            say(f"{one.modality} {one.prompt}: {one.status} {one.file or one.reason}".rstrip())
    if html is not None:
        from counterpoint.data.images import decode
        from counterpoint.data.shown import png
        from counterpoint.report.asked import write_asked_report

        write_asked_report(html, run, question, [png(decode(file, 224), 224) for file in image], found, made)
        if not json_:
            say(f"Page: {html}")
    return 0
