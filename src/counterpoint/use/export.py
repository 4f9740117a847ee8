"""Write the encoders of a run for other programs, as ONNX or with torch.export, and check their outputs.

    encoder.onnx         pixels uint8 [n, 3, size, size] -> embeddings float32 [n, dim]; normalisation is part of it
    clip.image.onnx      for a run with several modalities, one file for each
    clip.text.onnx       tokens int64 [n, length], mask bool [n, length] -> embeddings
    clip.json            further facts for a program: kinds, sizes, rates, tokenizers (the JSON of the library `tokenizers`)

    image    pixels   uint8    [n, 3, size, size]
    text     tokens   int64    [n, length], length at most the run's context; mask bool [n, length]
    audio    wave     float32  [n, samples], mono in [-1, 1] at the run's rate
    vector   vector   float32  [n, dim]
    history  ids      int64    [n, length], numbers of items plus 1, 0 for padding on the right, at most the run's length; or set
    item     number   int64    [n], numbers of items
    picture  pixels   uint8    [n, 3, height, width]; the output is the restored picture, float32 in 0..1
    scene    pixels   uint8    [n, 3, size, size]; the output is logits of the pixels' classes [n, classes, size, size]
    scenes   pixels   uint8    [n, modalities, 3, size, size]; present bool [n, modalities], at least one of each item

A run that classifies pictures may have a second output: the logits of the classes, float32 [n, classes].
The number of items n may differ from call to call. So may the length of texts and histories, and the size of pictures to restore.
Adapters (`--lora`) are merged into the layers. The dot product of a history (or set) and an item is the item's score; the names of
items by number are in the .json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.encoders.adapters import adapters_merged, write_adapters
from counterpoint.errors import CounterpointError, unknown
from counterpoint.files import check_writable, replacing
from counterpoint.search.encoder import EPS, Encoder
from counterpoint.use.export_inputs import Checked, random_inputs, real_items
from counterpoint.use.export_usage import OUTPUTS
from counterpoint.use.quiet import only_errors
from counterpoint.views.images import normalise
from counterpoint.words import counted

ENDINGS = {".onnx": "onnx", ".pt2": "torch"}
ITEMS = 8  # items of the run's data that the check takes
LARGEST = 1e-4  # maximum difference from the run's own embedding, relative to its largest value
INPUTS = {
    "image": ("pixels",),
    "text": ("tokens", "mask"),
    "audio": ("wave",),
    "vector": ("vector",),
    "history": ("ids",),
    "set": ("ids",),
    "item": ("number",),
    "picture": ("pixels",),
    "scene": ("pixels",),
    "scenes": ("pixels", "present"),
}
NEEDS = ("onnx", "onnxscript", "onnxruntime")
EXPORTERS = ("torch", "torch.fx", "torch.export", "onnxscript", "onnx_ir")  # loggers


@dataclass(frozen=True)
class Exported:
    """One file that was written."""

    path: Path
    modality: str
    inputs: tuple[str, ...]
    """Names of the inputs, in order."""
    difference: float
    """The largest difference from the run's own embeddings that the check found, relative to their largest value."""
    real: int = 0
    """Number of items of the run's data that the check took, beside random inputs."""
    note: str = ""
    """What the check left out, and the reason."""


