"""`counterpoint export RUN --out FILE`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Text, say, unset


def main(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    *,
    out: Annotated[str, arg(aliases=["-o"], metavar="FILE")],
    format: Annotated[Text, unset(metavar="onnx|torch|set|peft")] = None,
    modality: Annotated[Text, unset(metavar="NAME")] = None,
) -> int:
    """Write the encoder of each modality as ONNX or with torch.export, and check that its embeddings are the run's own.

    The number of items may differ from call to call. FILE.json has sizes, rates and tokenizers.

    Of a run that distilled a set, such as one of krr-st, `--format set` writes the set: pictures and targets in a file, or a
    folder of PNG files with that file. Of a run with adapters, `--format peft` writes the adapters alone into a folder that
    peft reads; other formats merge them.

    Example: counterpoint export runs/first --format onnx --out encoder.onnx

    Args:
        run: A finished run of the task aligned, views, labelled, regression, tokens, sequences, federations, dense or restored; a
            folder in the layout of a hub, or hf:USER/NAME.
        out: The file to write, or the folder of a set or of adapters. For a run with several modalities, each file has the
            modality's name before its ending.
        format: Format of the file. Default: from the ending of FILE: .onnx is onnx, .pt2 is torch, .npz and
            .safetensors are set.
        modality: Export only this modality. Default: all.
    """
    from counterpoint.face.functions import load

    files = load(run).export(out, format=format, modality=modality)
    pictures = [made for made in files if made.path.suffix == ".png"]
    for made in files:
        if made.inputs:
            on = f"random inputs and {made.real} items of the data" if made.real else "random inputs"
            said = f"   inputs {', '.join(made.inputs)}; largest difference {made.difference:.1e} on {on}"
            say(f"{made.modality}: {made.path}{said}")
        elif made not in pictures:
            say(f"{made.modality}: {made.path}")
    for note in dict.fromkeys(made.note for made in files if made.note):
        say(f"note: {note}")
    if pictures:
        say(f"{len(pictures)} pictures: {pictures[0].path} to {pictures[-1].path.name}")
    return 0
