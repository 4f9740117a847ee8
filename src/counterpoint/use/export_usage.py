"""Write the lines of Python that load an exported file, for the model card beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoint.engine.run import Run
from counterpoint.use.model_cards import write_card

LIBRARIES = {"onnx": "onnx", "torch": "pytorch"}
OUTPUTS = {"picture": "restored", "scene": "logits", "scenes": "logits"}  # others: embeddings


def write_usage_card(run: Run, out: Path, made: Sequence[Any], format: str) -> Path:
    """Write the model card of exported files, with the lines that load them. Return its path.

    Args:
        run: The run.
        out: The file that `export` was given; its JSON lies beside it.
        made: The records that `export` returned.
        format: onnx or torch.
    """
    facts = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    lines = usage({one.modality: one.path for one in made}, facts, out.with_suffix(".json").name, format)
    return write_card(run, out.with_suffix(".MODEL_CARD.md"), library=LIBRARIES[format], use=lines)


def usage(files: Mapping[str, Path], facts: Mapping[str, Any], beside: str, format: str) -> list[str]:
    """Return the lines that load each file and compute with it.

    Args:
        files: The file of each modality.
        facts: The content of the JSON beside the files.
        beside: Name of that JSON.
        format: onnx or torch.
    """
    specs = facts["modalities"]
    kinds = {spec["kind"] for spec in specs.values()}
    lines = ["import json", ""] if "text" in kinds or any("classes" in spec for spec in specs.values()) else []
    lines += ["import numpy as np", "import onnxruntime" if format == "onnx" else "import torch"]
    lines += ["from PIL import Image, ImageOps"] if kinds & {"image", "scene", "scenes", "picture"} else []
    lines += ["from tokenizers import Tokenizer"] if "text" in kinds else []
    for name, file in files.items():
        spec = specs[name]
        lines += ["", *_inputs(name, spec, facts["context"], beside)]
        given, out = spec["inputs"], OUTPUTS.get(spec["kind"], "embeddings")
        classes = bool(spec.get("classes"))
        if classes:
            lines.append(f'classes = json.load(open("{beside}", encoding="utf-8"))["modalities"]["{name}"]["classes"]')
        left = f"{out}, logits" if classes else f"({out},)" if format == "onnx" else out
        if format == "onnx":
            fed = ", ".join(f'"{one}": {one}' for one in given)
            lines.append(f'{left} = onnxruntime.InferenceSession("{file.name}").run(None, {{{fed}}})')
        else:
            fed = ", ".join(f"torch.from_numpy({one})" for one in given)
            detached = "" if classes else ".detach()"
            lines.append(f'{left} = torch.export.load("{file.name}").module()({fed}){detached}')
        lines += ["print(classes[int(logits[0].argmax())])"] if classes else []
    return lines


def _inputs(name: str, spec: Mapping[str, Any], context: int, facts: str) -> Sequence[str]:
    """Return the lines that make the inputs of one item of a kind."""
    kind, size = spec["kind"], spec.get("size")
    if kind in ("image", "scene"):
        return [
            'picture = ImageOps.exif_transpose(Image.open("picture.png")).convert("RGB")',
            f"picture = ImageOps.fit(picture, ({size}, {size}), Image.Resampling.BILINEAR)",
            f"pixels = np.asarray(picture).transpose(2, 0, 1)[None].copy()  # uint8 [1, 3, {size}, {size}]; a row each",
        ]
    if kind == "scenes":
        return [
            'picture = ImageOps.exif_transpose(Image.open("picture.png")).convert("RGB")',
            f"picture = ImageOps.fit(picture, ({size}, {size}), Image.Resampling.BILINEAR)",
            f"pixels = np.stack([np.asarray(picture).transpose(2, 0, 1)] * {len(spec['modalities'])})[None]"
            f"  # a picture of each: {', '.join(map(str, spec['modalities']))}",
            f"present = np.ones((1, {len(spec['modalities'])}), bool)  # False: that modality is missing",
        ]
    if kind == "picture":
        return [
            'pixels = np.asarray(Image.open("small.png").convert("RGB")).transpose(2, 0, 1)[None].copy()  # of any size'
        ]
    if kind == "text":
        return [
            f'tokenizer = Tokenizer.from_str(json.dumps(json.load(open("{facts}"))["modalities"]["{name}"]["tokenizer"]))',
            f"tokenizer.enable_truncation({context})",
            "tokenizer.enable_padding()",
            'found = tokenizer.encode_batch(["a red house", "a boat"])',
            "tokens, mask = np.array([one.ids for one in found]), np.array([one.attention_mask for one in found]) > 0",
        ]
    if kind == "audio":
        return [
            f"wave = np.zeros((1, {spec['samples']}), np.float32)  # mono sound in [-1, 1], {spec['rate']} samples a second"
        ]
    if kind == "vector":
        return [f"vector = np.zeros((1, {spec['dim']}), np.float32)  # a row for each item"]
    if kind == "item":
        return [f'number = np.array([0, 1])  # positions in the list "items" of {facts}']
    return [f'ids = np.array([[1, 2]])  # positions in the list "items" of {facts}, plus 1; 0 pads on the right']
