"""`counterpoint export RUN --out FILE`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Text, say, unset
from counterpoint.errors import CounterpointError
from counterpoint.words import counted

FORMATS = "onnx|torch|hf|timm|sentence-transformers|set|peft"


def main(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    *,
    out: Annotated[Text, unset(aliases=["-o"], metavar="FILE")] = None,
    to: Annotated[Text, unset(aliases=["--format"], metavar=FORMATS)] = None,
    modality: Annotated[Text, unset(metavar="NAME")] = None,
    items: int = 8,
) -> int:
    """Write a run's encoders for other programs and libraries, and check that their outputs are the run's own.

    `--to onnx` and `--to torch` write a file for each modality, with pre-processing. The number of items may differ from call to
    call. FILE.json has sizes, rates and tokenizers, FILE.MODEL_CARD.md the run's data, figures and settings.

    `--to hf` writes a folder for `transformers.AutoModel`, with its processor or tokenizer: encoders hf:NAME and minilm. `--to
    timm` writes one for `timm.create_model`: encoders timm:NAME, vit-s and vit-xs. `--to sentence-transformers` writes a text
    encoder for `SentenceTransformer`. Each folder has a README.md that shows how to load it.

    Of a run that distilled a set, such as one of krr-st, `--to set` writes the set: pictures and targets in a file, or a
    folder of PNG files with that file. Of a run with adapters, `--to peft` writes the adapters alone into a folder that
    peft reads; other formats merge them.

    Example: counterpoint export runs/first --to onnx --out encoder.onnx

    Args:
        run: A finished run of the task aligned, views, labelled, regression, tokens, dialogs, sequences, federations, dense or
            restored; a folder in the layout of a hub, or hf:USER/NAME.
        out: The file to write, or the folder. For a run with several modalities, each file or folder has the modality's name.
            Default: in RUN/exported.
        to: Format. Default: from the ending of FILE: .onnx is onnx, .pt2 is torch, .npz and .safetensors are set.
        modality: Export only this modality. Default: all.
        items: Number of items of the run's data to check on, beside random inputs. 0: do not read the data.
    """
    from counterpoint.face.functions import load

    if out is None and to is None:
        said = "name a format (--to) or a file such as encoder.onnx (--out)"
        raise CounterpointError(f"{said}; formats: {FORMATS.replace('|', ', ')}")
    files = load(run).export(out, to=to, modality=modality, items=items)
    pictures = [made for made in files if made.path.suffix == ".png"]
    for made in files:
        if made.inputs:
            on = f"random inputs and {counted(made.real, 'item')} of the data" if made.real else "random inputs"
            said = f"   inputs {', '.join(made.inputs)}; largest difference {made.difference:.1e} on {on}"
            say(f"{made.modality}: {made.path}{said}")
        elif made not in pictures:
            say(f"{made.modality}: {made.path}")
    for note in dict.fromkeys(made.note for made in files if made.note):
        say(f"note: {note}")
    if pictures:
        say(f"{counted(len(pictures), 'picture')}: {pictures[0].path} to {pictures[-1].path.name}")
    return 0