class Tower(nn.Module):
    """The encoder of one modality with its pre-processing and normalisation: from raw inputs to embeddings."""

    def __init__(self, encoder: Encoder, name: str, *, classes: bool = False) -> None:
        super().__init__()
        self.learner = encoder.learner
        self.classes = class_names(encoder, name) if classes else ()
        self.encoder, self.name, self.kind = encoder, name, encoder.kinds[name]
        if self.kind == "item":
            self.register_buffer("table", encoder.item_table.cpu())

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return embeddings [n, dim]; with `classes`, also the logits of the classes [n, classes]."""
        if self.classes:
            found = _classified(self.encoder, _normalised(inputs[0]))
            return F.normalize(found["feature"].float(), dim=1, eps=EPS), found["logits"].float()
        if self.kind == "item":
            rows: Tensor = self.get_buffer("table")[inputs[0]]
            return rows
        if self.kind == "image":
            return self.encoder.embedded(self.name, _normalised(inputs[0]))
        return self.encoder.embedded(self.name, tuple(inputs) if self.kind in ("text", "scenes") else inputs[0])


def _normalised(images: Tensor) -> Tensor:
    """Return uint8 images as `normalise` does, without its operation in place: PyTorch 2.6 cannot write that as ONNX."""
    return normalise(images.float() / 255)


def class_names(encoder: Encoder, name: str) -> Sequence[str]:
    """Return the names of the classes of a run that classifies pictures; () for another run."""
    names = encoder.run.facts().get("class_names") or ()
    if not names or getattr(encoder, "task", "") != "labelled" or not getattr(encoder.config, "classifies", False):
        return ()
    with torch.no_grad():
        (inputs,) = random_inputs(encoder, name, 2)
        found = _classified(encoder, normalise(inputs))
        # Some systems classify another feature than the embedding, and others give one logit more.
        same = "logits" in found and found["logits"].shape == (2, len(names)) and "feature" in found
        rows = F.normalize(found["feature"].float(), dim=1, eps=EPS) if same else None
        return list(names) if rows is not None and rows.equal(encoder.embedded(name, normalise(inputs))) else ()


def _classified(encoder: Encoder, images: Tensor) -> Any:
    learner: Any = encoder.learner
    return learner.predict({"image": images, "part": "survey", "index": torch.arange(images.shape[0]), "label": None})


def export(
    encoder: Encoder,
    out: Path | str,
    *,
    format: str | None = None,
    modality: str | None = None,
    items: int = ITEMS,
    classes: bool = False,
) -> list[Exported]:
    """Write the encoder of each modality of a run. Check each file on random inputs of several sizes, and on real items.

    The check computes in float32. The real items are those of the run's data, where the data can still be read.

    Args:
        encoder: A loaded run.
        out: The file. With several modalities, each file has the modality's name before its ending.
        format: onnx or torch. Default: from the ending of `out`, .onnx or .pt2.
        modality: The only modality to export. Default: all.
        items: Number of items of the run's data to check on, >= 0.
        classes: For a run that classifies pictures, give the logits of the classes as a second output.

    Returns a record for each file. Raises CounterpointError, and leaves no file, in three cases. Packages of the extra `export`
    are missing. A network cannot be traced. The outputs differ by more than 1e-4.
    """
    out = Path(out)
    if format is None:
        if out.suffix not in ENDINGS:
            raise CounterpointError(
                f"{out} has no known ending; name a file that ends in .onnx or .pt2, or add --to (in Python: to=)"
            )
        format = ENDINGS[out.suffix]
    if format not in ("onnx", "torch"):
        raise unknown("format", format, ["onnx", "torch", "hf", "timm", "sentence-transformers", "set", "peft"])
    if modality is not None and modality not in encoder.kinds:
        raise unknown("modality", modality, encoder.kinds)
    if format == "onnx":
        check_packages()
    check_writable(out)
    names = [modality] if modality is not None else list(encoder.kinds)
    several = len(encoder.kinds) > 1
    paths = {name: out.with_suffix(f".{name}{out.suffix}") if several else out for name in names}
    parts = {name: path.with_name(f".{path.name}.part{path.suffix}") for name, path in paths.items()}
    device, training = encoder.learner.device, encoder.learner.training
    encoder.learner.cpu().eval()
    try:
        real, note = real_items(encoder, names, items)
        towers = {name: Tower(encoder, name, classes=classes).eval() for name in names}
        found = {name: _written(towers[name], part, format, real.get(name)) for name, part in parts.items()}
        for name, part in parts.items():
            part.replace(paths[name])
    finally:
        encoder.learner.to(device).train(training)
        for part in parts.values():
            part.unlink(missing_ok=True)
    facts: dict[str, Any] = {"run": encoder.run.slug, "context": encoder.transform.context, "modalities": {}}
    for name in names:
        spec = dict(encoder.transform.modalities[name]) | {"inputs": INPUTS[encoder.kinds[name]]}
        if name in encoder.transform.tokenizers:
            spec["tokenizer"] = json.loads(encoder.transform.tokenizers[name].to_json())
        if towers[name].classes:
            spec["classes"] = list(towers[name].classes)
        facts["modalities"][name] = spec
    if listed := getattr(encoder.transform, "items", ()):  # networks of pictures have none
        facts["items"] = list(listed)
    with replacing(out.with_suffix(".json")) as file:
        file.write(json.dumps(facts, ensure_ascii=False).encode())
    counts = {name: len(rows) for name, (_, rows) in real.items()}
    return [
        Exported(paths[name], name, INPUTS[encoder.kinds[name]], found[name], counts.get(name, 0), note)
        for name in names
    ]


def export_adapters(learner: Any, out: Path | str) -> list[Exported]:
    """Write the adapters of encoders in the layout of peft, for the library's own networks.

    Args:
        learner: A learner with an adapted `encoder`, or with `encoders` of several modalities, some of them adapted.
        out: The folder. For several modalities it has a folder for each one with adapters.

    Returns a record for each file. Raises CounterpointError for a learner without adapters, and for a path that is a file.
    """
    if Path(out).is_file():
        raise CounterpointError(f"{out} is a file; name a folder for the two files of the adapters")
    places = {Path(out) / name: learner.encoders[name] for name in getattr(learner, "adapted", ())}
    found = []
    for place, encoder in (places or {Path(out): getattr(learner, "encoder", nn.Module())}).items():
        files = write_adapters(getattr(encoder, "model", encoder), place)
        found += [Exported(path, f"adapters of {place.name}" if places else "adapters", (), 0.0) for path in files]
    return found


def check_packages() -> None:
    """Raise CounterpointError, naming the extra, when a package for ONNX is missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise CounterpointError(
            f"ONNX needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}: pip install 'counterpoint[export]'. "
            "torch.export needs none: name a file that ends in .pt2"
        )


def _written(tower: Tower, path: Path, format: str, real: Checked | None) -> float:
    """Write one modality with its classes, or without them where a classifier cannot be written. See `_export`."""
    try:
        return _export(tower, path, format, real)
    except CounterpointError:
        if not tower.classes:
            raise
    tower.classes = ()
    return _export(tower, path, format, real)


def _export(tower: Tower, path: Path, format: str, real: Checked | None) -> float:
    """Write one modality, read the file and compare, also on `real` items of the run's data. Return the largest difference.

    Raises CounterpointError when it is too large.
    """
    encoder, name = tower.encoder, tower.name
    inputs = random_inputs(encoder, name, 3)
    with only_errors(*EXPORTERS), torch.no_grad():
        with adapters_merged(encoder.learner):
            program = _traced(tower, inputs, name)
        if format == "torch":
            torch.export.save(program, path)
        else:
            _to_onnx(program, inputs, encoder.kinds[name], path, ["logits"] if tower.classes else [])
    program = opened(path, format)
    checks = [random_inputs(encoder, name, count) for count in (1, 3, 5)]
    with only_errors(*EXPORTERS), torch.no_grad():
        pairs = [(inputs, _several(tower(*inputs))) for inputs in checks] + ([(real[0], (real[1],))] if real else [])
        difference = max(_difference(name, program, inputs, wanted) for inputs, wanted in pairs)
    if not difference <= LARGEST:
        raise CounterpointError(
            f"the exported encoder of {name} differs from the run: its embeddings differ by {difference:.1e} of the largest "
            f"value, more than {LARGEST:g}; no file was written"
        )
    return difference


def _dynamic(kind: str) -> dict[int, Any]:
    """Return the axes whose length may differ from call to call. A network that fixes one of them fails the check."""
    free = torch.export.Dim.AUTO
    return dict.fromkeys({"text": (0, 1), "history": (0, 1), "set": (0, 1), "picture": (0, 2, 3)}.get(kind, (0,)), free)


def _traced(tower: Tower, inputs: Sequence[Tensor], name: str) -> Any:
    """Export a tower with torch.export. CounterpointError when its code depends on the values in a batch."""
    try:
        shapes = tuple(_dynamic(tower.kind) for _ in inputs)
        return torch.export.export(tower, tuple(inputs), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch raises many types of exceptions
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"the encoder of {name} cannot be exported by torch.export: {said[:300]}. Use its learner instead, a plain "
            "nn.Module: counterpoint.load(RUN).learner"
        ) from error


def _to_onnx(program: Any, inputs: Sequence[Tensor], kind: str, path: Path, more: Sequence[str]) -> None:
    torch.onnx.export(
        program,
        tuple(inputs),
        str(path),
        input_names=list(INPUTS[kind]),
        output_names=[OUTPUTS.get(kind, "embeddings"), *more],
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _several(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _difference(name: str, program: Callable[..., Any], inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of a file's outputs from the (first) wanted ones, relative to their largest values."""
    try:
        found = _several(program(*inputs))
    except Exception as error:  # torch and onnxruntime raise their own types, for example for a size that tracing fixed
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"the exported encoder of {name} fails on {counted(len(inputs[0]), 'item')}: {said[:300]}; no file was written"
        ) from error
    return max(difference_of(one, other) for one, other in zip(found, wanted, strict=False))


def difference_of(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of two arrays, relative to the largest value wanted; infinity for other shapes."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-12))


def opened(path: Path, format: str) -> Callable[..., Any]:
    """Read an exported file. Return it as a function from inputs to embeddings, or to embeddings and logits of classes."""
    if format == "torch":
        program: Callable[..., Any] = torch.export.load(path).module()
        return program
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def computed(*inputs: Tensor) -> Any:
        made = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        rows = tuple(torch.from_numpy(one) for one in made)
        return rows if len(rows) > 1 else rows[0]

    return computed
